"""The `zero_optimization` section of a DeepSpeed JSON → what of it does not work, or not with our checkpoints.

What comes in: the section as it is written. What goes out: messages, each with the reason, which ds_configs/README.md
has as a table. Surprise: DeepSpeed accepts most of this, and then trains to other losses, loses state in a checkpoint,
or waits for ever while it compiles.
"""

from pathlib import Path
from typing import Any

from phi3v_dist.attempt.build_cache import is_built

Section = dict[str, Any]

QUANTIZED = "it rounds what ranks exchange to 8 bits or less, which changes the losses, and no CPU can run it as a test"
REFUSED = {  # unless they are off
    "zero_quantized_weights": QUANTIZED,
    "zero_quantized_gradients": QUANTIZED,
    "zero_quantized_nontrainable_weights": QUANTIZED,
    "zenflow": "its updates come late, which changes the losses, and no checkpoint holds its state",
    "mics_shard_size": "DeepSpeed 0.19 has no MiCS any more; ds_configs/zero3_hpz.json keeps gathers inside a node",
    "cpu_offload": "write `offload_optimizer`",
    "cpu_offload_param": "write `offload_param`",
}
NOT_SAVED = ("super_offload", "pipeline_read", "pipeline_write", "fast_init")  # of an optimizer on the host or a disk
AIO_OP = "async_io"  # what DeepSpeed reads and writes an NVMe with; compiled from source


def problems(zero: Section, world_size: int, ranks_per_node: int, nvme: Path | None) -> list[str]:
    """One message for each; `nvme` is `parallel.nvme`."""
    found = []
    if zero.get("stage") != 3:
        found.append(
            f"`zero_optimization.stage` is {zero.get('stage')}; this harness shards weights, and its checkpoints are "
            "made of those shards, so it must be 3"
        )
    for key, why in REFUSED.items():
        if zero.get(key) not in (None, False, -1):
            found.append(f"`zero_optimization.{key}` is {zero[key]}; leave it out: {why}")
    return found + _hpz_problems(zero, world_size, ranks_per_node) + _offload_problems(zero, nvme)


def offload(zero: Section, name: str) -> Section:
    """`offload_optimizer` or `offload_param`; empty when it is not there."""
    return zero[name] if isinstance(zero.get(name), dict) else {}


def device(zero: Section, name: str) -> str:
    return str(offload(zero, name).get("device", "none"))


def scattered(everyone: list[tuple[str, int]]) -> str:
    """Why hpZ's groups, so many consecutive ranks each, are not each on one node; empty when they are.

    everyone: host and size of the group, of each rank. Sizes differ where "auto" found nodes of several sizes.
    """
    hosts, sizes = zip(*everyone, strict=True)
    size = sizes[0]
    groups = [hosts[begin : begin + size] for begin in range(0, len(hosts), size)]
    if len(set(sizes)) == 1 and all(len(set(group)) == 1 for group in groups):
        return ""
    counts = ", ".join(f"{host}: {hosts.count(host)}" for host in dict.fromkeys(hosts))
    found = " or ".join(map(str, sorted(set(sizes))))
    return (
        f"`zero_optimization.zero_hpz_partition_size` is {found}, but that many ranks in a row are not always on one "
        f"node (ranks by node: {counts}). Give every node as many ranks, those of a node next to each other "
        "(srun --distribution=block), or take ds_configs/zero3.json"
    )


def _hpz_problems(zero: Section, world_size: int, ranks_per_node: int) -> list[str]:
    key, size = "`zero_optimization.zero_hpz_partition_size`", zero.get("zero_hpz_partition_size", 1)
    size = ranks_per_node if size == "auto" else size
    if not isinstance(size, int) or size < 1 or world_size % size:
        return [
            f"{key} is {size}, which does not divide {world_size} ranks: give every node as many ranks, or take "
            "ds_configs/zero3.json"
        ]
    if ranks_per_node % size:
        return [f'{key} is {size}, but a node has {ranks_per_node} ranks, so groups would span nodes: write "auto"']
    if size > 1 and device(zero, "offload_param") != "none":
        return [f"{key} and `offload_param`: the node's copy of the weights would be on the host, so leave one out"]
    return []


def _offload_problems(zero: Section, nvme: Path | None) -> list[str]:
    key, optimizer, found = "`zero_optimization.offload_", offload(zero, "offload_optimizer"), []
    if device(zero, "offload_optimizer") not in ("none", "cpu", "nvme"):
        found.append(f"{key}optimizer.device` is {optimizer['device']}; it can be none, cpu or nvme")
    if device(zero, "offload_param") not in ("none", "cpu"):
        found.append(
            f"{key}param.device` is {device(zero, 'offload_param')}; it can be none or cpu: no checkpoint of ours "
            "holds weights on NVMe"
        )
    given = {name: optimizer[name] for name in NOT_SAVED if optimizer.get(name)}
    given |= {"ratio": optimizer["ratio"]} if optimizer.get("ratio", 1) != 1 else {}
    for name, value in given.items():
        found.append(f"{key}optimizer.{name}` is {value}; leave it out: no checkpoint of ours holds its state")
    if device(zero, "offload_param") != "none" and device(zero, "offload_optimizer") == "none":
        found.append(f"{key}param` needs `offload_optimizer`, else every update goes to the GPU and back")
    return found + (_nvme_problems(optimizer, nvme) if device(zero, "offload_optimizer") == "nvme" else [])


def _nvme_problems(optimizer: Section, nvme: Path | None) -> list[str]:
    key, found = "`zero_optimization.offload_optimizer", []
    if "nvme_path" not in optimizer:
        found.append(f'{key}.nvme_path` is missing: write "auto", and set `parallel.nvme`')
    elif optimizer["nvme_path"] == "auto" and nvme is None:
        found.append(f"{key}.nvme_path` is auto: set `parallel.nvme` to a folder on each node's own disk")
    if not is_built(AIO_OP):
        found.append(
            f"{key}.device` is nvme, which needs DeepSpeed's `{AIO_OP}`, and that is not built here. Once on each "
            "node, before ranks start, with libaio's headers installed (libaio-dev): "
            f"python -m phi3v_dist.attempt.build_cache {AIO_OP}"
        )
    return found
