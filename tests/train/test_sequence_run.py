"""A run goes on when its ranks begin to share rows, in other groups, at any world size: the losses stay the same."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY_SIZES
from launching import launch, losses

from phi3v_dist.model.tiny import write_tiny

SAME = 2e-6  # relative, over the first 10 steps (Adam amplifies rounding)


def continued(config, run: Path, name: str, step: int, words: tuple[str, ...], ranks: int) -> Path:
    """Another run that goes on from this one's checkpoint of a step. Raises AssertionError with what it wrote."""
    folder = shutil.copytree(run, run.parent / name)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (folder / "summary.json").unlink()
    done = launch("torchrun", config, f"run.name={name}", *words, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"step-{step:08d}, step {step} of" in done.stdout
    return folder


def assert_same_losses(run: Path, before: Path, steps: range) -> None:
    ours, theirs = losses(run), losses(before)
    for step in steps:
        assert ours[step] == pytest.approx(theirs[step], rel=SAME), step


@pytest.mark.supports("sequence 2", on="2 ranks")
def test_a_run_goes_on_with_rows_shared_by_two_ranks(launched, reference):
    config, _ = launched
    run = continued(config, reference, "shared", 4, ("parallel.sequence=2", "data.validation=[]"), ranks=2)
    assert_same_losses(run, reference, range(5, 11))
    samples, labels = ([json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (run, reference))
    keys = ("train/samples", "train/label_tokens", "data/quarantined")
    of_step = [{row["train/step"]: row for row in rows if "train/loss" in row} for rows in (samples, labels)]
    for step in range(5, 11):
        assert [of_step[0][step].get(key) for key in keys] == [of_step[1][step].get(key) for key in keys]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.supports("sequence 2", "sequence 4", "resume elsewhere", on="more ranks")
def test_a_run_goes_on_in_groups_of_one_two_and_four_at_several_world_sizes(launched, tmp_path):
    """1 → 2 → 4 → 1 ranks to a row, on 2, 4, 4 and 3 ranks; each compared with the run it goes on from."""
    config, root = launched
    four_heads = TINY_SIZES["decoder"] | {"num_attention_heads": 4, "num_key_value_heads": 4}
    write_tiny(
        tmp_path / "model", ["A red square, Price: 12. What is it?"], clip=TINY_SIZES["clip"], decoder=four_heads
    )
    words = (f"model.path={tmp_path / 'model'}", "train.steps=40", "checkpoint.every_steps=10", "checkpoint.keep=9",
             "data.validation=[]", "model.gradient_checkpointing=true", "model.mlp_chunk_tokens=128")  # fmt: skip
    done = launch("torchrun", config, "run.name=alone", *words, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    before = root / "alone"
    for name, step, sequence, ranks in (("two", 10, 2, 4), ("four", 20, 4, 4), ("one", 30, 1, 3)):
        run = continued(config, before, f"groups-of-{name}", step, (*words, f"parallel.sequence={sequence}"), ranks)
        assert_same_losses(run, before, range(step + 1, step + 11))
        before = run
