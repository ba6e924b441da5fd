"""Killed in any phase, or continued by other numbers of ranks: the run is the one that nothing happened to."""

import pytest
import torch
from launching import launch, losses

from phi3v_dist.data.ledger import LEDGER_NAME, LedgerReader
from phi3v_dist.evaluate.recorded import metric_over, read_answers
from phi3v_dist.observe.tracker import read_metrics
from phi3v_dist.survive.best_file import Best, read_best
from phi3v_dist.survive.checkpoint import read_tensors

LAST = "step-00000010"  # of `reference`, which saves after steps 4, 8 and 10
SAME_IN_FP32 = 2e-6  # relative, of the first 10 steps: other ranks sum in another order; measured: 4e-7
KILLS = [
    "0:start:*", "1:data:1", "0:data:6", "1:forward:2", "0:forward:5", "*:forward:7", "0:backward:5", "1:backward:9",
    "1:optimizer:6", "0:optimizer:10", "0:snapshot:4", "1:snapshot:8", "0:write:4", "1:write:8", "1:write:10",
    "0:commit:4", "0:commit:8", "0:prune:8", "1:evaluate:0", "0:finish:10",
]  # fmt: skip
BY = "eval/loss"
SAMPLE = ("0:commit:8",)  # of them, in `make test`


def ledger(folder) -> list[tuple]:
    """Step, rows and what was not trained of them."""
    return [(record.step, record.rows, dict(record.not_trained)) for record, _ in LedgerReader(folder / LEDGER_NAME)]


def learning_rates(folder) -> dict[int, float]:
    return {int(row["train/step"]): row["train/lr/text"] for row in read_metrics(folder) if "train/lr/text" in row}


def assert_same_run(run, reference) -> None:
    """Losses, learning rates, rows of the data, final weights and moments: to the bit."""
    assert losses(run) == losses(reference) and learning_rates(run) == learning_rates(reference)
    assert ledger(run) == ledger(reference)
    ours, theirs = (read_tensors(folder / "checkpoints" / LAST) for folder in (run, reference))
    assert ours.names == theirs.names
    for name, spec in ours.specs.items():
        for state in spec.dtypes:
            assert torch.equal(ours.stored(name, state), theirs.stored(name, state)), (name, state)


def assert_best_is_kept(run) -> None:
    """The evaluation of step 10 asked all 12 samples; it counts over the 4 that those of steps 3, 6 and 9 asked."""
    steps = {int(path.name[5:]): read_answers(path) for path in run.glob("eval/step-*")}
    steps.pop(0, None)  # the untuned model, of which there is no checkpoint
    same = list(steps[3])
    values = {step: metric_over([answers[name] for name in same], BY, {}) for step, answers in steps.items()}
    assert sorted(steps) == [3, 6, 9, 10] and len(same) == 4 and len(steps[10]) == 12
    best = min(values, key=lambda step: values[step])
    assert read_best(run / "checkpoints") == Best(best, BY, values[best])
    kept = sorted({f"step-{best:08d}", LAST})
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == kept


@pytest.mark.fault(1, 2, 3, 4, 5, 6, 31, 63)
@pytest.mark.parametrize(
    "point", [pytest.param(kill, marks=() if kill in SAMPLE else pytest.mark.slow) for kill in KILLS]
)
@pytest.mark.supports("killed", "resume", on="2 ranks")
def test_a_run_killed_in_any_phase_ends_as_if_it_had_not_been(launched, reference, point):
    config, root = launched
    name = "killed-" + point.replace(":", "-").replace("*", "all")
    words = (f"run.name={name}", "checkpoint.keep=1", f"checkpoint.best={BY}", "eval.every_steps=3", "eval.samples=4")
    killed = launch("torchrun", config, *words, fault=f"{point}:kill9")
    assert killed.returncode != 0 and not (root / name / "summary.json").exists(), killed.stdout[-3000:]
    checkpoints = root / name / "checkpoints"
    if best := read_best(checkpoints):
        read_tensors(checkpoints / f"step-{best.step:08d}")  # every byte is there
    done = launch("torchrun", config, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same_run(root / name, reference)
    assert_best_is_kept(root / name)


@pytest.mark.slow
def test_a_run_killed_while_it_loads_a_checkpoint_ends_as_if_it_had_not_been(launched, reference):
    config, root = launched
    for fault in ("1:forward:6:kill9", "0:load:*:kill9", "1:load:*:kill9"):
        assert launch("torchrun", config, "run.name=killed-loading", fault=fault).returncode != 0
    done = launch("torchrun", config, "run.name=killed-loading")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same_run(root / "killed-loading", reference)


@pytest.mark.slow
@pytest.mark.fault(22, 63)
@pytest.mark.parametrize(
    "parts",
    [((4, 2), (10, 3)), ((3, 2), (5, 3), (7, 1), (10, 4))],
    ids=["2-3", "2-3-1-4"],
)
@pytest.mark.supports("resume elsewhere", on="more ranks")
def test_continued_by_other_numbers_of_ranks_a_run_trains_what_two_would_have(launched, reference, parts):
    """parts: last step, number of ranks."""
    config, root = launched
    name = f"resharded-{len(parts)}"
    folder = root / name
    for step, ranks in parts:
        fault = f"0:optimizer:{step}:usr1" if step < 10 else ""
        launcher = "single" if ranks == 1 else "torchrun"
        done = launch(launcher, config, f"run.name={name}", ranks=ranks, fault=fault)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert max(losses(folder)) == step
    assert losses(folder) == pytest.approx(losses(reference), rel=SAME_IN_FP32)
    assert ledger(folder) == ledger(reference)
