import json
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
from synthetic_run import write_run
from wandb_world import DUMMY_KEY, fresh_client, offline_runs, records, running_services, train  # noqa: F401

from phi3v_dist.observe import wandb_tracker
from phi3v_dist.observe.metrics import PLACEHOLDER, REGISTRY
from phi3v_dist.observe.tracker import AllOf, JsonlTracker, read_metrics
from phi3v_dist.observe.wandb_tracker import WandbTracker


@pytest.mark.fault(92)
@pytest.mark.supports("wandb offline", on="one process")
def test_an_offline_run_holds_the_rows_and_the_pictures_and_no_secret_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "some.password=canary-4711"])
    run = write_run(tmp_path / "quickstart", num_samples=6)
    (run / "metrics.jsonl").unlink()
    evaluation = run / "eval" / "step-000600"
    predictions = [json.loads(line) for line in (evaluation / "predictions.jsonl").open()]
    sinks = train(run, WandbTracker(run))
    sinks.media(5, predictions, evaluation)
    sinks.finish({"eval/price_mae": 41.5})

    (folder,) = offline_runs(run)
    found = records(folder)
    rows = [record["history"]["item"] for record in found if record["type"] == "history"]
    assert [row["train/step"] for row in rows] == [1, 2, 3, 4, 5, 5]
    assert [row["train/loss"] for row in rows[:5]] == [3.0 / step for step in range(1, 6)]
    assert all(row["run/attempt"] == 1 for row in rows[:5])
    axes = [record["metric"] for record in found if record["type"] == "metric"]
    assert {"name": "train/step", "hidden": True}.items() <= {**axes[0], **axes[0]["options"]}.items()
    assert (axes[-1]["glob_name"], axes[-1]["step_metric"]) == ("*", "train/step")
    hidden = {axis["name"] for axis in axes[:-1] if axis["options"]["hidden"]}
    assert hidden == {m.name for m in REGISTRY if m.panel is None and not PLACEHOLDER.search(m.name)}
    assert {axis["step_metric"] for axis in axes[1:]} == {"train/step"}
    assert (rows[5]["eval/images.count"], rows[5]["eval/predictions.nrows"]) == (6, 6)
    assert len(list(folder.glob("files/media/images/**/*.jpg"))) == 6
    assert '"eval/price_mae":41.5' in json.dumps([record for record in found if record["type"] == "summary"]).replace(
        " ", ""
    )
    assert (run / "wandb" / "data").is_dir() and not (tmp_path / "elsewhere").exists()
    stored = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"canary-4711" not in stored


@pytest.mark.fault(91)
def test_a_second_attempt_continues_the_same_run_and_shows_what_was_trained_again(tmp_path: Path) -> None:
    """The first attempt dies after step 5, the second goes on from the checkpoint of step 3."""
    train(tmp_path, WandbTracker(tmp_path), steps=5).finish({})
    sinks = AllOf(JsonlTracker(tmp_path, 2), [WandbTracker(tmp_path)])
    sinks.start({})
    for step in (4, 5, 6):
        sinks.log({"train/step": step, "train/loss": 1.0})
    sinks.finish({})

    run_id = (tmp_path / "wandb-id").read_text()
    folders = offline_runs(tmp_path)
    assert [run_id in folder.name for folder in folders] == [True, True]
    rows = [[r["history"]["item"] for r in records(folder) if r["type"] == "history"] for folder in folders]
    assert [[row["train/step"] for row in part] for part in rows] == [[1, 2, 3, 4, 5], [4, 5, 6]], "each one rises"
    assert [{row["run/attempt"] for row in part} for part in rows] == [{1}, {2}], "so the rewind can be seen"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        pytest.param(DUMMY_KEY, "http://127.0.0.1:9 cannot be reached", marks=pytest.mark.fault(89), id="server"),
        pytest.param(None, "no API key", marks=pytest.mark.fault(88), id="key"),
    ],
)
def test_online_without_a_server_or_a_key_is_offline_with_one_warning(
    key: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    train(tmp_path, WandbTracker(tmp_path, mode="online")).finish({})
    (folder,) = offline_runs(tmp_path)
    assert folder.name.startswith("offline-run-")
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("phi3v_dist")]
    assert reason in warning and "logging offline" in warning
    assert warning.splitlines()[-1] == f"python launch/dashboard.py --sync {tmp_path}"


@pytest.mark.fault(89)
def test_a_server_that_accepts_and_says_nothing_costs_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel accepts, and nobody answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", DUMMY_KEY)
        begin = time.monotonic()
        sinks = train(tmp_path, WandbTracker(tmp_path, mode="online"))
        took_s = time.monotonic() - begin
        sinks.finish({})
    assert "logging offline" in caplog.text and DUMMY_KEY not in caplog.text
    (folder,) = [folder for folder in offline_runs(tmp_path) if folder.name.startswith("offline-run-")]
    assert len([r for r in records(folder) if r["type"] == "history"]) == 5, "rows waited for the run to open"
    assert took_s < 100, "training does not wait for any of it"


@pytest.mark.fault(90)
def test_a_client_that_hangs_takes_no_time_from_training_and_is_left_behind_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real client's real service, stopped by a signal: it takes nothing more, as one that swaps or is stuck."""
    monkeypatch.setattr(wandb_tracker, "FINISH_TIMEOUT_S", 1.0)
    sinks = train(tmp_path, WandbTracker(tmp_path), steps=3)
    services = running_services()
    assert services
    for service in services:
        service.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    for step in range(4, 4000):  # more than the buffers between the two hold
        sinks.log({"train/step": step, "train/loss": 1.0} | {"time/data_s": float(step)})
    sinks.finish({})
    assert time.monotonic() - begin < 200, "a call that waits for the service waits for ever"
    assert len(read_metrics(tmp_path)) == 3999, "the record is complete"
    assert "left behind" in caplog.text and "launch/dashboard.py --sync" in caplog.text
    assert not any(service.is_running() and service.status() != psutil.STATUS_ZOMBIE for service in services)


def test_disabled_leaves_nothing_behind(tmp_path: Path) -> None:
    train(tmp_path, WandbTracker(tmp_path, mode="disabled")).finish({})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class DeadRun:
    """A run whose service is gone: every verb raises, as the real client does (OBSERVABILITY.md §0.4)."""

    url, dir = None, "nowhere"

    def define_metric(self, *names: str, **options: Any) -> None:
        """Worked while the service was alive."""

    def __getattr__(self, verb: str) -> Any:
        raise ConnectionResetError(f"{verb}: connection lost")


@pytest.mark.fault(90)
def test_a_client_that_dies_never_reaches_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **options: DeadRun())
    sinks = train(tmp_path, WandbTracker(tmp_path))
    sinks.finish({"train/step": 5})
    assert len(read_metrics(tmp_path)) == 5
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "connection lost" in caplog.text


def test_a_client_that_cannot_start_never_reaches_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**options: Any) -> None:
        raise wandb.errors.CommError("core panicked")

    monkeypatch.setattr(wandb, "init", refuse)
    train(tmp_path, WandbTracker(tmp_path)).finish({})
    assert len(read_metrics(tmp_path)) == 5
    assert "core panicked" in caplog.text
