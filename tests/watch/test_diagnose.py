"""phi3v-diagnose reads whatever a run left and says what happened, to whom, and what to do."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import REPOSITORY, environment

from phi3v_dist.attempt.owner import Owner, write_owner
from phi3v_dist.errors import ConfigError
from phi3v_dist.watch.attempts import read_attempts
from phi3v_dist.watch.blame import TRAIN, Actor
from phi3v_dist.watch.diagnose import diagnose
from phi3v_dist.watch.node_report import NodeReport, RankReport
from phi3v_dist.watch.verdicts import of_death, of_failure, of_hang

TIMEOUT_S = 300  # however busy the machine is


@pytest.fixture
def run(tmp_path):
    """A run on two nodes whose first attempt logged steps 1 to 6; its second one has just an owner."""
    folder = tmp_path / "quickstart"
    for number in (1, 2):
        attempt = folder / "attempts" / f"{number:04d}"
        attempt.mkdir(parents=True)
        owner = {"attempt": number, "host": "n0", "hosts": ["n0", "n1"], "world_size": 2, "machine": "another/1",
                 "pid": 1, "pid_started": 0.0, "since": f"2026-01-0{number}T10:00:00+00:00"}  # fmt: skip
        (attempt / "owner.json").write_text(json.dumps(owner))
    rows = [{"train/step": step, "run/attempt": 1 + (step > 4), "train/loss": 1.0} for step in range(1, 7)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    return folder


def culprit(phase="data", **facts) -> Actor:
    known = {"rank": 1, "host": "n1", "pid": 7, "lane": TRAIN, "step": 6, "what": "train-001.tar:00042",
             "position": (6, 1), "silent_s": 31.0, "bound_s": 30.0}  # fmt: skip
    return Actor(phase=phase, **known | facts)


def leave(run, verdict=None, status="ended", outcome="ended", hosts=("n0", "n1")) -> None:
    for rank, host in enumerate(hosts):
        ranks = [RankReport(rank, 7 + rank, 1, outcome)]
        NodeReport(host, status, ranks, verdict=verdict).write(run / "attempts" / "0002")


def says(run) -> str:
    return diagnose(run).paragraph


def test_a_hang_is_told_with_rank_host_phase_sample_and_advice(run):
    guilty = culprit(place="`_stream` (store.py, line 12)")
    leave(run, of_hang([guilty], [guilty], [], run / "attempts/0002/stacks-n1.txt", "step-00000004"), "hang")
    text = says(run)
    for word in ("Attempt 2 of quickstart", "step 6", "rank 1 on n1", "31 s", "data", "train-001.tar:00042", "_stream"):
        assert word in text, word
    assert "storage of that shard" in text and "step-00000004" in text
    facts = diagnose(run).facts
    assert facts["ending"] == "hang" and facts["blamed"][0]["what"] == "train-001.tar:00042"
    assert [(one["from_step"], one["to_step"]) for one in facts["attempts"]] == [(1, 4), (5, 6)]


@pytest.mark.parametrize("checkpoint", ["step-00000004", None])
def test_from_where_the_same_command_goes_on_is_said_only_where_there_is_a_checkpoint(run, checkpoint):
    if checkpoint is None:
        (run / "checkpoints" / "step-00000004").rmdir()
    death = of_death([culprit()], [2**30], 0, of_memory=False, checkpoint=checkpoint)
    leave(run, death, "died")
    for text in (says(run), " ".join(death.lines)):
        assert ("goes on from the last checkpoint, step-00000004" in text) == bool(checkpoint)
        assert ("no checkpoint was written yet" in text.lower()) != bool(checkpoint)
    assert diagnose(run).facts["last_checkpoint"] == checkpoint


def test_a_death_and_a_failure_are_told(run):
    leave(run, of_death([culprit()], [3 * 2**30], 8 * 2**30, of_memory=True, checkpoint="step-00000004"), "died")
    assert "killed by the kernel, probably memory" in says(run).lower()
    assert "3.0 GiB of memory; the machine has 8.0 GiB" in says(run)
    assert read_attempts(run)[-1].verdict.verdict.of_memory
    leave(run, of_failure(culprit(), "data: 1 problem\n  - no such shard"), "failed")
    assert "Data: 1 problem. No such shard." in says(run) and "Mend what the error names" in says(run)


@pytest.mark.fault(8)
def test_a_lost_node_is_named(run):
    leave(run, of_failure(culprit(rank=0, host="n0"), "Connection reset by peer"), "failed", hosts=("n0",))
    assert "No last word came from n1" in says(run) and "(ping)" in says(run)
    assert diagnose(run).facts["ending"] == "lost"


@pytest.mark.parametrize(
    "changes, alive", [({}, True), ({"pid_started": 1.0}, True), ({"start_ticks": 1}, False), ({"pid": 2**22}, False)]
)
def test_an_attempt_runs_while_its_very_process_lives(run, changes, alive):
    owner = replace(Owner.of_this_process(2, {}), **changes)
    write_owner(run / "attempts" / "0002", owner)
    assert ("is running" in says(run)) == alive


@pytest.mark.parametrize("codes, cause", [((11, 1), 1), ((11, 3), 3), ((1, 2, 11), 2), ((11, 11), 11), ((0, 0), 0)])
def test_the_exit_code_is_that_of_the_rank_that_failed_by_itself(run, codes, cause):
    ranks = [RankReport(rank, 7, 1, "failed" if code else "done", code) for rank, code in enumerate(codes)]
    NodeReport("n0", "ended", ranks).write(run / "attempts" / "0002")
    assert read_attempts(run)[-1].exit_code == cause


def test_slurms_commands_are_named_only_where_a_job_of_slurm_ran(run):
    leave(run, of_death([culprit()], [2**30], 0, of_memory=False, checkpoint=None), "died")
    assert "dmesg" in says(run) and not {"sacct", "sbatch", "sinfo"} & set(says(run).replace("(", " ").split())
    path = run / "attempts" / "0002" / "owner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"job": "4711"}))
    assert "sacct -j 4711" in says(run)


def test_checkpoints_that_could_not_be_used_are_not_named_as_the_place_to_go_on_from(run):
    report = "checkpoint: 2 problems\n  - none of the 1 checkpoints can be used\n  - /r/step-4 is damaged\n    in full."
    verdict = of_failure(culprit(phase="load", step=4), report)
    ranks = [RankReport(0, 7, 1, "failed", 4, report, "load, checkpoint of step 4")]
    NodeReport("n0", "failed", ranks, verdict=verdict).write(run / "attempts" / "0002")
    NodeReport("n1", "ended", []).write(run / "attempts" / "0002")
    (run / "metrics.jsonl").unlink()
    text = says(run)
    assert "goes on" not in text and diagnose(run).facts["last_checkpoint"] is None
    assert "ended before its first step" in text and "phase load, checkpoint of step 4" in text
    assert (
        "Checkpoint: 2 problems. (1) none of the 1 checkpoints can be used. (2) /r/step-4 is damaged in full." in text
    )
    assert "- " not in text
    saving = [RankReport(0, 7, 1, "failed", 4, report, "snapshot, step 6")]
    NodeReport("n0", "failed", saving, verdict=verdict).write(run / "attempts" / "0002")
    assert "goes on from the last checkpoint, step-00000004" in says(run), "a save that failed spoils no earlier one"


def test_stopped_finished_and_silent_ends_are_told_apart(run):
    assert "without a word" in says(run) or "No last word" in says(run)
    leave(run, outcome="stopped")
    assert "was asked to stop" in says(run)
    (run / "summary.json").write_text("{}")
    assert "finished at step 6" in says(run)


def test_a_run_of_an_older_version_without_attempts_is_told_from_its_record(tmp_path):
    run = tmp_path / "old"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"train/step": 3, "run/attempt": 1}\n{"train/st')
    assert "Attempt 1 of old ended after step 3" in says(run)
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").write_text("a: 1\n")
    assert "no attempt has logged a step" in says(run)


def test_damaged_files_do_not_hide_the_rest(run):
    leave(run, outcome="stopped")
    (run / "attempts" / "0002" / "node-n0.json").write_text('{"format": "phi3v-node-1", "host')
    (run / "attempts" / "0002" / "owner.json").write_text("[")
    (run / "attempts" / "0001" / "owner.json").write_bytes(b"\xff")
    assert "stop" in says(run)


def test_a_wrong_folder_is_an_error_with_exit_code_2(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder: there is no such folder"):
        diagnose(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a run folder: it is a file"):
        diagnose(tmp_path / "file")
    done = subprocess.run(
        [sys.executable, "launch/diagnose.py", str(tmp_path)], cwd=REPOSITORY, env=environment(), capture_output=True,
        text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 2 and "is not a run folder" in done.stderr


def test_the_command_prints_a_paragraph_and_a_table_or_json(run):
    guilty = culprit()
    leave(run, of_hang([guilty], [guilty], [], run / "attempts/0002/stacks-n1.txt", "step-00000004"), "hang")
    words = [sys.executable, "launch/diagnose.py", str(run)]
    options = {"cwd": REPOSITORY, "env": environment(COLUMNS="120"), "capture_output": True, "text": True}
    text = subprocess.run(words, **options, timeout=TIMEOUT_S).stdout
    assert "hang: rank 1 on n1, data, step 6" in text and "2026-01-02 10:00:00" in text
    facts = json.loads(subprocess.run([*words, "--json"], **options, timeout=TIMEOUT_S).stdout)
    assert facts["last_checkpoint"] == "step-00000004" and facts["attempts"][1]["hosts"] == ["n0", "n1"]


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.fault(87)
def test_a_flight_recorder_dump_is_read_without_running_anything_in_it(run):
    def dump(rank: int, pending: int) -> None:
        entries = [
            {"collective_seq_id": number, "profiling_name": "nccl:all_gather",
             "state": "completed" if number < pending else "started"} for number in range(1, 9)
        ]  # fmt: skip
        (run / f"nccl_trace_rank_{rank}").write_bytes(pickle.dumps({"version": "2.4", "entries": entries}))

    dump(0, 7)
    dump(1, 5)
    (run / "nccl").mkdir()
    (run / "nccl_trace_rank_1").rename(run / "nccl" / "trace_1")
    canary = run / "canary"
    (run / "nccl_trace_rank_2").write_bytes(pickle.dumps({"entries": [Canary(canary)]}))
    text = says(run)
    assert "rank 1 had not gone past operation 5 (nccl:all_gather)" in text
    assert "nccl_trace_rank_2 was not read: it asks for posix.mkdir" in text and not canary.exists()
