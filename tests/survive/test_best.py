"""The best checkpoint: found over the same samples, kept by retention, and never named before it is there."""

import json
import logging
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from writer_ranks import made_up

from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.attempt.requests import Requests
from phi3v_dist.cli.export import best_of
from phi3v_dist.config import CheckpointSettings, FieldSettings, Settings
from phi3v_dist.errors import CheckpointError
from phi3v_dist.evaluate.recorded import comparable_metrics, metric_over
from phi3v_dist.evaluate.records import write_records
from phi3v_dist.observe.facts import facts
from phi3v_dist.observe.metrics import lookup
from phi3v_dist.observe.run_folder import read_run
from phi3v_dist.observe.tracker import NoTracker
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.survive import best
from phi3v_dist.survive.best import BestCheckpoint
from phi3v_dist.survive.best_file import BEST_NAME, Best, best_checkpoint, read_best
from phi3v_dist.survive.checkpoint import Checkpoints, Position, committed, read_tensors
from phi3v_dist.survive.interval import Interval
from phi3v_dist.survive.retention import step_of
from phi3v_dist.survive.saver import Saver

FIELDS = {"price": FieldSettings(pattern="Price: ([0-9.]+)", kind="number"), "title": FieldSettings(key="title")}
METRIC = "eval/price_mae"
SAVED_EVERY, LAST = 3, 12
ERRORS = {2: 9, 4: 5, 6: 7, 8: 3, 10: 4, 12: 8}  # of the price, by step: 8 is the best


def write_evaluation(run: Path, step: int, errors: list[float], first: int = 0) -> None:
    """One in which the price of each sample, from number `first` on, is so far off."""
    rows = [
        {
            "sample_id": number, "shard": "validation.tar", "key": f"{number:03d}", "target": "Price: 100",
            "prediction": "Price: none" if math.isnan(error) else f"Price: {100 + error}", "stopped": True,
            "num_tokens": 3, "loss": error, "label_tokens": 4, "prompt": "?", "thumbnail": None,
        }
        for number, error in enumerate(errors, start=first)
    ]  # fmt: skip
    write_records(run / "eval" / f"step-{step:06d}", rows, {})


class Saves(Checkpoints):
    """Without an engine: what is saved is made up, and all the rest is real."""

    def begin(self, engine: Any, position: Position, must_last: bool = False) -> bool:
        self.claim()
        store = self._next_store(must_last)
        self.writer.begin(made_up(position.step, num_elements=100), 0.0, store)
        return store.is_shared


def position(step: int) -> Position:
    return Position(step=step, run_id="run", loader={}, attempt=1, config_digest="")


def saver_of(run: Path, attempt: int = 1, local: Path | None = None, metric: str = METRIC) -> Saver:
    checkpoints = Saves(run / "checkpoints", keep=1, attempt=attempt, local=local, shared_every=10)
    found = BestCheckpoint(run, metric, FIELDS, attempt)
    never = Interval(CheckpointSettings(every_steps=10**9), num_nodes=1)
    owner = Attempt(attempt, run / "attempts")
    return Saver(Topology(), owner, Requests(), checkpoints, never, NoTracker(), found)


def train(run: Path, attempt: int, last: int = LAST) -> None:
    """The loop's order of effects: save when due, evaluate when due, save the best."""
    saver = saver_of(run, attempt)
    saver.checkpoints.claim()
    newest = saver.checkpoints.newest()
    done = (step_of(newest) if newest else None) or 0
    saver.committed_step = done
    if done in ERRORS and not (run / "eval" / f"step-{done:06d}").exists():
        write_evaluation(run, done, [ERRORS[done]])
    if done and saver.must_save_best(done):
        saver.begin(None, position(done), must_last=True)
    for step in range(done + 1, last + 1):
        saver.edge(step)
        if step % SAVED_EVERY == 0:
            saver.begin(None, position(step))
        if step in ERRORS:
            write_evaluation(run, step, [ERRORS[step]])
            if saver.must_save_best(step):
                saver.begin(None, position(step), must_last=True)
            saver.edge(step)
    saver.settle()
    if last == LAST:
        saver.checkpoints.finish()


def names(run: Path) -> list[int | None]:
    return [step_of(path) for path in committed(run / "checkpoints")]


def test_the_best_stays_however_old_it_gets_and_goes_when_another_is_committed(tmp_path: Path) -> None:
    train(tmp_path, attempt=1, last=6)
    assert read_best(tmp_path / "checkpoints") == Best(4, METRIC, 5.0) and names(tmp_path) == [6, 4]
    train(tmp_path, attempt=2)
    assert read_best(tmp_path / "checkpoints") == Best(8, METRIC, 3.0) and names(tmp_path) == [12, 8]
    assert json.loads((tmp_path / "checkpoints" / BEST_NAME).read_text()) == {"step": 8, "metric": METRIC, "value": 3.0}


KILLED = 9
OPERATIONS = ("rename", "replace", "fsync", "unlink", "mkdir")  # of `os`, or of a path, which ends there


def train_until(run: Path, attempt: int, fatal: int) -> None:
    """Die before the file operation of this number, counted over all threads."""
    count = iter(range(1, fatal))

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(count, None) is None:
                os._exit(KILLED)
            return real(*arguments, **options)

        return call

    logging.disable()
    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    train(run, attempt)
    os._exit(0)


@pytest.mark.fault(5, 43)
@pytest.mark.parametrize("every", [37, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_before_any_file_operation_the_file_names_a_whole_checkpoint_and_the_search_goes_on(
    tmp_path: Path, every: int
) -> None:
    fork = multiprocessing.get_context("fork")
    ends = []
    for fatal in range(1, 10_000, every):
        run = tmp_path / str(fatal)
        for attempt, at in ((1, fatal), (2, fatal // 2 + 1), (3, 10**9)):  # the second one is killed too
            process = fork.Process(target=train_until, args=(run, attempt, at))
            process.start()
            process.join(240)
            ends.append(process.exitcode)
            if best_of_run := read_best(run / "checkpoints"):
                path = best_checkpoint(run / "checkpoints")
                assert path and step_of(path) == best_of_run.step, (fatal, attempt)
                read_tensors(path)  # every byte
        assert process.exitcode == 0 and read_best(run / "checkpoints") == Best(8, METRIC, 3.0), fatal
        assert names(run) in ([12, 8], [12]), fatal
        if ends[-3] == 0:
            break
    assert set(ends) == {0, KILLED} and fatal > 100


def test_the_last_evaluation_is_compared_over_the_samples_that_the_best_was_asked_too(tmp_path: Path) -> None:
    found = BestCheckpoint(tmp_path, METRIC, FIELDS, 1)
    checkpoints = saver_of(tmp_path).checkpoints
    checkpoints.save(None, position(2))
    write_evaluation(tmp_path, 2, [4, 6])
    first = found.candidate(2)
    assert first == Best(2, METRIC, 5.0)
    found.keep(first)
    write_evaluation(tmp_path, 4, [5, 6, 0, 0, 0, 0])  # better on average, not on those two
    assert found.candidate(4) is None
    write_evaluation(tmp_path, 6, [3, 6, 90, 90, 90, 90])
    assert found.candidate(6) == Best(6, METRIC, 4.5)
    assert found.candidate(2) is None, "it is the best already"
    assert found.candidate(8) is None, "it was not evaluated"


def test_other_samples_another_metric_or_a_checkpoint_that_is_gone_begin_the_search_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saver_of(tmp_path).checkpoints
    checkpoints.save(None, position(2))
    write_evaluation(tmp_path, 2, [4, 6])
    found = BestCheckpoint(tmp_path, METRIC, FIELDS, 1)
    found.keep(Best(2, METRIC, 5.0))
    write_evaluation(tmp_path, 4, [50, 60], first=7)
    assert found.candidate(4) == Best(4, METRIC, 55.0) and "asked none of the samples of step 2" in caplog.text
    by_loss = BestCheckpoint(tmp_path, "eval/loss", FIELDS, 1)
    assert by_loss.candidate(2) == Best(2, "eval/loss", 5.0) and f"was that by {METRIC}" in caplog.text
    assert not (tmp_path / "checkpoints" / BEST_NAME).exists()
    found.keep(Best(3, METRIC, 5.0))
    assert found.candidate(4) == Best(4, METRIC, 55.0) and "step 3, the best so far, is gone" in caplog.text


def test_a_value_that_is_missing_is_never_the_best_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = saver_of(tmp_path)
    for step, error in ((2, math.nan), (4, 5.0), (6, math.nan), (8, math.nan)):
        saver.begin(None, position(step))
        write_evaluation(tmp_path, step, [error])
        assert not saver.must_save_best(step)
        saver.settle()
    assert read_best(tmp_path / "checkpoints") == Best(4, METRIC, 5.0) and names(tmp_path) == [8, 4]
    assert caplog.text.count("cannot be the best") == 1


def test_with_copies_on_the_nodes_the_best_goes_to_the_run_folder(tmp_path: Path) -> None:
    run, local = tmp_path / "run", tmp_path / "local"
    saver = saver_of(run, local=local)
    for step, error in ((1, 9.0), (2, 4.0), (3, 5.0)):
        saver.begin(None, position(step))
        write_evaluation(run, step, [error])
        if saver.must_save_best(step):
            assert step == 2, "the first save went to the run folder"
            saver.begin(None, position(step), must_last=True)
        saver.edge(step)
    saver.settle()
    assert read_best(run / "checkpoints") == Best(2, METRIC, 4.0) and names(run) == [2, 1]
    saver.checkpoints._shared.tidy()
    assert names(run) == [2], "the best before is not needed any more"
    assert [step_of(path) for path in committed(local)] == [3]


def test_a_best_step_whose_save_failed_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_of(tmp_path)
    saver.save(None, position(1))
    monkeypatch.setenv("PHI3V_FAULT", "0:write:2:enospc")
    write_evaluation(tmp_path, 2, [1.0])
    assert saver.must_save_best(2)
    saver.begin(None, position(2), must_last=True)
    saver.settle()
    assert read_best(tmp_path / "checkpoints") is None and names(tmp_path) == [1]
    saver.save(None, position(3))
    assert read_best(tmp_path / "checkpoints") is None


def test_a_damaged_best_that_is_set_aside_is_not_named_any_more(tmp_path: Path) -> None:
    train(tmp_path, attempt=1, last=4)
    assert read_best(tmp_path / "checkpoints") == Best(4, METRIC, 5.0)
    again = Checkpoints(tmp_path / "checkpoints", keep=1, attempt=2)
    again.claim()
    next((tmp_path / "checkpoints" / "step-00000004").glob("rank*")).write_bytes(b"")
    older = again.newest()
    assert older is not None and step_of(older) == 2
    again._set_aside_before(2)
    assert names(tmp_path) == [2] and not (tmp_path / "checkpoints" / BEST_NAME).exists()


@pytest.mark.parametrize("content", ["", "[]", '{"step": "x"}', '{"step": 1, "metric": "m"}', "{" * 100_000])
def test_a_damaged_file_names_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / BEST_NAME).write_text(content)
    assert read_best(tmp_path) is None and best_checkpoint(tmp_path) is None


def test_metrics_that_can_be_compared_are_those_of_the_fields_with_a_direction() -> None:
    fields = FIELDS | {
        "name": FieldSettings(key="name", kind="fuzzy"), "height": FieldSettings(key="height", kind="relaxed"),
    }  # fmt: skip
    known = comparable_metrics(fields)
    assert {"eval/loss", METRIC, "eval/field_em/title", "eval/anls/name", "eval/relaxed_accuracy/height"} <= set(known)
    assert all((metric := lookup(name)) and metric.better for name in known) and "eval/title_mae" not in known
    assert "eval/loss" in comparable_metrics({})


def test_a_metric_over_recorded_answers_is_that_of_their_texts() -> None:
    answers = [
        {"prediction": f"Price: {price}", "target": "Price: 100", "stopped": stopped, "num_tokens": 2, "loss": loss,
         "label_tokens": labels}
        for price, stopped, loss, labels in ((90, True, 1.0, 1), (120, False, 4.0, 3))
    ]  # fmt: skip
    assert metric_over(answers, METRIC, FIELDS) == 15
    assert metric_over(answers, "eval/stop_pct", FIELDS) == 50
    assert metric_over(answers, "eval/loss", FIELDS) == 13 / 4
    assert metric_over([], "eval/loss", FIELDS) is None and metric_over([], METRIC, FIELDS) is None


@pytest.mark.parametrize(
    "metric, said",
    [
        ("eval/price_mea", "did you mean eval/price_mae"),
        ("eval/title_mae", "is no metric of an evaluation with these `eval.fields`"),
        ("train/loss", "eval/loss"),
        ("eval/samples", "neither better higher nor better lower"),
        ("eval/blind/price_mae", "of the blind control"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_with_those_that_there_are(metric: str, said: str) -> None:
    tree: dict[str, Any] = {
        "model": {"path": "m"}, "train": {"steps": 1}, "checkpoint": {"best": metric},
        "data": {"train": [{"shards": "t.tar"}], "validation": [{"shards": "v.tar"}]},
        "eval": {"fields": {name: field.model_dump() for name, field in FIELDS.items()}},
    }  # fmt: skip
    (problem,) = best.problems(Settings.model_validate(tree))
    assert said in problem and METRIC in problem and "`checkpoint.best`" in problem
    tree["checkpoint"]["best"] = METRIC
    assert best.problems(Settings.model_validate(tree)) == []
    assert "lowest eval/price_mae" in best.describe(Settings.model_validate(tree))[0]
    tree["data"]["validation"] = []
    assert "names no shards" in best.problems(Settings.model_validate(tree))[0]


def test_the_best_is_exported_by_its_file_and_its_absence_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"A run keeps one when `checkpoint.best`"):
        best_of(tmp_path / "checkpoints")
    train(tmp_path, attempt=1, last=6)
    assert best_of(tmp_path / "checkpoints").name == "step-00000004"
    (tmp_path / "config.yaml").write_text("run: {name: x}")
    assert ("best checkpoint", f"step 4: {METRIC} 5") in facts(read_run(tmp_path))
