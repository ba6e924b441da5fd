"""The W&B sink while what it needs dies: its service, its server, its disk; and what W&B is told at the end."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import wandb
from wandb_stub import WandbStub, answer
from wandb_world import DUMMY_KEY, fresh_client, offline_runs, records, rows_of, running_services, stub, train, warnings  # noqa: F401

from phi3v_dist.observe import wandb_tracker
from phi3v_dist.observe.tracker import AllOf, read_metrics
from phi3v_dist.observe.wandb_tracker import WandbTracker


def was_opened(caplog: pytest.LogCaptureFixture, times: int) -> bool:
    return caplog.text.count("W&B: offline") == times


def go_on(sinks: AllOf, *steps: int) -> None:
    for step in steps:
        sinks.log({"train/step": step, "train/loss": 1.0})


TIMEOUT_S = 240.0


def wait_for(condition) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not true after {TIMEOUT_S:.0f} s"
        time.sleep(0.05)


@pytest.mark.fault(90)
def test_a_killed_service_is_started_again_in_the_same_run_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = train(tmp_path, WandbTracker(tmp_path))
    caplog.set_level(logging.INFO, "phi3v_dist")
    for last in (10, 15):
        wait_for(partial(was_opened, caplog, last // 5 - 1))
        (service,) = running_services()
        service.kill()
        service.wait(TIMEOUT_S)
        go_on(sinks, *range(last - 4, last + 1))
    wait_for(partial(was_opened, caplog, 3))
    sinks.finish({"eval/loss": 1.5})
    assert [row["train/step"] for row in read_metrics(tmp_path)] == list(range(1, 16)), "the record is complete"
    run_id = (tmp_path / "wandb-id").read_text()
    folders = offline_runs(tmp_path)
    assert len(folders) == 3 and all(folder.name.endswith(run_id) for folder in folders), "one run"
    held = {row["train/step"] for folder in folders for row in rows_of(folder)}
    assert held == set(range(1, 16)), "what the killed service had not written was said again"
    (warning,) = warnings(caplog)
    assert "its service (wandb-core) is gone; started it again, in the same run" in warning
    last = json.dumps([r for r in records(folders[-1]) if r["type"] in ("summary", "exit")])
    assert "eval/loss" in last


@pytest.mark.fault(90)
def test_a_service_that_does_not_stay_is_given_up_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = train(tmp_path, WandbTracker(tmp_path))
    wait_for(running_services)

    def refuse(**options: object) -> None:
        raise wandb.errors.CommError("no memory for wandb-core")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(wandb_tracker, "REJOIN_WAIT_S", 0.01)
    for service in running_services():
        service.kill()
        service.wait(TIMEOUT_S)
    go_on(sinks, *range(6, 300))
    sinks.finish({})
    assert len(read_metrics(tmp_path)) == 299
    (warning,) = warnings(caplog)
    assert "given up" in warning and "no memory for wandb-core" in warning


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run folder whose W&B part is a disk of its own, of 20 MiB."""
    mount = tmp_path / "run" / "wandb"
    mount.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", mount], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk of its own can be mounted here: {done.stderr.strip()}")
    yield mount.parent
    subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.mark.fault(90)
def test_a_disk_that_fills_up_stops_wandb_and_nothing_else(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_tracker, "DISK_LOOK_S", 0.0)
    sinks = train(small_disk, WandbTracker(small_disk))
    wait_for(lambda: offline_runs(small_disk))
    filler = small_disk / "wandb" / "somebody-else"
    filler.write_bytes(bytes(8 << 20))
    go_on(sinks, *range(6, 50))
    wait_for(lambda: not running_services())
    go_on(sinks, 50)
    filler.unlink()
    go_on(sinks, 51, 52)
    sinks.finish({})
    assert len(read_metrics(small_disk)) == 52, "the record is complete"
    said = warnings(caplog)
    assert len([line for line in said if "No space" in line or "no room for W&B's own files" in line]) == 1
    _, again = offline_runs(small_disk)
    assert rows_of(again)[-1]["train/step"] == 52, "room again: it goes on"
    assert not any("Traceback" in line for line in said)


@pytest.mark.fault(90)
def test_a_server_that_dies_takes_nothing_from_training_and_offline_files_hold_all(
    stub: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_tracker, "FINISH_TIMEOUT_S", 2.0)
    sinks = train(tmp_path, WandbTracker(tmp_path, mode="online"))
    wait_for(lambda: "file_stream" in stub.operations)
    stub.stop()
    begin = time.monotonic()
    go_on(sinks, *range(6, 40))
    took_s = time.monotonic() - begin
    time.sleep(1.5)  # the flush
    sinks.finish({})
    assert took_s < 60 and len(read_metrics(tmp_path)) == 39
    (folder,) = offline_runs(tmp_path)
    assert folder.name.startswith("run-") and [row["train/step"] for row in rows_of(folder)] == list(range(1, 40))
    (warning,) = warnings(caplog)
    assert "left behind" in warning and "--sync" in warning


@pytest.mark.parametrize(
    "faults",
    [{"UpsertBucket": [answer(429)]}, {"UpsertBucket": [answer(500)]}, {"file_stream": [answer(500), answer(429)]}],
    ids=["429", "500", "rows"],
)
def test_a_server_that_stumbles_gets_everything_in_the_end(
    faults: dict, stub: WandbStub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub.faults.update(faults)
    train(tmp_path, WandbTracker(tmp_path, mode="online")).finish({})
    (run,) = stub.runs.values()
    assert [row["train/step"] for row in run.rows] == [1, 2, 3, 4, 5] and run.exit_code == 0
    assert warnings(caplog) == []


@pytest.mark.fault(89)
@pytest.mark.parametrize(
    "fault",
    [answer(200, b"<html>a proxy's page</html>"), answer(200, b'{"data": {}}', after_s=200), answer(403)],
    ids=["malformed", "slow", "forbidden"],
)
def test_a_server_that_talks_nonsense_at_the_start_means_offline(
    fault, stub: WandbStub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub.faults["UpsertBucket"] = [fault] * 50
    begin = time.monotonic()
    sinks = train(tmp_path, WandbTracker(tmp_path, mode="online"))
    assert time.monotonic() - begin < 100, "training waited for the server"
    sinks.finish({})
    (folder,) = [folder for folder in offline_runs(tmp_path) if folder.name.startswith("offline-run-")]
    assert [row["train/step"] for row in rows_of(folder)] == [1, 2, 3, 4, 5]
    (warning,) = warnings(caplog)
    assert "logging offline" in warning and DUMMY_KEY not in caplog.text


@pytest.mark.fault(91)
def test_online_attempts_are_one_run_and_a_stop_at_a_notice_is_no_crash(stub: WandbStub, tmp_path: Path) -> None:
    sinks = train(tmp_path, WandbTracker(tmp_path, mode="online"))
    sinks.preempted()
    sinks.preempted()
    sinks.finish({})
    (run,) = stub.runs.values()
    assert (run.preempting, run.exit_code) == (True, 1), "which W&B shows as preempted"
    (summary,) = [run.summary]
    assert summary["train/step"] == 5
    wandb.teardown()

    sinks = train(tmp_path, WandbTracker(tmp_path, mode="online"), 3)
    sinks.log({"train/step": 4, "train/loss": 1.0, "train/spike": 1.0})
    sinks.log({"train/step": 5, "train/loss": 1.0, "train/spike": 1.0})
    sinks.finish({})
    (again,) = stub.runs.values()
    assert again is run and run.exit_code == 0 and "RunResumeStatus" in stub.operations
    assert [row["train/step"] for row in run.rows] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    (alert,) = [alert for alert in stub.alerts if alert["title"] == "Loss spike"]
    assert "step 4" in alert["text"]


CRASH = """
import logging, os, sys
from pathlib import Path
from phi3v_dist.observe.tracker import AllOf, JsonlTracker
from phi3v_dist.observe.wandb_tracker import WandbTracker
logging.basicConfig(level=logging.INFO)
run = Path(sys.argv[1])
key = os.environ["WANDB_API_KEY"]
sinks = AllOf(JsonlTracker(run, 1), [WandbTracker(run)])
sinks.start({"data": {"url": f"https://user:{key}@example.org/a.tar", "other": [os.environ["HF_TOKEN"]]}})
sinks.log({"train/step": 1, "train/loss": 1.0})
raise RuntimeError("a crash")
"""


@pytest.mark.fault(92)
def test_no_file_of_a_crashed_run_holds_a_key_of_argv_environment_or_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, token = "canary0wandb" * 3 + "0000", "hf_canary1huggingface4711"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HF_TOKEN", token)
    words = [sys.executable, "-c", CRASH, str(tmp_path / "run"), f"some.key={key}", token]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "a crash" in done.stderr
    (folder,) = offline_runs(tmp_path / "run")
    assert len(rows_of(folder)) == 1, "a crash loses no row"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if any(word.encode() in path.read_bytes() for word in (key, token))] == []
    assert logging.getLogger("wandb").propagate is False or "wandb:" not in done.stderr
