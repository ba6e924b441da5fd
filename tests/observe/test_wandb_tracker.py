import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from synthetic_run import write_run

from phi3v_dist.observe.tracker import AllOf, JsonlTracker, read_metrics
from phi3v_dist.observe.wandb_tracker import WandbTracker

DUMMY_KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def fresh_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings of the person who runs the tests; every variable that the sink sets is put back."""
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    yield
    wandb.teardown()


def train(run: Path, tracker: WandbTracker, steps: int = 5) -> AllOf:
    sinks = AllOf(JsonlTracker(run, 1), [tracker])
    sinks.start({"train": {"steps": steps}})
    for step in range(1, steps + 1):
        sinks.log({"train/step": step, "train/loss": 3.0 / step})
    return sinks


def offline_runs(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("*run-*"))


def records(folder: Path) -> list[dict[str, Any]]:
    """What the real client wrote, by its own reader."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in output.splitlines()]


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
    assert (axes[1]["glob_name"], axes[1]["step_metric"]) == ("*", "train/step")
    assert (rows[5]["eval/images.count"], rows[5]["eval/predictions.nrows"]) == (6, 6)
    assert len(list(folder.glob("files/media/images/**/*.jpg"))) == 6
    assert '"eval/price_mae":41.5' in json.dumps([record for record in found if record["type"] == "summary"]).replace(
        " ", ""
    )
    assert (run / "wandb" / "data").is_dir() and not (tmp_path / "elsewhere").exists()
    stored = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"canary-4711" not in stored


def test_a_second_attempt_continues_the_same_run(tmp_path: Path) -> None:
    train(tmp_path, WandbTracker(tmp_path), steps=1).finish({})
    train(tmp_path, WandbTracker(tmp_path), steps=1).finish({})
    run_id = (tmp_path / "wandb-id").read_text()
    assert [run_id in folder.name for folder in offline_runs(tmp_path)] == [True, True]


@pytest.mark.parametrize(
    ("key", "reason"),
    [(DUMMY_KEY, "http://127.0.0.1:9 cannot be reached"), (None, "no API key")],
    ids=["server", "key"],
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
