"""A step whose numbers are not finite, or that has nothing to learn from, changes nothing: real ZeRO-3, two ranks."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import environment
from launching import launch

from phi3v_dist.attempt.build_cache import is_built
from phi3v_dist.data.ledger import LedgerReader, Status
from phi3v_dist.errors import DivergedError
from phi3v_dist.observe.tracker import read_metrics
from phi3v_dist.train.skipped import SkippedSteps
from phi3v_dist.train.step import StepResult

RANKS = Path(__file__).parent / "numbers_ranks.py"
SHORT, LONG = "2:skips:fp32", ["3:skips:bf16", "2:skips:offload", "2:skips:nvme"]
FINE = StepResult(
    step=1, loss=2.0, grad_norm=1.0, learning_rates={}, label_tokens=5, tokens=9, images=0, samples=7, quarantined=0,
    sample_ids=tuple(range(7)), rows=1,
)  # fmt: skip


def notes(folder: Path, trial: str) -> list[dict]:
    return json.loads((folder / f"{trial}.json").read_text())


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """Also folder/model/mismatch-RANK.txt, of a trial that ends its ranks."""
    folder = tmp_path_factory.mktemp("short")
    command = [sys.executable, str(RANKS), str(folder), SHORT, "2:mismatch:fp32"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def assert_nothing_changed(ranks: list[dict]) -> None:
    for seen in ranks:
        first, loss, gradients, overflow, labels, fine = seen["steps"]
        for step in (first, fine):
            assert step["skipped"] is None and not step["not_finite_on"] and len(step["changed"]) > 100
        for number, step in enumerate((loss, gradients, overflow, labels), start=1):
            assert step["changed"] == [], "a skipped step changed a weight, a moment or a count"
            assert step["counters"]["skipped_steps"] == number
            assert step["counters"]["global_steps"] == 1 + number
        assert loss["loss"] == "nan" and loss["skipped"] == "its loss is nan"
        assert labels["loss"] == "nan" and labels["skipped"] == "it has no label token" and not labels["not_finite_on"]
        for step in (gradients, overflow):
            assert 0 < float(step["loss"]) < 10 and "gradient is not finite, although" in step["skipped"]
        assert loss["not_finite_on"][0].startswith("rank 1 on ") and len(loss["not_finite_on"]) == 1
        assert gradients["not_finite_on"] == loss["not_finite_on"]
        assert overflow["not_finite_on"][0].startswith("rank 0 on ") and len(overflow["not_finite_on"]) == 1
        assert seen["end"] == seen["end of the others alone"], "something of a skipped step is left in the next ones"


@pytest.mark.fault(25)
@pytest.mark.fault(27)
@pytest.mark.fault(76)
def test_a_skipped_step_leaves_every_weight_moment_and_count_as_it_was(short):
    assert_nothing_changed(notes(short, SHORT))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(25)
@pytest.mark.fault(27)
@pytest.mark.parametrize("trial", LONG)
@pytest.mark.supports("bf16", "zero3_offload", on="more ranks")
def test_it_does_so_in_bf16_with_three_ranks_and_an_offloaded_optimizer(tmp_path, trial):
    if trial.endswith("nvme") and not is_built("async_io"):
        pytest.skip("DeepSpeed's async_io is not built here; see ds_configs/README.md")
    command = [sys.executable, str(RANKS), str(tmp_path), trial]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    assert_nothing_changed(notes(tmp_path, trial))


@pytest.mark.fault(13)
def test_a_rank_with_a_batch_too_few_names_itself_and_the_step(short):
    said = (short / "model" / "mismatch-1.txt").read_text()
    assert "rank 1 on " in said and "has 1 of the 2 batches of step 2" in said


@pytest.mark.fault(25)
@pytest.mark.fault(26)
def test_a_run_writes_down_skipped_samples_and_ends_after_too_many_bad_steps(settings_tree, tmp_path, monkeypatch):
    settings_tree["train"]["steps"] = 12
    settings_tree["data"]["validation"] = []
    settings_tree["watch"] = {"bad_steps": 3}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings_tree))
    monkeypatch.setenv("PHI3V_FAULT", "1:forward:2:nan,1:forward:6+:nan")
    done = launch("torchrun", config)
    said = done.stdout + done.stderr
    folder = Path(settings_tree["run"]["root"]) / "run"
    assert "exitcode  : 6" in said, said[-3000:]
    assert "3 steps in a row, 6 to 8, had a loss or gradient that is not finite" in said
    assert str(folder / "checkpoints" / "step-00000004") in said
    assert said.count("step 2 is skipped on all ranks, weights and moments stay as they were: its loss is nan") == 1
    assert "it began on rank 1 on " in said and "train-000.tar:000" in said
    records = [record for record, _ in LedgerReader(folder / "ledger.bin")]
    for record in records:
        is_skipped = record.step in (2, 6, 7, 8)
        assert set(record.not_trained.values()) == ({Status.SKIPPED} if is_skipped else set())
        assert len(record.not_trained) == (len(record.sample_ids) if is_skipped else 0)
    skipped = {
        int(row["train/step"]): row["train/skipped_steps"]
        for row in read_metrics(folder)
        if "train/skipped_steps" in row
    }
    assert skipped == {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 3, 8: 4}


def bad(step: int) -> StepResult:
    return replace(FINE, step=step, skipped="its loss is nan", not_finite_on=("rank 1 on node-b",))


@pytest.mark.fault(26)
def test_only_bad_steps_in_a_row_end_a_run_and_the_last_good_checkpoint_is_named():
    watch = SkippedSteps(3, "shard.tar:{}".format, lambda: Path("runs/x/checkpoints/step-00000040"))
    unlabelled = replace(FINE, skipped="it has no label token")
    for result in (bad(1), bad(2), FINE, bad(4), unlabelled, bad(6)):
        watch.look(result)
    with pytest.raises(DivergedError) as raised:
        watch.look(bad(7))
    report = raised.value.report()
    assert "3 steps in a row, 4 to 7" in report and "step-00000040" in report and "rank 1 on node-b" in report
    assert "shard.tar:0, shard.tar:1, shard.tar:2, shard.tar:3, shard.tar:4 and 2 more" in report
    assert raised.value.exit_code == 6


def test_a_step_without_labels_is_spoken_of_and_never_ends_a_run(caplog):
    watch = SkippedSteps(1, str, lambda: None)
    with caplog.at_level(logging.WARNING):
        watch.look(replace(FINE, skipped="it has no label token"))
    assert "step 1 is skipped on all ranks" in caplog.text and "no label token" in caplog.text
