"""One optimizer step: Batches in, `StepResult` out.

What comes in: one planned step and this rank's Batches of it, which may still be on their way. What goes out: numbers
already summed over all ranks.
Surprise: the loss is the sum over label tokens divided by the label tokens of the *whole* step. ZeRO-3 divides
gradients by the world size, so each micro-step's sum is multiplied by world / planned tokens and nothing else is
scaled; ranks, accumulation and packing then cannot change the result beyond the order of a sum.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from phi3v_dist.data.batch import Batch, Filling
from phi3v_dist.data.plan import PlannedStep
from phi3v_dist.errors import DivergedError
from phi3v_dist.parallel.topology import Topology


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks.

    loss: mean over label tokens, in nats. grad_norm: before clipping.
    label_tokens: really trained; fewer than planned when samples were quarantined. At 0 the loss is NaN and the weights
        stay as they were.
    tokens: of all rows, without filling. padding_frac: share of the rows' capacity left empty.
    seconds: by part of the step (data, fwd, bwd, opt), this rank's clock.
    data_wait_s: what training waited for data, mean over ranks.
    left_out: the quarantined samples, of this rank only.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rates: dict[str, float]
    label_tokens: int
    tokens: int
    images: int
    samples: int
    quarantined: int
    sample_ids: tuple[int, ...]
    rows: int
    seconds: dict[str, float] = field(default_factory=dict)
    data_wait_s: float = 0.0
    left_out: tuple[Filling, ...] = ()

    @property
    def unused(self) -> list[tuple[int, str]]:
        """Id and reason of each sample that this rank could not use."""
        return [(part.sample_id, part.reason) for part in self.left_out if part.sample_id is not None]


def train_step(
    engine: Any, plan: PlannedStep, batches: Iterable[Batch], rates: dict[str, float], topology: Topology
) -> StepResult:
    """Forward and backward of each Batch as it comes, then one update; none when every sample was quarantined.

    Raises:
        DivergedError: the loss is not finite; the weights are then unchanged.
    """
    seconds = {"data": 0.0, "fwd": 0.0, "bwd": 0.0, "opt": 0.0}
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)  # read once, so that no micro-step waits
    label_tokens = images = 0
    left_out: list[Filling] = []
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["part"]]
    for batch in _timed(batches, seconds):
        began = time.perf_counter()
        losses = engine(**batch.inputs(engine.device)).token_losses.sum()
        forward = time.perf_counter()
        engine.backward(losses * (topology.world_size / plan.label_tokens), scale_wrt_gas=False)
        loss_sum += losses.detach()
        seconds["fwd"] += forward - began
        seconds["bwd"] += time.perf_counter() - forward
        label_tokens += batch.label_tokens
        images += len(batch.image_sizes)
        left_out += batch.quarantined
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    began = time.perf_counter()
    loss, labels, pictures, quarantined, waited_s = topology.sum(
        [loss_sum.item(), float(label_tokens), float(images), float(len(left_out)), seconds["data"]]
    )
    _update(engine, plan, loss, int(labels))
    seconds["opt"] = time.perf_counter() - began
    return StepResult(
        step=plan.number, loss=loss / labels if labels else math.nan, grad_norm=float(engine.get_global_grad_norm()),
        learning_rates=rates, label_tokens=int(labels), tokens=plan.tokens, images=int(pictures),
        samples=len(plan.sample_ids), quarantined=int(quarantined), sample_ids=plan.sample_ids, rows=len(plan.rows),
        seconds=seconds, data_wait_s=waited_s / topology.world_size, left_out=tuple(left_out),
    )  # fmt: skip


def _timed(batches: Iterable[Batch], seconds: dict[str, float]) -> Iterator[Batch]:
    """Each Batch as it comes; what training waits for them is added to `seconds`."""
    began = time.perf_counter()
    for batch in batches:
        seconds["data"] += time.perf_counter() - began
        yield batch
        began = time.perf_counter()


def _update(engine: Any, plan: PlannedStep, loss_sum: float, label_tokens: int) -> None:
    """The boundary step. Gradients were divided by the planned tokens; the loss scale makes up for quarantined ones.

    Without a label token all gradients are 0. The engine must take its step all the same, on every rank; at a learning
    rate of 0 neither gradients nor weight decay can change a weight.
    """
    if not math.isfinite(loss_sum):
        raise DivergedError(
            f"step {plan.number}: the loss is {loss_sum}. Samples of the step: {list(plan.sample_ids)[:20]}. "
            "Lower `train.learning_rate` or raise `train.warmup_steps`, and start again from the last checkpoint"
        )
    if label_tokens == 0:
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
    elif label_tokens != plan.label_tokens:
        engine.optimizer.loss_scale = label_tokens / plan.label_tokens
    engine.step()
    engine.optimizer.loss_scale = 1.0
