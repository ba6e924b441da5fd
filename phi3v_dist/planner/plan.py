"""Settings and a cluster → a `Plan`: what a step takes and costs, whether it fits, and what to change if not.

What comes in: `Settings`, a `Cluster`, the row that stands for all. What goes out: a `Plan`, as JSON or as lines.
Surprise: advice is computed like the answer itself. Each change is tried, cheapest first, until the row fits.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from phi3v_dist import resources
from phi3v_dist.config import Settings
from phi3v_dist.errors import ConfigError
from phi3v_dist.model import build as model_build
from phi3v_dist.model.official_config import read_config
from phi3v_dist.parallel import zero
from phi3v_dist.parallel.ulysses import group_sizes
from phi3v_dist.planner.cost import Cluster, Cost, cost
from phi3v_dist.planner.gpus import EFFICIENCY
from phi3v_dist.planner.memory import GIB, Memory, memory, owners, unseen_terms
from phi3v_dist.planner.row import RowShape, timeline
from phi3v_dist.planner.zero_share import zero_share
from phi3v_dist.survive.interval import about

Changes = dict[str, Any]  # key=value of the settings
LEAN = "zero3_lean.json"
SMALLER_FILES = {  # of ds_configs, the cheapest first
    LEAN: "fewer weights gathered ahead, the optimizer in pieces",
    "zero3_offload.json": "the optimizer in host memory",
    "zero3_offload_all.json": "weights and optimizer in host memory",
}


@dataclass(frozen=True)
class Plan:
    """One answer. changes: the first of the cheapest ones with which it fits; None: it fits, () none of them helps."""

    row: RowShape
    cluster: Cluster
    sequence: int
    rows_per_step: int
    efficiency: float
    row_is: str
    parameters: int
    trained: int
    memory: Memory
    cost: Cost
    fits: bool
    changes: tuple[str, ...] | None = None

    def to_json(self) -> str:
        """One object; bytes and seconds."""
        tree = asdict(self) | {"memory": asdict(self.memory) | {"total": self.memory.total}}
        tree["row"] = {"tokens": self.row.tokens, "documents": len(self.row.documents), "images": len(self.row.images),
                       "crops": self.row.crops, "label_tokens": self.row.label_tokens,
                       "is": tree.pop("row_is")}  # fmt: skip
        tree["usable_bytes"] = self.cluster.gpu.usable_bytes
        return json.dumps(tree)

    @property
    def word(self) -> str:
        """In one line."""
        gpu = self.cluster.gpu
        verdict = "fits" if self.fits else "DOES NOT FIT: " + (", then ".join(self.changes or ()) or "shorten the row")
        need, have = (size / GIB for size in (self.memory.total, gpu.usable_bytes))
        return (
            f"plan     {need:.1f} GiB of {have:.1f} usable on a {gpu.name}: {verdict}; about {self.cost.step_s:.1f} s "
            f"a step at {self.efficiency:.0%}"
        )

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        row, cost, gpu, cluster = self.row, self.cost, self.cluster.gpu, self.cluster
        rows = self.rows_per_step
        yield (
            f"plan     {cluster.nodes} x {cluster.gpus_per_node} {gpu.name} · {self.parameters:,} parameters, "
            f"{self.trained:,} trained · sequence {self.sequence}"
        )
        yield (
            f"step     {rows} rows, each {self.row_is}: {rows * row.tokens:,} tokens, {rows * len(row.images):,} images"
            f", {rows * row.crops:,} crops; {cost.micro_steps} micro-step(s)"
        )
        yield f"memory   of one GPU at the worst moment ({self.memory.when}), GiB"
        for name, size in sorted(self.memory.causes.items(), key=lambda item: -item[1]):
            yield f"         {size / GIB:8.2f}  {name}"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        yield f"         {self.memory.total / GIB:8.2f}  in all: {verdict} into {gpu.usable_bytes / GIB:.1f} usable"
        if self.memory.host:
            yield f"         {self.memory.host * cluster.gpus_per_node / GIB:8.2f}  of each node's memory, offloaded"
        if self.changes:
            yield "change   cheapest first, until it fits: " + ", then ".join(self.changes)
        elif self.changes is not None:
            yield "change   nothing that the planner can try makes it fit: shorten data.row_length_tokens or add nodes"
        yield (
            f"work     {cost.flops_causal / 1e15:.2f} PFLOP a step (attention causal), {cost.flops_full / 1e15:.2f} "
            "(full squares); recomputing not counted"
        )
        yield (
            f"time     {cost.step_s:.2f} s a step, {cost.tokens_per_s:,.0f} tokens/s, IF {self.efficiency:.0%} of "
            f"{gpu.flops / 1e12:.0f} TFLOP/s are reached (causal); never measured for this model"
        )
        if cost.epoch_h is not None and cost.gpu_h is not None:
            yield f"epoch    {cost.epoch_h:,.2f} h, {cost.gpu_h:,.1f} GPU-hours"
        word = "the network IS the limit" if cost.network_limits else "not the limit"
        yield (
            f"network  each GPU receives {cost.gather_bytes / 1e9:.1f} GB of weights, {cost.reduce_bytes / 1e9:.1f} of "
            f"gradients, {cost.alltoall_bytes / 1e9:.1f} of slices a step: {cost.network_s:.2f} s, {word}"
        )
        yield (
            f"saves    {cost.checkpoint_bytes / 1e9:.1f} GB, written in {about(cost.save_s)}; best every "
            f"{about(cost.interval_s)}: {cost.interval_why}"
        )


def make_plan(
    settings: Settings, cluster: Cluster, row: RowShape, row_is: str, efficiency: float = EFFICIENCY,
    epoch_rows: int | None = None, advise: bool = True,
) -> Plan:  # fmt: skip
    """The answer for these settings.

    Args:
        row: a whole row. row_is: what it stands for, in words. epoch_rows: of one pass over the data, if known.

    Raises:
        ConfigError: the cluster cannot run it at all.
    """
    found = _plan(settings, cluster, row, row_is, efficiency, epoch_rows)
    if found.fits or not advise:
        return found
    return replace(found, changes=_advice(settings, cluster, row))


def require_possible(settings: Settings, cluster: Cluster) -> None:
    """Raises ConfigError with all reasons why no such run can be: those that a run itself gives."""
    wrong = model_build.size_problems(settings) + zero.problems(settings, cluster.ranks)
    if wrong:
        raise ConfigError(wrong)


def _plan(
    settings: Settings, cluster: Cluster, row: RowShape, row_is: str, efficiency: float, epoch_rows: int | None
) -> Plan:
    require_possible(settings, cluster)
    config = read_config(settings.model.path)
    dtype = torch.float32 if settings.model.dtype == "fp32" else torch.bfloat16
    ds_config = zero.resolve(settings, cluster.ranks, dtype, config["hidden_size"], cluster.gpus_per_node)
    held_by = owners(config, settings.model, settings.train)
    weights = [weight for own in held_by.values() for weight in own]
    share = zero_share(weights, ds_config, cluster.ranks, dtype.itemsize)
    sequence = settings.parallel.sequence
    recorded = timeline(config, settings.model, settings.train, row, dtype, sequence)
    found = memory(recorded, held_by, share, unseen_terms(config, -(-row.tokens // sequence)))
    trained = sum(weight.elements for weight in weights if weight.trained)
    costs = cost(
        settings, config, cluster, row, itemsize=dtype.itemsize, trained=trained,
        gathered_elements=found.gathered_elements, efficiency=efficiency, epoch_rows=epoch_rows,
    )  # fmt: skip
    return Plan(
        row, cluster, sequence, settings.train.rows_per_step, efficiency, row_is,
        sum(weight.elements for weight in weights), trained, found, costs,
        fits=found.total <= cluster.gpu.usable_bytes,
    )  # fmt: skip


def trained_parameters(config: dict[str, Any], settings: Settings) -> int:
    """Their number."""
    held_by = owners(config, settings.model, settings.train)
    return sum(weight.elements for own in held_by.values() for weight in own if weight.trained)


def changed(settings: Settings, changes: Changes) -> Settings:
    """Other settings: keys with dots, as on the command line."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        part = getattr(settings, section).model_copy(update={name: value})
        settings = settings.model_copy(update={section: part})
    return settings


def sharing(config: dict[str, Any], cluster: Cluster) -> list[int]:
    """How many ranks may share a row there, all of them on one node, where exchanges are fast."""
    heads = config["num_attention_heads"]
    sizes = group_sizes(heads, config.get("num_key_value_heads", heads))
    return [size for size in sizes if cluster.gpus_per_node % size == 0]


def smaller_files(current: Path) -> list[Path]:
    """The files beside this one, or those that ship, that keep less on a GPU, the cheapest first."""
    names = list(SMALLER_FILES)
    begin = names.index(current.name) + 1 if current.name in names else 0
    return [path for path in map(current.with_name, names[begin:]) if resources.find(path, "ds_configs").is_file()]


def ladder(settings: Settings, config: dict[str, Any], cluster: Cluster) -> Iterator[tuple[str, Changes]]:
    """Changes that save memory, the cheapest first, and how each is said."""
    model = settings.model
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", {"model.gradient_checkpointing": True}
    if model.mlp_chunk_tokens is None:
        yield "model.mlp_chunk_tokens=4096", {"model.mlp_chunk_tokens": 4096}
    if model.vision_chunk_crops > 8:
        yield "model.vision_chunk_crops=8", {"model.vision_chunk_crops": 8}
    files = [
        (f"parallel.deepspeed={path} ({SMALLER_FILES[path.name]})", {"parallel.deepspeed": path})
        for path in smaller_files(settings.parallel.deepspeed)
    ]
    lean = [rung for rung in files if rung[1]["parallel.deepspeed"].name == LEAN]
    yield from lean
    for sequence in sharing(config, cluster):
        if sequence > settings.parallel.sequence:
            yield f"parallel.sequence={sequence}", {"parallel.sequence": sequence}
    if not model.offload_activations:
        yield "model.offload_activations=true", {"model.offload_activations": True}
    yield from (rung for rung in files if rung not in lean)


def _advice(settings: Settings, cluster: Cluster, row: RowShape) -> tuple[str, ...]:
    """The rungs of the ladder up to the first at which it fits; none when it never does."""
    config = read_config(settings.model.path)
    said: dict[str, str] = {}
    for words, changes in ladder(settings, config, cluster):
        settings = changed(settings, changes)
        said |= {next(iter(changes)): words}  # a larger sequence replaces a smaller one
        if _plan(settings, cluster, row, "", EFFICIENCY, None).fits:
            return tuple(said.values())
    return ()
