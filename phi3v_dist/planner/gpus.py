"""GPU names → what the planner needs to know of them.

What comes in: a name such as `h100-80`. What goes out: a `Gpu`. Surprise: data sheets print tensor figures "with
sparsity" first; these are the dense ones, and memory is what a program can have, which is less than the name says.

Sources: NVIDIA's data sheets of A100 (2022), L40S, H100 (SXM5, 2023), H200 (2023), B200 (HGX, 2024), dense BF16; memory
bandwidth from the same. Network: one 400 Gb/s (A100: 200, L40S: 100) adapter for each GPU, as in NVIDIA's DGX and HGX
reference designs; NVLink from the data sheets, in one direction.
"""

import difflib
import re
from dataclasses import dataclass

from phi3v_dist.errors import ConfigError

EFFICIENCY = 0.4  # of the dense bf16 figure, causal FLOPs without recomputing; see docs/planner.md
USABLE = 0.94  # 74 of 79.1 GiB: what is left beside the driver, and pieces of the allocator that fit nothing


@dataclass(frozen=True)
class Gpu:
    """memory_bytes: as the driver reports it. flops: dense bf16, a second. The rest: bytes a second, one direction."""

    name: str
    memory_bytes: int
    flops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * USABLE)


GIB = 2**30
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", int(39.4 * GIB), 312e12, 1.555e12, 300e9, 25e9),
        Gpu("a100-80", int(79.1 * GIB), 312e12, 2.039e12, 300e9, 25e9),
        Gpu("l40s-48", int(44.5 * GIB), 362e12, 0.864e12, 32e9, 12.5e9),
        Gpu("h100-80", int(79.1 * GIB), 989e12, 3.35e12, 450e9, 50e9),
        Gpu("h200-141", int(139.8 * GIB), 989e12, 4.8e12, 450e9, 50e9),
        Gpu("b200-180", int(178.0 * GIB), 2250e12, 7.7e12, 900e9, 50e9),
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises ConfigError for one that is not in the table."""
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--gpu is {name!r}, which is not in the planner's table{hint or '.'} It has {', '.join(GPUS)}")


# Words of device names as the driver gives them → figures above. Other boards of the same chip (PCIe, NVL) are slower,
# and a part of a GPU (MIG) has a part of them.
DEVICES = {
    ("A100", "40GB"): "a100-40", ("A100", "80GB"): "a100-80", ("L40S",): "l40s-48", ("H100", "HBM3"): "h100-80",
    ("H200",): "h200-141", ("B200",): "b200-180",
}  # fmt: skip


def gpu_of(device_name: str) -> Gpu | None:
    """A device by the name that the driver gives it (`torch.cuda.get_device_name`); None for one that is not known."""
    words = set(re.split(r"[\s-]+", device_name))
    if words & {"MIG", "NVL"}:
        return None
    return next((GPUS[name] for wanted, name in DEVICES.items() if words.issuperset(wanted)), None)
