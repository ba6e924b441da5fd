"""A step's work and a cluster → seconds, network bytes, GPU-hours, and when to save.

What comes in: the row that stands for all, the settings, the GPUs. What goes out: a `Cost`. Surprise: FLOPs have two
conventions. "causal" counts the half of each document's square that is computed; "full" counts all of it, as many
published figures do. Time follows the causal count, at an efficiency that is stated, not known.
"""

from dataclasses import dataclass, replace
from typing import Any

from phi3v_dist.config import Settings
from phi3v_dist.data.plan import PlannedRow, accumulation
from phi3v_dist.model.flops import flops
from phi3v_dist.model.official_config import head_dim
from phi3v_dist.planner.gpus import EFFICIENCY, Gpu
from phi3v_dist.planner.row import RowShape
from phi3v_dist.survive.interval import choose

HOST_COPY_BANDWIDTH = 25e9  # bytes a second from a GPU to pinned memory: half of what PCIe 4 x16 and 5 x8 have
CHECKPOINT_BYTES = 12  # for each trained parameter: fp32 master and Adam's two moments


@dataclass(frozen=True)
class Cluster:
    """nodes: of gpus_per_node GPUs each, all alike."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Cost:
    """Of an optimizer step of the whole job, unless the name says another thing. Times in seconds.

    flops_causal, flops_full: useful work, without recomputing. gather_bytes … alltoall_bytes: what one GPU receives.
    epoch_h, gpu_h: None where the data is not known.
    """

    micro_steps: int
    flops_causal: int
    flops_full: int
    step_s: float
    tokens_per_s: float
    epoch_h: float | None
    gpu_h: float | None
    gather_bytes: int
    reduce_bytes: int
    alltoall_bytes: int
    network_s: float
    network_limits: bool
    checkpoint_bytes: int
    save_s: float
    blocked_s: float
    interval_s: float
    interval_why: str


def cost(
    settings: Settings, config: dict[str, Any], cluster: Cluster, row: RowShape, *, itemsize: int, trained: int,
    gathered_elements: int, efficiency: float = EFFICIENCY, epoch_rows: int | None = None,
) -> Cost:  # fmt: skip
    """What a step takes.

    Args:
        row: the whole row, before it is cut into slices. trained: parameters.
        gathered_elements: of all gathers in one forward and backward pass. epoch_rows: rows of one pass over the data.
    """
    train, sequence = settings.train, settings.parallel.sequence
    micro_steps = accumulation(train.rows_per_step, max(1, cluster.ranks // sequence))
    squares = sum(length**2 for length in row.documents)
    planned = PlannedRow((0,), row.tokens, squares, row.label_tokens, row.crops)
    work = flops(config, train.parts)
    causal = work.of_row(planned)
    full = replace(work, per_squared_token=2 * work.per_squared_token).of_row(planned)
    compute_s = micro_steps * causal / sequence / (cluster.gpu.flops * efficiency)
    ranks = cluster.ranks
    share = (ranks - 1) / ranks
    gather = int(micro_steps * gathered_elements * itemsize * share)
    reduce = int(micro_steps * trained * itemsize * share)
    passes = 3 if settings.model.gradient_checkpointing else 2
    width = 2 * (config["num_attention_heads"] + config.get("num_key_value_heads", config["num_attention_heads"]))
    one_layer = width * head_dim(config) * row.tokens / sequence * itemsize * (sequence - 1) / sequence
    alltoall = int(micro_steps * passes * config["num_hidden_layers"] * one_layer)
    slowest = cluster.gpu.node_bandwidth if cluster.nodes == 1 else cluster.gpu.network_bandwidth
    group = cluster.gpu.node_bandwidth if sequence <= cluster.gpus_per_node else slowest
    network_s = (gather + reduce) / slowest + alltoall / group
    # Gathers run beside the computing; exchanges of a row's slices are waited for.
    step_s = max(compute_s, (gather + reduce) / slowest) + alltoall / group
    steps = epoch_rows / train.rows_per_step if epoch_rows else None
    checkpoint = CHECKPOINT_BYTES * trained
    own = checkpoint / ranks
    speed = settings.checkpoint.write_mb_per_s
    save_s = own / (speed * 1e6) if speed else 0.0
    blocked_s = own / HOST_COPY_BANDWIDTH
    between_failures_s = settings.checkpoint.node_hours_between_failures * 3600 / cluster.nodes
    best = choose(blocked_s, save_s, between_failures_s)
    return Cost(
        micro_steps=micro_steps, flops_causal=causal * train.rows_per_step, flops_full=full * train.rows_per_step,
        step_s=step_s, tokens_per_s=train.rows_per_step * row.tokens / step_s,
        epoch_h=steps * step_s / 3600 if steps else None, gpu_h=steps * step_s / 3600 * ranks if steps else None,
        gather_bytes=gather, reduce_bytes=reduce, alltoall_bytes=alltoall, network_s=network_s,
        network_limits=(gather + reduce) / slowest > compute_s, checkpoint_bytes=checkpoint, save_s=save_s,
        blocked_s=blocked_s, interval_s=best.interval_s, interval_why=best.why,
    )  # fmt: skip
