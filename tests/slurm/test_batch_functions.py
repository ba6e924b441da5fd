"""Functions of slurm/job.sh and cluster.sh, each alone, with stand-ins for Slurm's programs. Needs no Slurm."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
REFUSED = "slurm_update error: Requested operation is presently disabled"


class Shell:
    """bash with the functions, and a folder of stand-ins first on PATH; `calls` is what they were started with."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.stand_in("sleep", "exit 0")
        for name in ("scontrol", "squeue", "scancel"):
            self.stand_in(name, "exit 0")

    def stand_in(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{self.folder}/calls\n{body}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    def run(self, script: str, **env: str) -> subprocess.CompletedProcess[str]:
        base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PHI3V"))}
        ours = {"SLURM_JOB_ID": "12", "SLURMD_NODENAME": "node1", "PATH": f"{self.bin}:{base['PATH']}"}
        prelude = "set -eEuo pipefail; source slurm/cluster.sh; source slurm/job.sh; container=() inside=();"
        return subprocess.run(
            ["bash", "-c", f"{prelude} run={self.folder}; {script}"], cwd=REPOSITORY, env=base | ours | env,
            capture_output=True, text=True, timeout=240, start_new_session=True,
        )  # fmt: skip

    def says(self, script: str, **env: str) -> str:
        done = self.run(script, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def shell(tmp_path) -> Shell:
    return Shell(tmp_path)


def fails_first(times: int, message: str, then: str = "exit 0") -> str:
    """A program that fails so often with a message."""
    return (
        f'n=$(cat "$0.count" 2>/dev/null || echo 0); echo $((n + 1)) >"$0.count"\n'
        f'((n >= {times})) || {{ echo "{message}" >&2; exit 1; }}\n{then}'
    )


@pytest.mark.parametrize(
    ("shown", "seconds"),
    [("0:30", "30"), ("10:00", "600"), ("1:02:03", "3723"), ("2-01:00:08", "176408"), ("08:09", "489"),
     ("UNLIMITED", ""), ("NOT_SET", ""), ("INVALID", ""), ("a[$(touch fired)]", "")],
)  # fmt: skip
def test_the_time_left_is_read_as_slurm_shows_it(shell, shown, seconds):
    shell.stand_in("squeue", f"echo '{shown}'")
    assert shell.says("seconds_left") == seconds


def knows(state: str = "RUNNING", restarts: int = 0, excluded: str = "") -> str:
    """What squeue says of the job."""
    return f"case $* in *%T*) echo {state} ;; *Restart*) echo '  {restarts}  ' ;; *%x*) echo '{excluded}' ;; esac"


def test_a_controller_that_is_away_is_waited_for(shell):
    shell.stand_in("squeue", fails_first(3, AWAY, then=knows()))
    assert shell.says("known --format=%T") == "RUNNING"
    assert len(shell.calls("squeue")) == 4


def test_what_slurm_refuses_is_said_once(shell):
    shell.stand_in("scontrol", f"echo '{REFUSED}' >&2; exit 1")
    done = shell.run("insist scontrol requeue 12 || echo refused")
    assert done.stdout.strip() == "refused" and done.stderr.count(REFUSED) == 1
    assert len(shell.calls("scontrol")) == 1


@pytest.mark.fault(23)
def test_a_batch_script_that_stood_still_leaves_the_next_life_of_its_job_alone(shell):
    shell.stand_in("squeue", knows(restarts=3))
    done = shell.run("come_back", SLURM_RESTART_COUNT="2")
    assert done.returncode == 0 and "runs elsewhere by now" in done.stderr
    assert shell.calls("scontrol") == []


@pytest.mark.fault(24)
def test_bad_nodes_are_left_out_and_mended_ones_forgiven_beside_those_that_the_person_left_out(shell):
    shell.stand_in("squeue", knows(excluded="n[1-3]"))
    shell.stand_in("scontrol", "[[ $2 != hostnames ]] || printf 'n1\\nn2\\nn3\\n'")
    shell.says("answer=([bad]=n7,n8 [forgive]=n2); come_back")
    assert "requeue 12" in shell.calls("scontrol")
    assert "update JobId=12 ExcNodeList=n1,n3,n7,n8" in shell.calls("scontrol")


@pytest.mark.parametrize(
    ("state", "requeued", "said"),
    [("CANCELLED", 0, "Slurm is ending the job (CANCELLED)"), ("COMPLETING", 0, "Slurm is ending the job (COMPLETING)"),
     ("PENDING", 0, "Slurm has queued the job again"), ("RUNNING", 1, "queued again, without node2")],
)  # fmt: skip
def test_only_a_running_job_is_queued_again(shell, state, requeued, said):
    shell.stand_in("squeue", knows(state))
    assert said in shell.says("answer=([bad]=node2); come_back")
    calls = shell.calls("scontrol")
    assert calls.count("requeue 12") == requeued and "update JobId=12 ExcNodeList=node2" in calls


def test_a_state_that_passes_is_not_taken_for_the_end(shell):
    shell.stand_in(
        "squeue",
        fails_first(0, "", then="") + f"\nif ((n < 2)); then {knows('NODE_FAIL')}; else {knows('PENDING')}; fi",
    )
    assert "Slurm has queued the job again" in shell.says("answer=(); come_back")


@pytest.mark.fault(9)
def test_a_term_to_all_of_the_script_loses_no_question(shell):
    """As Slurm sends it at a preemption: also to the programs that the script has started."""
    shell.stand_in("squeue", f"kill -TERM 0; /bin/sleep 0.2; {knows()}")
    script = "trap 'notice TERM' TERM; require_own_life; hosts=$(shielded hosts_of_job); "
    done = shell.run(script + "shielded known --format=%T; echo $noticed")
    assert done.stdout.split()[-2:] == ["RUNNING", "TERM"], done


def test_a_full_disk_under_the_log_keeps_no_notice_from_the_ranks(shell):
    done = shell.run("/bin/sleep 9 & step_pid=$!; notice USR1 >/dev/full; wait $step_pid || echo $?")
    assert done.stdout.strip().endswith(str(128 + 10)), done


def test_a_job_that_runs_out_of_time_after_its_notice_is_queued_again_at_once(shell):
    times = "[[ $* != *%L* ]] || { echo 0:09; exit; }"
    shell.stand_in("squeue", f"{times}\n{knows()}")
    done = shell.run("before_it_is_late; echo went on")
    assert "the ranks have not saved in time" in done.stdout and "went on" not in done.stdout
    assert shell.calls("scontrol") == ["requeue 12"]


@pytest.mark.parametrize(("shown", "told"), [("1:00:00", "3570"), ("10:00", "570"), ("9:59", ""), ("UNLIMITED", "")])
def test_ranks_are_told_how_long_a_job_has_unless_that_is_hardly_more_than_their_grace(shell, shown, told):
    shell.stand_in("squeue", f"echo {shown}")
    assert shell.says('tell_ranks; echo "${PHI3V_TIME_LEFT_S:-}"') == told


def test_how_nvidia_smi_fails_is_said(shell):
    shell.stand_in("nvidia-smi", "echo 'no driver' >&2; exit 9")
    assert "nvidia-smi fails on node1 with 9: no driver" in shell.says("count_ranks", SLURM_JOB_NODELIST="node1")


def test_a_job_too_small_for_what_it_is_to_train_on_ends(shell):
    env = {"SLURM_JOB_NUM_NODES": "3", "PHI3V_NODES": "4"}
    done = shell.run("check_size", **env)
    assert done.returncode == 2 and "is to train on 4 at least: sbatch --nodes 4" in done.stderr
    shell.says("check_size", **env, PHI3V_MIN_NODES="2")


def write_attempt(run: Path, number: int, job: str, restart: int, start: int) -> None:
    folder = run / "attempts" / f"{number:04d}"
    folder.mkdir(parents=True)
    owner = {"attempt": number, "job": job, "restart": restart, "start": start, "host": "node1"}
    (folder / "owner.json").write_text(json.dumps(owner, indent=1))


def test_the_attempt_that_is_watched_is_that_of_this_start(shell, tmp_path):
    assert shell.says("start=2; own_attempt") == ""
    write_attempt(tmp_path, 1, "12", 0, 1)
    (tmp_path / "attempts" / "0004").mkdir(parents=True)  # somebody's who has not said yet who he is
    assert shell.says("start=2; own_attempt") == ""
    write_attempt(tmp_path, 2, "12", 0, 2)
    write_attempt(tmp_path, 3, "13", 0, 2)  # another job that is refused, or was killed while it waited
    assert shell.says("start=2; own_attempt") == str(tmp_path / "attempts" / "0002")


def test_lines_that_modules_print_are_no_answers(shell):
    shell.stand_in("python", "printf 'Loading cuda/12.6\\n\\nrun=/a b=c\\n  x=1\\nfinished=no\\n'")
    assert shell.says('ask begin; echo "${answer[run]}|${answer[finished]}|${#answer[@]}"') == "/a b=c|no|2"


@pytest.mark.parametrize(
    ("nvidia_smi", "env", "ranks"),
    [
        ("", {}, 1),
        ("exit 0", {}, 1),
        ("printf 'GPU 0: H100\\nGPU 1: H100\\n'", {}, 2),
        ("printf 'GPU 0: H100\\n  MIG 1g.10gb Device 0: (UUID: x)\\n'", {}, 1),
        ("printf 'GPU 0: H100\\n'", {"SLURM_GPUS_ON_NODE": "2"}, 2),  # one of two is lost: the doctor will say so
        ("exit 0", {"SLURM_GPUS_ON_NODE": "8"}, 1),  # counted by Slurm, and not there
        ("echo 'no driver' >&2; exit 9", {"SLURM_GPUS_ON_NODE": "8"}, 8),
        ("printf 'GPU 0: H100\\n'", {"SLURM_NTASKS_PER_NODE": "4"}, 4),
        ("printf 'GPU 0: H100\\n'", {"SLURM_NTASKS_PER_NODE": "4", "PHI3V_RANKS_PER_NODE": "3"}, 3),
    ],
)  # fmt: skip
def test_ranks_are_counted_as_asked_for_or_by_gpus(shell, nvidia_smi, env, ranks):
    if nvidia_smi:
        shell.stand_in("nvidia-smi", nvidia_smi)
    assert shell.says("count_ranks; echo $ranks_per_node", **env).splitlines()[-1] == str(ranks)


@pytest.mark.parametrize("name", ["PHI3V_NODES", "PHI3V_MIN_NODES", "PHI3V_RANKS_PER_NODE"])
def test_no_nodes_and_no_ranks_are_refused(shell, name):
    done = shell.run("check_environment", **{name: "0"})
    assert done.returncode == 2 and f"{name} is '0': it must be a number from 1 on" in done.stderr


class TestDeputy:
    def start(self, shell: Shell, counter: Path) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PATH": f"{shell.bin}:{os.environ['PATH']}"}
        return subprocess.run(
            ["slurm/deputy.sh", str(counter), "12"],
            cwd=REPOSITORY,
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
        )

    @pytest.mark.fault(8)
    def test_a_batch_script_that_shows_no_life_is_queued_again_however_long_the_controller_is_away(self, shell):
        (counter := shell.folder / "alive").write_text("7")
        shell.stand_in("scontrol", fails_first(2, AWAY))
        done = self.start(shell, counter)
        assert done.returncode == 0 and "has shown no life for 180 s" in done.stdout
        assert shell.calls("scontrol") == ["requeue 12"] * 3

    def test_one_that_lives_is_left_alone_also_when_its_disk_is_away_for_a_while(self, shell):
        (counter := shell.folder / "alive").write_text("7")
        shell.stand_in(
            "cat",
            f"n=$(wc -l <{shell.folder}/calls); ((n < 1400)) || rm -f {counter}\n"
            "((n % 700 < 200)) && echo $((n / 100)) && exit 0; exit 5",  # readable for a while, then 250 looks not
        )
        done = self.start(shell, counter)
        assert done.returncode == 0 and shell.calls("scontrol") == [], done.stdout
