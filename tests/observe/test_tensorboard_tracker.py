import importlib.util
from pathlib import Path

import pytest

from phi3v_dist.observe import tensorboard_tracker
from phi3v_dist.observe.tensorboard_tracker import TensorBoardTracker
from phi3v_dist.observe.tracker import AllOf, JsonlTracker, read_metrics


def test_asking_for_it_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "`python -m pip install tensorboard`" in (tensorboard_tracker.why_not() or "")


@pytest.mark.supports("tensorboard", on="one process")
def test_rows_arrive_and_steps_trained_again_replace_those_taken_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra `tensorboard`)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, steps, loss in ((1, range(1, 6), 3.0), (2, range(4, 7), 1.0)):
        sinks = AllOf(JsonlTracker(tmp_path, attempt), [TensorBoardTracker(tmp_path)])
        sinks.start({})
        for step in steps:
            sinks.log({"train/step": step, "train/loss": loss, "train/grad_norm": float("nan")})
        sinks.finish({})
    assert len(read_metrics(tmp_path)) == 6
    files = EventAccumulator(str(tmp_path / "tensorboard"))
    files.Reload()
    assert files.Tags()["scalars"] == ["run/attempt", "train/loss"], "what is not finite is left out"
    shown = [(event.step, event.value) for event in files.Scalars("train/loss")]
    assert shown == [(1, 3.0), (2, 3.0), (3, 3.0), (4, 1.0), (5, 1.0), (6, 1.0)]


def test_a_disk_that_fails_it_does_not_reach_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra `tensorboard`)")
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    sinks = AllOf(JsonlTracker(tmp_path, 1), [TensorBoardTracker(tmp_path)])
    sinks.start({})
    for step in (1, 2):
        sinks.log({"train/step": step, "train/loss": 1.0})
    sinks.finish({})
    assert len(read_metrics(tmp_path)) == 2 and caplog.text.count("TensorBoardTracker failed") == 1
