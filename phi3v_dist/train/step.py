"""One optimizer step: Batches in, `StepResult` out.

What comes in: one planned step and this rank's Batches of it, which may still be on their way. What goes out: numbers
already summed over all ranks.
Surprise: the loss is the sum over label tokens divided by the label tokens of the *whole* step. ZeRO-3 divides
gradients by the world size, so each micro-step's sum is multiplied by world / planned tokens and nothing else is
scaled; ranks, accumulation and packing then cannot change the result beyond the order of a sum.

A step makes no update when it has no label token, or when a loss or gradient is not finite: all ranks then leave it out
together, and weights, moments and counts of updates stay as they were, to the bit.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from phi3v_dist.data.batch import Batch, Filling
from phi3v_dist.data.plan import PlannedStep
from phi3v_dist.errors import OutOfMemoryError, OutOfStepError
from phi3v_dist.invocation import as_typed
from phi3v_dist.parallel import partitions
from phi3v_dist.parallel.local_gradients import LocalGradients
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.parallel.waits import WAITS
from phi3v_dist.train.laps import OF_STEP, Laps
from phi3v_dist.watch import heartbeat

GIB = 2**30
NO_LABELS = "it has no label token"


@dataclass(frozen=True)
class RankStep:
    """What one rank alone did of a step. Its times leave out waiting for other ranks, so no other rank's pace hides
    them; seconds. loss: mean over its own label tokens, NaN when it has none."""

    data_s: float = 0.0
    compute_s: float = 0.0
    wait_s: float = 0.0
    loss: float = math.nan


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks.

    loss: mean over label tokens, in nats; NaN when there is none. grad_norm: before clipping;
        infinite when it is not finite.
    label_tokens: really trained; fewer than planned when samples were quarantined.
    tokens: of all rows, without filling. padding_frac: share of the rows' capacity left empty.
    seconds: by part of the step (data, fwd, bwd, opt), this rank's clock.
    data_wait_s: what training waited for data, mean over ranks.
    image_tokens: of `tokens`, those that stand for pictures.
    left_out: the quarantined samples, of this rank only.
    skipped: why the step made no update; None: it made one.
    not_finite_on: the ranks on which a loss or gradient that is not finite began; empty while all are finite.
    own: what this rank alone did.
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
    skipped: str | None = None
    not_finite_on: tuple[str, ...] = ()
    image_tokens: int = 0
    own: RankStep = RankStep()

    @property
    def unused(self) -> list[tuple[int, str]]:
        """Id and reason of each sample that this rank could not use."""
        return [(part.sample_id, part.reason) for part in self.left_out if part.sample_id is not None]


def train_step(
    engine: Any, plan: PlannedStep, batches: Iterable[Batch], rates: dict[str, float], topology: Topology,
    gradients: LocalGradients | None = None, laps: Laps | None = None,
) -> StepResult:  # fmt: skip
    """Forward and backward of each Batch as it comes, then one update, or none by all ranks.

    Args:
        gradients: says of a gradient that is not finite on which ranks it began; None: that is not known.
        laps: where the step's time is written down; None: nobody asks for more than the result.

    Raises:
        OutOfMemoryError: the accelerator's memory is full.
        OutOfStepError: this rank has fewer Batches than the step has micro-steps, or ranks work on different steps.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["part"]]
    if gradients:
        gradients.begin()
    laps = laps or Laps(engine.device)
    own = _Own(torch.zeros((), dtype=torch.float64, device=engine.device))
    WAITS.take_s()
    try:
        _micro_steps(engine, plan, batches, topology, own, laps)
        heartbeat.enter("optimizer", plan.number, work=plan.tokens)  # on a GPU it waits for the whole step
        own_loss = own.loss_sum.item()
        with WAITS.waiting():
            loss, labels, pictures, image_tokens, quarantined, waited_s, numbers, squares = topology.sum(
                [own_loss, float(own.label_tokens), float(own.images), float(own.image_tokens),
                 float(len(own.left_out)), laps.seconds()["data"], float(plan.number), float(plan.number**2)]
            )  # fmt: skip
        if (numbers, squares) != (plan.number * topology.world_size, plan.number**2 * topology.world_size):
            raise OutOfStepError(_steps_differ(topology, plan.number))
        skipped = _update(engine, plan, loss, int(labels))
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(_memory_report(error, plan, own.batch, topology, engine.device)) from error
    not_finite_on: tuple[str, ...] = ()
    if skipped and skipped != NO_LABELS:
        is_finite = math.isfinite(own_loss) and (gradients is None or gradients.were_finite())
        not_finite_on = _began_on(topology, is_finite)
    grad_norm = 0.0 if skipped == NO_LABELS else float(engine.get_global_grad_norm())
    laps.end("opt")
    laps.settle()
    seconds = laps.seconds()
    wait_s = WAITS.take_s()
    return StepResult(
        step=plan.number, loss=loss / labels if labels else math.nan, grad_norm=grad_norm, learning_rates=rates,
        label_tokens=int(labels), tokens=plan.tokens, images=int(pictures), samples=len(plan.sample_ids),
        quarantined=int(quarantined), sample_ids=plan.sample_ids, rows=len(plan.rows),
        seconds={part: seconds[part] for part in OF_STEP}, data_wait_s=waited_s / topology.world_size,
        left_out=tuple(own.left_out), skipped=skipped, not_finite_on=not_finite_on, image_tokens=int(image_tokens),
        own=RankStep(
            data_s=seconds["data"] - own.waited_for_data_s,
            compute_s=sum(seconds[part] for part in OF_STEP[1:]) - (wait_s - own.waited_for_data_s),
            wait_s=wait_s, loss=own_loss / own.label_tokens if own.label_tokens else math.nan,
        ),
    )  # fmt: skip


@dataclass
class _Own:
    """What this rank alone has done of a step so far. loss_sum: fp64, on the device; read once, at the end.
    waited_for_data_s: for other ranks, that share its rows, while it asked for data."""

    loss_sum: Tensor
    label_tokens: int = 0
    images: int = 0
    image_tokens: int = 0
    left_out: list[Filling] = field(default_factory=list)
    batch: Batch | None = None
    waited_for_data_s: float = 0.0


def _micro_steps(
    engine: Any, plan: PlannedStep, batches: Iterable[Batch], topology: Topology, own: _Own, laps: Laps
) -> None:
    """Forward and backward of each Batch. Raises OutOfStepError, before the others wait, when there are too few."""
    iterator, micro_steps = iter(batches), engine.gradient_accumulation_steps()
    for number in range(1, micro_steps + 1):
        where = f"micro-step {number} of {micro_steps}"
        heartbeat.enter("data", plan.number, where)
        waited_s = WAITS.blocked_s
        own.batch = batch = next(iterator, None)
        own.waited_for_data_s += WAITS.blocked_s - waited_s
        if batch is None:
            raise OutOfStepError(
                f"rank {topology.rank} on {topology.host} has {number - 1} of the {micro_steps} batches of step "
                f"{plan.number}, and all other ranks wait for it. This is a fault of the loader; started again, the "
                "run goes on from its last checkpoint"
            )
        laps.end("data", queued=True)
        asked = heartbeat.enter("forward", plan.number, where, work=plan.tokens)
        losses = engine(**batch.inputs(engine.device)).token_losses.sum()
        if asked == "nan":
            losses = losses * math.nan
        laps.end("fwd", queued=True)
        if heartbeat.enter("backward", plan.number, where, work=plan.tokens) == "nan":
            losses.register_hook(lambda gradient: gradient * math.nan)
        engine.backward(losses * (topology.world_size / plan.label_tokens), scale_wrt_gas=False)
        own.loss_sum += losses.detach()
        own.label_tokens += batch.label_tokens
        own.image_tokens += len(batch.placement.positions)
        if batch.sequence.rank == 0:  # of the ranks that share a row one counts it
            own.images += len(batch.image_sizes)
            own.left_out += batch.quarantined
        if number < micro_steps:
            engine.step()
        laps.end("bwd", queued=True)


def _update(engine: Any, plan: PlannedStep, loss_sum: float, label_tokens: int) -> str | None:
    """The boundary step; returns why no weight was changed, the same on every rank, or None.

    Gradients were divided by the planned tokens; the loss scale makes up for quarantined ones.
    """
    skipped = None
    if not math.isfinite(loss_sum):
        skipped = f"its loss is {loss_sum}"
    elif label_tokens == 0:
        skipped = NO_LABELS
    if skipped:
        partitions.spoil_gradients(engine)
    elif label_tokens != plan.label_tokens:
        engine.optimizer.loss_scale = label_tokens / plan.label_tokens
    engine.step()
    engine.optimizer.loss_scale = 1.0
    if engine.optimizer.overflow:
        partitions.clear_gradients(engine)
        return skipped or "its gradient is not finite, although its loss is"
    return None


def _began_on(topology: Topology, is_finite: bool) -> tuple[str, ...]:
    """The ranks whose own loss or gradients are not finite."""
    everyone = topology.gather((topology.host, is_finite))
    found = tuple(f"rank {rank} on {host}" for rank, (host, fine) in enumerate(everyone) if not fine)
    return found or ("no rank alone, only in the sum over all",)


def _steps_differ(topology: Topology, number: int) -> str:
    everyone = topology.gather((topology.host, number))
    listed = ", ".join(f"rank {rank} on {host} at step {step}" for rank, (host, step) in enumerate(everyone))
    return f"ranks work on different steps: {listed}. Started again, the run goes on from its last checkpoint"


def _memory_report(
    error: Exception, plan: PlannedStep, batch: Batch | None, topology: Topology, device: torch.device
) -> list[str]:
    """What filled the memory, and what to change."""
    found = [f"rank {topology.rank} on {topology.host}, step {plan.number}: {str(error).splitlines()[0]}"]
    if batch is not None:
        found.append(
            f"the batch of that moment: {batch.input_ids.numel():,} tokens in {len(batch.layout.lengths)} documents, "
            f"{len(batch.pixel_values)} crops of {len(batch.image_sizes)} pictures"
        )
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found.append(
            f"memory of {torch.cuda.get_device_name(device)}: {torch.cuda.memory_allocated(device) / GIB:.1f} GiB "
            f"allocated, {torch.cuda.memory_reserved(device) / GIB:.1f} reserved, {free / GIB:.1f} free of "
            f"{total / GIB:.1f} in all"
        )
    found.append(
        "keep `model.gradient_checkpointing` on, raise `parallel.sequence` (so many ranks share each row), set "
        "`model.offload_activations`, take ds_configs/zero3_offload.json, or lower `data.row_length_tokens`; "
        f"{as_typed('launch/check.py')} --nodes N says what fits. Started again, the run goes on from its last "
        "checkpoint"
    )
    return found
