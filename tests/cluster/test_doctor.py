"""launch/doctor.py as people and jobs start it: two machines by name, wrong words, settings that cannot be read."""

import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from conftest import REPOSITORY, environment

from phi3v_dist.cli import doctor
from phi3v_dist.cluster.findings import summarize
from phi3v_dist.cluster.report import read_reports
from phi3v_dist.errors import ConfigError

TIMEOUT_S = 240


def start(host: str, rank: int, config, *words: str) -> subprocess.Popen:
    """On a machine of that name, as far as processes can tell, as one of two."""
    command = f'hostname {host} && exec "$0" launch/doctor.py "$@"'
    env = environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_PORT="4711")
    return subprocess.Popen(
        ["unshare", "--uts", "sh", "-c", command, sys.executable, "--config", str(config), *words],
        cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_by_hand_on_two_machines_the_first_process_prints_one_table(config_file, tmp_path):
    if os.getuid() != 0 or subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("naming a machine needs root")
    both = [start(f"node{rank}", rank, config_file) for rank in range(2)]
    outputs = [process.communicate(timeout=TIMEOUT_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    table = outputs[0][0]
    assert re.search(r"ok +GPUs +none\n", table) and re.search(r"ok +sum +a sum over 2 nodes is right\n", table)
    assert table.endswith("2 nodes of 2 fit to train on\n") and outputs[1][0].strip() == "node1: ok"
    reports = read_reports(tmp_path / "runs" / "run" / "preflight")
    assert [report.host for report in reports] == ["node0", "node1"]
    assert sum(check.seconds for check in reports[0].checks if check.name != "network") < 200
    assert not list((tmp_path / "runs" / "run" / "preflight").glob(".clock*"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--token", "../x"], "--token is '../x': it must be letters"),
        (["--token", ""], "--token is ''"),
        (["--ranks-per-node", "0"], "--ranks-per-node is 0: it must be at least 1"),
        (["--wait-s", "-1"], "--wait-s is -1.0"),
        (["--wait-s", "nan"], "--wait-s is nan"),
        (["--limit-s", "1"], "--limit-s is 1.0"),
        (["--limit-s", "nan"], "--limit-s is nan"),
        (["train.stepz=3"], "train.stepz"),
    ],
)
def test_wrong_words_are_refused_by_name(words, message, config_file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--config", str(config_file), *words])
    with pytest.raises(ConfigError, match=re.escape(message)):
        doctor.run_command()


def test_a_node_that_cannot_read_its_settings_reports_that(tmp_path, monkeypatch):
    words = ["--config", str(tmp_path / "gone.yaml"), "--report", str(tmp_path / "preflight"), "--token", "7.0.1"]
    monkeypatch.setattr(sys, "argv", ["doctor.py", *words])
    with pytest.raises(ConfigError):
        doctor.run_command()
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers), "one would end this process later"
    (report,) = read_reports(tmp_path / "preflight")
    found = summarize([report], [report.host], "7.0.1")
    assert found.exit_code == 2 and "gone.yaml" in found.common[0].text


def test_a_report_folder_that_cannot_be_written_is_an_error_with_its_name(config_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    words = ["--config", str(config_file), "--report", str(tmp_path / "file" / "preflight"), "--token", "7.0.1"]
    monkeypatch.setattr(sys, "argv", ["doctor.py", *words])
    with pytest.raises(ConfigError, match="file/preflight: the report cannot be written"):
        doctor.run_command()


def test_it_ends_in_time_when_the_file_system_of_the_reports_does_not_answer(config_file, tmp_path):
    """A pipe that nobody writes to keeps whoever opens it, as a file server that is gone does."""
    os.mkfifo(tmp_path / f"{socket.gethostname()}.json")
    words = ["--config", str(config_file), "--report", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "launch/doctor.py", *words], cwd=REPOSITORY, env=environment(PHI3V_EXAMINE_S="6"),
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 5 and "not ended after 6 s" in done.stdout, done


def test_in_a_job_each_node_says_its_own_outcome(capsys):
    from phi3v_dist.cluster.report import DATA, Check, Report

    bad = Report("n1", "t", checks=(Check("shards", problems=("x.tar: is empty",), kind=DATA),))
    assert doctor.say(bad) == 3 and "n1: PROBLEM shards: x.tar: is empty" in capsys.readouterr().out
    assert doctor.say(Report("n1", "t", checks=(Check("limits", warnings=("few",)),))) == 0
    assert doctor.say(Report("n2", "t", checks=(Check("limits", "many"),))) == 0
    assert capsys.readouterr().out == "n1: warning limits: few\nn2: ok\n"
