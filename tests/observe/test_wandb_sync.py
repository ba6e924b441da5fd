"""Offline runs uploaded to a stub of the server: one folder at a time, looked at before and counted after."""

import re
import sys
import time
from pathlib import Path

import pytest
import wandb
from wandb_stub import WandbStub, answer
from wandb_world import DUMMY_KEY, fresh_client, offline_runs, stub, train  # noqa: F401

from phi3v_dist.cli import dashboard as script
from phi3v_dist.errors import ConfigError, Phi3VError
from phi3v_dist.observe import wandb_sync
from phi3v_dist.observe.wandb_tracker import WandbTracker


def write_attempts(run: Path, number: int) -> list[Path]:
    """Offline folders of a run of so many attempts, each of the steps 1 to 5."""
    for attempt in range(1, number + 1):
        if attempt > 1:
            time.sleep(1.1)  # a folder is named by its second
        train(run, WandbTracker(run), attempt=attempt).finish({})
    wandb.teardown()
    return offline_runs(run)


def dashboard(monkeypatch: pytest.MonkeyPatch, *words: object) -> list[str]:
    """The script in this process; the problems it ends with."""
    monkeypatch.setattr(sys, "argv", ["dashboard.py", *map(str, words)])
    try:
        script.run_command()
    except Phi3VError as error:
        assert error.exit_code != 0
        return error.problems
    return []


def flip_a_byte(file: Path) -> None:
    """In the middle of the rows, which come after the definitions of all metrics."""
    content = bytearray(file.read_bytes())
    rows = [found.start() for found in re.finditer(b"train/loss", content)]
    content[rows[len(rows) // 2 + 1]] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.supports("wandb offline", on="one process")
def test_one_damaged_of_three_attempts_is_named_and_the_others_arrive_row_for_row(
    stub: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first, second, third = write_attempts(run, 3)
    (file,) = second.glob("*.wandb")
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    stub.faults["UpsertBucket"] = [answer(429)]
    stub.faults["file_stream"] = [answer(500)]
    problems = dashboard(monkeypatch, "--sync", run)
    (kept,) = stub.runs.values()
    assert [(row["run/attempt"], row["train/step"]) for row in kept.rows] == [
        (attempt, step) for attempt in (1, 3) for step in range(1, 6)
    ]
    damaged, lost = problems
    assert str(second) in damaged and "cannot be read" in damaged
    assert "5 of 15 rows of metrics.jsonl are in none of its W&B folders (attempt 2: steps 1 to 5)" in lost
    said = capsys.readouterr().out
    assert said.index(first.name) < said.index(third.name) and "10 rows here, 10 on the server" in said

    file.write_bytes(whole)  # found again: what was uploaded before is not sent twice
    assert dashboard(monkeypatch, "--sync", run) == []
    assert len(kept.rows) == 15 and capsys.readouterr().out.count("uploaded before") == 2


def test_an_attempt_damaged_in_the_middle_is_sent_as_far_as_it_can_be_read_and_named(
    stub: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (folder,) = write_attempts(run, 1)
    flip_a_byte(next(folder.glob("*.wandb")))
    problems = dashboard(monkeypatch, "--sync", run)
    assert any(str(folder) in line and "damaged" in line for line in problems)
    assert any("rows of metrics.jsonl are in none" in line for line in problems)
    (kept,) = stub.runs.values()
    assert 0 < len(kept.rows) < 5 and [row["train/step"] for row in kept.rows] == list(range(1, len(kept.rows) + 1))


def test_rows_that_the_server_loses_are_counted_and_the_next_run_folder_is_uploaded_all_the_same(
    stub: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_attempts(one, 1)
    write_attempts(two, 1)
    stub.lose = lambda offset: offset == 4
    problems = dashboard(monkeypatch, "--sync", one, tmp_path / "nothing", two)
    assert len(stub.runs) == 2
    assert ["1 of 5 rows did not arrive" in line for line in problems] == [True, False, True]
    assert "nothing to upload, there is no such folder" in problems[1]


def test_a_server_that_refuses_the_upload_is_no_success(
    stub: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    write_attempts(run, 1)
    stub.faults["UpsertBucket"] = [answer(403)] * 50
    (problem,) = dashboard(monkeypatch, "--sync", run)
    assert "5 of 5 rows did not arrive" in problem and "ERROR scripted" in problem and DUMMY_KEY not in problem


@pytest.mark.parametrize("content", [None, bytes(40_000)])
def test_what_is_no_wandb_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "wandb" / "offline-run-20260101_000000-abcd1234"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "run-abcd1234.wandb").write_bytes(content)
    look = wandb_sync.inspect(folder)
    assert look.rows == 0 and "cannot be read" in look.damage and "Traceback" not in look.damage


def test_a_folder_without_wandb_runs_is_a_mistake_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no wandb"):
        wandb_sync.folders(tmp_path)
