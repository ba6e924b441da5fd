"""What tests of the W&B sink share: a client that knows nobody, a short training, and what was written, read back."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
from wandb_stub import WandbStub

from phi3v_dist.observe.tracker import AllOf, JsonlTracker
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


@pytest.fixture
def stub(fresh_client: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStub]:
    """A server that the client believes in, with a key for it."""
    with WandbStub() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", DUMMY_KEY)
        yield server


def train(run: Path, tracker: WandbTracker, steps: int = 5, attempt: int = 1) -> AllOf:
    sinks = AllOf(JsonlTracker(run, attempt), [tracker])
    sinks.start({"train": {"steps": steps}})
    for step in range(1, steps + 1):
        sinks.log({"train/step": step, "train/loss": 3.0 / step})
    return sinks


def offline_runs(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("*run-2*"))


def running_services() -> list[psutil.Process]:
    """The client's service, as soon as the sink's thread has started it; none after a second."""
    for _ in range(20):
        children = psutil.Process().children()
        if found := [c for c in children if "wandb-core" in c.name() and c.status() != psutil.STATUS_ZOMBIE]:
            return found
        time.sleep(0.05)
    return []


def records(folder: Path) -> list[dict[str, Any]]:
    """What the real client wrote, by its own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    return [json.loads(line) for line in output.splitlines()]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records(folder) if record["type"] == "history"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we said at WARNING and above."""
    return [r.getMessage() for r in caplog.records if r.levelname != "INFO" and r.name.startswith("phi3v_dist")]
