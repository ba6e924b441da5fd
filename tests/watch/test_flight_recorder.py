"""Ranks with NCCL are asked for what they recorded before they are killed; those without cost no time."""

import os
import select
import threading

import pytest

from phi3v_dist.watch import flight_recorder

TIMEOUT_S = 300  # however busy the machine is


@pytest.fixture
def attempt_folder(tmp_path):
    folder = tmp_path / "attempts" / "0002"
    folder.mkdir(parents=True)
    (tmp_path / "nccl").mkdir()
    return folder


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """Seconds for which the recorder has waited, one by one; no real time passes."""
    waits = []
    monkeypatch.setattr(flight_recorder.time, "monotonic", lambda: 100 + sum(waits))
    monkeypatch.setattr(flight_recorder.time, "sleep", waits.append)
    return waits


def listens(run, rank: int, answers: bool = True) -> threading.Thread:
    """As PyTorch does it: makes the pipe, opens it without blocking, and dumps when it is written to."""
    pipe = run / "nccl" / f"pipe_{rank}.pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def dump() -> None:
        if select.select([reader], [], [], TIMEOUT_S)[0] and answers:
            (run / "nccl" / f"trace_{rank}").write_bytes(b"dump of rank %d" % rank)
        os.close(reader)

    thread = threading.Thread(target=dump)
    thread.start()
    return thread


@pytest.mark.fault(87)
def test_a_rank_is_asked_and_its_dump_kept_with_the_attempt(tmp_path, attempt_folder):
    (tmp_path / "nccl" / "trace_3").write_bytes(b"of an earlier attempt")
    thread = listens(tmp_path, 3)
    flight_recorder.ask(attempt_folder, [3, 4])
    thread.join()
    assert (attempt_folder / "nccl_trace_rank_3").read_bytes() == b"dump of rank 3"
    assert not (tmp_path / "nccl" / "trace_3").exists() and not (attempt_folder / "nccl_trace_rank_4").exists()


def test_a_rank_that_does_not_answer_is_not_waited_for_long(tmp_path, attempt_folder, slept):
    thread = listens(tmp_path, 0, answers=False)
    flight_recorder.ask(attempt_folder, [0])
    thread.join()
    assert flight_recorder.DUMPED_S <= sum(slept) < flight_recorder.DUMPED_S + 1
    assert list(attempt_folder.iterdir()) == []


def test_pipes_without_a_reader_and_plain_files_are_left_alone(tmp_path, attempt_folder, slept):
    os.mkfifo(tmp_path / "nccl" / "pipe_0.pipe")
    (tmp_path / "nccl" / "pipe_1.pipe").write_bytes(b"x")
    flight_recorder.ask(attempt_folder, [0, 1, 2])
    assert not slept
    assert (tmp_path / "nccl" / "pipe_1.pipe").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ({}, {"TORCH_FR_BUFFER_SIZE": "2000"}),
        ({"TORCH_FR_BUFFER_SIZE": "0"}, {"TORCH_FR_BUFFER_SIZE": "0"}),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "50"}, {"TORCH_NCCL_TRACE_BUFFER_SIZE": "50"}),
    ],
)
def test_a_users_own_buffer_size_wins_under_its_present_and_its_old_name(tmp_path, monkeypatch, users, expected):
    monkeypatch.setattr(os, "environ", dict(users))
    flight_recorder.record(tmp_path)
    assert {name: value for name, value in os.environ.items() if name.endswith("BUFFER_SIZE")} == expected
