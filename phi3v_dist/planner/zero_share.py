"""A ds_config and a number of ranks → what DeepSpeed holds on one of them, by cause.

What comes in: the parameters of the model, the ds_config as `zero.resolve` gives it. What goes out: bytes on the GPU
and in host memory. Surprise: `reduce_bucket_size` is allocated in full whatever is in it, 0.93 GiB with DeepSpeed's own
default, and torch's AdamW takes 12 bytes more for each parameter of a rank while it works.

The terms are those of PLANNER.md §4, as DeepSpeed 0.19.8 allocates them; tests compare them with the engine itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phi3v_dist import versions
from phi3v_dist.planner.gathering import Limits, Weight

FP32 = 4
# DeepSpeed's own values where a ds_config says nothing (runtime/zero/config.py, 0.19.8); elements.
DEFAULTS = {
    "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 5e7, "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9, "sub_group_size": 1e9,
}  # fmt: skip


@dataclass(frozen=True)
class ZeroShare:
    """Bytes of one rank.

    step: beside the resident terms, while the optimizer works. host: in the memory of the node, for this rank.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    step: int
    host: int
    limits: Limits

    @property
    def resident(self) -> int:
        """Held all the time."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def zero_share(weights: Sequence[Weight], ds_config: dict[str, Any], ranks: int, itemsize: int) -> ZeroShare:
    """Of a model with these parameters, in elements of `itemsize` bytes.

    Raises:
        ConfigError: another DeepSpeed is installed, which may hold and gather something else.
    """
    versions.require("deepspeed")
    zero = ds_config["zero_optimization"]
    number = {key: int(zero.get(key, default)) for key, default in DEFAULTS.items()}
    own = sum(math.ceil(w.elements / ranks) for w in weights)
    trained = sum(math.ceil(w.elements / ranks) for w in weights if w.trained)
    offload_weights, offload_optimizer = is_offloaded(zero, "offload_param"), is_offloaded(zero, "offload_optimizer")
    master = FP32 * trained
    states = 2 * FP32 * trained
    group = min(trained, number["sub_group_size"] + max((math.ceil(w.elements / ranks) for w in weights), default=0))
    hierarchy = int(zero.get("zero_hpz_partition_size", 1))
    secondary = itemsize * sum(math.ceil(w.elements / hierarchy) for w in weights) if hierarchy > 1 else 0
    held = {"weights": itemsize * own, "gradients": itemsize * trained, "optimizer": master + states}
    host = 0
    if offload_optimizer:
        host += held.pop("optimizer") + held.pop("gradients") + FP32 * trained  # an fp32 gradient for the CPU's Adam
    if offload_weights:
        host += held.pop("weights")
    step = 0 if offload_optimizer else 3 * FP32 * group
    limits = Limits(
        ranks=ranks, itemsize=itemsize, prefetch_bucket=number["stage3_prefetch_bucket_size"],
        max_live=number["stage3_max_live_parameters"], max_reuse_distance=number["stage3_max_reuse_distance"],
        persistence_threshold=number["stage3_param_persistence_threshold"],
        reduce_bucket=number["reduce_bucket_size"],
    )  # fmt: skip
    return ZeroShare(
        held.get("weights", 0) + secondary, held.get("gradients", 0), held.get("optimizer", 0),
        itemsize * number["reduce_bucket_size"], step, host, limits,
    )  # fmt: skip


def is_offloaded(zero: dict[str, Any], what: str) -> bool:
    """Whether a section of a ds_config leads elsewhere than to the GPU."""
    section = zero.get(what) or {}
    return section.get("device", "none") != "none"
