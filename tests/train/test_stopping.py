"""Runs that are asked to stop, by signals and files, at any moment: real launchers, two ranks."""

import json
import signal
import subprocess
import time

import psutil
import pytest
from conftest import REPOSITORY, environment
from launching import TIMEOUT_S, command, launch, losses

from phi3v_dist.observe.tracker import read_metrics
from phi3v_dist.survive.retention import committed


def stopped(folder) -> dict:
    return json.loads((folder / "stopped.json").read_text())


def went_on_as_if_nothing_had_happened(root, config, name: str, reference) -> bool:
    """The same command once more: it ends, and every loss is the undisturbed run's, to the bit."""
    done = launch("torchrun", config, f"run.name={name}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not (root / name / "stopped.json").exists() and (root / name / "summary.json").exists()
    return losses(root / name) == losses(reference)


@pytest.mark.fault(9)
@pytest.mark.parametrize("fault", ["1:forward:5:term", pytest.param("0:optimizer:6:usr1", marks=pytest.mark.slow)])
@pytest.mark.supports("stop", on="2 ranks")
def test_a_notice_to_any_one_rank_stops_all_after_the_same_step_and_nothing_is_lost(launched, reference, fault):
    config, root = launched
    name = "noticed-" + fault.split(":")[-1]
    done = launch("torchrun", config, f"run.name={name}", fault=fault)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    step = int(fault.split(":")[2])
    assert stopped(root / name)["step"] == step
    assert f"stopped after step {step}, saved" in done.stdout
    assert went_on_as_if_nothing_had_happened(root, config, name, reference)
    attempts = [row["run/attempt"] for row in read_metrics(root / name) if "train/loss" in row]
    assert attempts == [1] * step + [2] * (10 - step), "no step was done twice"


@pytest.mark.slow
@pytest.mark.fault(9)
def test_a_run_stops_by_itself_before_the_time_of_its_job_is_up(launched, monkeypatch):
    config, root = launched
    folder, time_left_s = root / "limited", 60
    monkeypatch.setenv("PHI3V_TIME_LEFT_S", str(time_left_s))
    began_s = time.monotonic()
    done = launch("torchrun", config, "run.name=limited", "train.steps=100000", "checkpoint.grace_s=25")
    took_s = time.monotonic() - began_s
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = max(losses(folder))
    assert stopped(folder) == {"step": last, "why": "the job's time limit", "notice": True, "attempt": 1}
    assert took_s < time_left_s and f"stopped after step {last}, saved (the job's time limit)" in done.stdout
    assert [path.name for path in committed(folder / "checkpoints")][0] == f"step-{last:08d}"


@pytest.mark.slow
@pytest.mark.fault(3)
@pytest.mark.supports("checkpoint.local", "killed", on="2 ranks")
def test_a_run_whose_rank_died_goes_on_from_the_copies_on_its_nodes(launched, reference, monkeypatch, tmp_path):
    config, root = launched
    local = (f"checkpoint.local={tmp_path}", "checkpoint.every_steps=2")
    monkeypatch.setenv("PHI3V_FAULT", "1:backward:8:kill9")
    assert launch("torchrun", config, "run.name=copied", *local).returncode
    monkeypatch.delenv("PHI3V_FAULT")
    assert [path.name for path in committed(root / "copied" / "checkpoints")] == ["step-00000002"]
    done = launch("torchrun", config, "run.name=copied", *local)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"continuing from {tmp_path}" in done.stdout and losses(root / "copied") == losses(reference)
    assert committed(root / "copied" / "checkpoints")[0].name == "step-00000010" and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.fault(10)
def test_more_notices_during_the_save_change_nothing(launched):
    config, root = launched
    faults = "*:forward:3:term,*:snapshot:3:term,*:write:3:usr1,0:commit:3:term"
    done = launch("torchrun", config, "run.name=insisted", fault=faults)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert stopped(root / "insisted") == {"step": 3, "why": "SIGTERM", "notice": True, "attempt": 1}


@pytest.mark.slow
def test_a_notice_during_an_evaluation_gives_it_up_and_saves(launched):
    config, root = launched
    words = ("run.name=evaluating", "eval.every_steps=3", "eval.batch_samples=1")
    done = launch("torchrun", config, *words, fault="1:evaluate:0:usr1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert stopped(root / "evaluating")["step"] == 3
    assert "the evaluation of step 3 was given up" in done.stdout
    assert not (root / "evaluating" / "eval" / "step-000003" / "scores.json").exists()


def test_a_file_saves_now_and_another_stops(launched):
    config, root = launched
    folder = root / "by-file"
    process = subprocess.Popen(
        command("torchrun", config, "run.name=by-file", "train.steps=100000", "checkpoint.every_steps=100000"),
        cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: len(losses(folder)) >= 2, process)
        (folder / "SAVE").touch()
        wait_for(lambda: list((folder / "checkpoints").glob("step-*/manifest.json")), process)
        assert not (folder / "SAVE").exists()
        (folder / "STOP").touch()
        output = process.communicate(timeout=TIMEOUT_S)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]
    assert stopped(folder)["step"] == max(losses(folder)) and not (folder / "STOP").exists()


@pytest.mark.slow
@pytest.mark.fault(9)
def test_torchrun_that_is_told_to_end_lets_the_ranks_save(launched):
    config, root = launched
    folder = root / "launcher"
    process = subprocess.Popen(
        command("torchrun", config, f"run.name={folder.name}", "train.steps=100000", "checkpoint.every_steps=100000"),
        cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: len(losses(folder)) >= 2, process)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=TIMEOUT_S)[0]
    finally:
        process.kill()
    assert stopped(folder)["why"] == "SIGTERM", output[-3000:]
    assert (folder / "checkpoints" / f"step-{stopped(folder)['step']:08d}" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.fault(19)
def test_a_second_job_in_the_same_folder_is_refused_and_the_first_goes_on(launched):
    config, root = launched
    folder = root / "twice"
    process = subprocess.Popen(
        command("single", config, "run.name=twice", "train.steps=100000"), cwd=REPOSITORY, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: losses(folder), process)
        refused = launch("single", config, "run.name=twice", "train.steps=100000")
        assert refused.returncode == 13 and f"in use by attempt 1, process {process.pid}" in refused.stderr
        before = len(losses(folder))
        wait_for(lambda: len(losses(folder)) > before, process)
    finally:
        process.kill()
        process.communicate()


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline_s, [p.cmdline() for p in psutil.Process(process.pid).children(True)]
        time.sleep(0.2)


@pytest.mark.fault(100)
def test_a_finished_run_started_again_says_so_and_changes_nothing(launched, reference):
    config, _ = launched
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    done = launch("single", config, "run.name=reference", "observe.wandb=offline")
    assert done.returncode == 0 and "reference is finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()} == before


def test_a_stop_file_that_was_there_before_stops_the_run_before_its_first_step(launched):
    config, root = launched
    folder = root / "stopped-before"
    folder.mkdir(parents=True)
    (folder / "STOP").touch()
    done = launch("single", config, "run.name=stopped-before")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert stopped(folder)["step"] == 0 and not (folder / "STOP").exists() and not losses(folder)
