"""Programs that the fork server starts are what `subprocess.Popen` starts without it."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import TESTS, environment
from fork_server import REAL_PROCESS

PROGRAM = TESTS / "fork_server_ranks.py"
TIMEOUT_S = 240


def start(*words: object, env: dict[str, str], **popen: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, **popen)


@pytest.mark.parametrize("new_session", [False, True])
def test_a_forked_program_has_the_surroundings_of_an_executed_one(tmp_path, new_session):
    def facts(**extra: str) -> tuple[dict, str, str, int]:
        done = start(
            "facts", "file name", env=environment(SOME_VALUE="x=1\n", **extra), cwd=tmp_path, input="some words",
            start_new_session=new_session,
        )  # fmt: skip
        return json.loads((tmp_path / "file name").read_text()), done.stdout, done.stderr, done.returncode

    forked, *forked_streams = facts()
    executed, *executed_streams = facts(**{REAL_PROCESS: "1"})

    assert forked.pop("is forked") and not executed.pop("is forked")
    assert forked == executed and forked["parent"] == os.getpid() and forked["has own session"] == new_session
    assert forked_streams == executed_streams == ["to stdout\n", "to stderr\n", 3]


@pytest.mark.parametrize(
    ("name", "value", "is_forked"),
    [("SOME_VALUE", "1", True), ("PYTHONHASHSEED", "7", False), ("OMP_NUM_THREADS", "2", False)],
)
def test_a_program_is_forked_only_if_its_libraries_would_find_the_same_environment(tmp_path, name, value, is_forked):
    start("facts", tmp_path / "facts", env=environment(**{name: value}), stdin=subprocess.DEVNULL)
    assert json.loads((tmp_path / "facts").read_text())["is forked"] == is_forked


def test_a_signal_ends_a_forked_program():
    with subprocess.Popen([sys.executable, str(PROGRAM), "wait"], env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=TIMEOUT_S) == -signal.SIGTERM


def test_an_error_of_a_forked_program_is_printed_and_is_exit_code_1():
    done = start("fail", env=environment())
    assert done.returncode == 1 and done.stderr.endswith("ValueError: this one\n")


def test_ranks_of_a_forked_launcher_are_forked_and_its_children(tmp_path):
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", str(PROGRAM), "facts", str(tmp_path / "{rank}")]
    with subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL) as launcher:
        assert launcher.wait(timeout=TIMEOUT_S) == 0
    for rank in range(2):
        facts = json.loads((tmp_path / str(rank)).read_text())
        assert facts["is forked"] and facts["parent"] == launcher.pid
