"""A rank ends with its exit code, whatever gloo's threads still do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment
from fork_server import REAL_PROCESS

from phi3v_dist.parallel import process_end

RANKS = Path(__file__).with_name("exit_ranks.py")


def test_ranks_that_end_while_gloo_holds_tensors_keep_their_exit_code() -> None:
    """Ended by the interpreter, 75 of 80 such ranks crashed with SIGABRT."""
    done = subprocess.run(
        [sys.executable, str(RANKS), "5", "end_process"], env=environment(**{REAL_PROCESS: "1"}), cwd=REPOSITORY,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == [3] * 10, done.stderr[-2000:]
    # Not whole lines: gloo writes to the same stream, and may end a line in the middle of another
    assert done.stdout.count("thread ended") == 10 and done.stdout.count("at exit") == 10, done.stdout


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (None, 0, ""),
        (SystemExit(), 0, ""),
        (SystemExit(7), 7, ""),
        (SystemExit("a message"), 1, "a message\n"),
        (ValueError("wrong"), 1, "ValueError: wrong\n"),
    ],
)
def test_an_exception_gives_the_exit_code_and_message_that_the_interpreter_gives(
    error, exit_code, message, monkeypatch, capsys
) -> None:
    class Ended(Exception):
        pass

    def end(code: int) -> None:
        assert code == exit_code
        raise Ended

    monkeypatch.setattr(process_end, "end_process", end)
    with pytest.raises(Ended):
        process_end.end_as_interpreter(error)
    assert capsys.readouterr().err == message
