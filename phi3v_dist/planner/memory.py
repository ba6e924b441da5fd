"""A timeline and ZeRO-3's share → bytes on one GPU at the worst moment, by cause.

What comes in: what the model keeps (`row.py`), what DeepSpeed adds (`zero_share.py`, `gathering.py`). What goes out: a
`Memory`. Surprise: two moments compete, the backward pass and the optimizer's step; with short slices of a row it is
the step, which no trace of a forward and backward pass would show.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from phi3v_dist.config import ModelSettings, TrainSettings
from phi3v_dist.model.mlp import FeedForward
from phi3v_dist.model.official_config import head_dim
from phi3v_dist.model.vision import clip_config
from phi3v_dist.planner import unroll
from phi3v_dist.planner.gathering import Weight, replay
from phi3v_dist.planner.row import build, shallow
from phi3v_dist.planner.trace import CAUSES, Timeline, zero_modules
from phi3v_dist.planner.zero_share import ZeroShare

GIB, MIB = 2**30, 2**20
# What no trace sees. Not measured here: the first by NVIDIA's and NCCL's habit, the second is PyTorch's default on
# Hopper (CUDA semantics, "cuBLAS workspaces"), the third FlashAttention 2's fp32 dq (heads padded to 32), the last a
# share of all that comes and goes.
CONTEXT_BYTES = int(1.5 * GIB)
CUBLAS_BYTES = 32 * MIB
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Memory:
    """causes: bytes at the worst moment, by name. when: that moment. host: bytes of the node's memory, for this rank.
    traced: of `causes`, what a run on a CPU would measure."""

    causes: dict[str, int]
    when: str
    host: int
    traced: int
    gathered_elements: int = 0

    @property
    def total(self) -> int:
        return sum(self.causes.values())


Owners = dict[str, tuple[Weight, ...]]


def owners(config: dict[str, Any], model: ModelSettings, train: TrainSettings) -> Owners:
    """The weights that each module holds itself, in all layers."""
    made = build(shallow(config), model, train, torch.bfloat16, FakeTensorMode())
    found: Owners = {}
    for name, module in zero_modules(made):
        whole = isinstance(module, FeedForward)
        own = tuple(
            Weight(f"{name}.{each}".lstrip("."), parameter.numel(), parameter.requires_grad)
            for each, parameter in module.named_parameters(recurse=whole)
        )
        if own:
            found[name] = own
    for stack, number in (
        (unroll.TOWER, clip_config(config).num_hidden_layers - 1), (unroll.DECODER, config["num_hidden_layers"])
    ):  # fmt: skip
        middle = {name: own for name, own in found.items() if name.startswith(f"{stack}.1.") or name == f"{stack}.1"}
        for layer in range(unroll.TRACED, number):
            for name, own in middle.items():
                there = name.replace(f"{stack}.1", f"{stack}.{layer}", 1)
                found[there] = tuple(
                    Weight(w.name.replace(f"{stack}.1", f"{stack}.{layer}", 1), w.elements, w.trained) for w in own
                )
    return found


def memory(timeline: Timeline, held_by: Owners, share: ZeroShare, unseen: dict[str, int]) -> Memory:
    """What the worst moment takes.

    Args:
        unseen: named terms beside all that can be traced; see `unseen_terms`.
    """
    held = replay(timeline.keys, held_by, share.limits)
    inside, at_hook = timeline.most.sum(1) + held.after, timeline.live.sum(1) + held.during
    place = int(inside.argmax()) if inside.max() >= at_hook.max() else int(at_hook.argmax())
    from_hook = at_hook[place] >= inside[place]
    parts = (timeline.live if from_hook else timeline.most)[place]
    gathered = int((held.during if from_hook else held.after)[place])
    kind, name = timeline.keys[place]
    causes = {
        "weights": share.weights,
        "gradients": share.gradients,
        "optimizer": share.optimizer,
        "buckets": share.buckets,
    }
    resident = sum(causes.values())
    passes = {**dict(zip(CAUSES, map(int, parts), strict=True)), "gathered": gathered}
    passes["gradients under way"] = passes.pop("gradients")
    persistent = int(held.after[0])
    at_rest = int(timeline.live[1].sum())
    step = {"optimizer step": share.step, "gathered": persistent, "row and embeddings": at_rest}
    worst, when = (passes, f"{kind.replace('_', ' ')} {name}") if sum(passes.values()) >= sum(step.values()) else (
        step, "the optimizer's step")  # fmt: skip
    moving = sum(worst.values())
    found = {name: size for name, size in (causes | worst).items() if size > 0}
    loose = {"fragmentation": int(FRAGMENTATION * moving)} if unseen else {}
    host = share.host + int(timeline.host.max())
    return Memory(found | unseen | loose, when, host, resident + moving, held.gathered_elements)


def unseen_terms(config: dict[str, Any], tokens: int) -> dict[str, int]:
    """On a GPU, for a slice of so many tokens."""
    padded = -(-head_dim(config) // 32) * 32
    return {
        "CUDA context, NCCL": CONTEXT_BYTES,
        "cuBLAS workspace": CUBLAS_BYTES,
        "FlashAttention's dq": 4 * config["num_attention_heads"] * padded * tokens,
    }
