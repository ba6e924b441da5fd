"""slurm-sim and its fixture: a cluster that behaves like one, that ends without a trace, and says what is wrong."""

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import pytest_terminal_summary

from slurm import conftest
from slurm.cluster import TOOL, Cluster

NOBODY = 65534
DOWN_S = 60  # measured: 8 s
SEND = """
import socket, sys, time
if sys.argv[1] == "receive":
    server = socket.create_server(("", 7777))
    print("listening", flush=True)
    peer, _ = server.accept()
    while peer.recv(1 << 20):
        pass
else:
    with socket.create_connection(("node1", 7777)) as peer:
        began = time.monotonic()
        peer.sendall(bytes(3_000_000))
        peer.shutdown(socket.SHUT_WR)
        peer.recv(1)
        print(24 / (time.monotonic() - began))
"""


def own_folder() -> Path:
    return Path(f"/tmp/slurm-{secrets.token_hex(3)}")


@pytest.fixture(scope="module")
def other(slurm_cluster):
    """A second cluster beside that of the session, which notices silent nodes sooner."""
    fast = {"SLURM_SIM_NODE_TIMEOUT": "3", "SLURM_SIM_MESSAGE_TIMEOUT": "3"}
    cluster = Cluster(own_folder(), 2, fast)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def test_every_node_has_its_own_name_memory_disk_and_programs(slurm, tmp_path):
    slurm.program("node2", "nvidia-smi", "#!/bin/sh\necho only here\n")
    look = f"""cd {tmp_path}
        for folder in /dev/shm {slurm.folder}/local .; do hostname > $folder/who.$SLURM_PROCID; done
        sleep 1  # all have written
        echo $(hostname) {slurm.folder}/local/who.* /dev/shm/who.* who.* $(ip -o -4 addr show eth0 | wc -l) \\
          $CUDA_VISIBLE_DEVICES $(command -v nvidia-smi && nvidia-smi)"""
    words = ("--nodes=3", "--exclusive", "--gpus-per-node=2", "--wrap", f"srun bash -c '{look}'")
    job = slurm.sbatch(*words)
    slurm.wait(job, "COMPLETED")
    local, shared = f"{slurm.folder}/local/who", "who.0 who.1 who.2"
    program = {"node2": f" {slurm.folder}/bin/nvidia-smi only here"}
    assert sorted(slurm.output(job).splitlines()) == [
        f"node{n + 1} {local}.{n} /dev/shm/who.{n} {shared} 1 0,1{program.get(f'node{n + 1}', '')}" for n in range(3)
    ]
    assert not list(Path("/dev/shm").glob("who.*"))


def test_a_slow_link_lets_through_what_it_was_told(slurm):
    def mbit_per_s() -> float:
        receiver = subprocess.Popen(
            [TOOL, "on", "node1", sys.executable, "-c", SEND, "receive"],
            env=slurm.environment(),
            stdout=subprocess.PIPE,
        )
        assert receiver.stdout.readline() == b"listening\n"
        sent = float(slurm.on("node2", sys.executable, "-c", SEND, "send"))
        receiver.communicate(timeout=240)
        return sent

    slurm.slow("node2", 20)
    slowed = mbit_per_s()
    slurm.heal("node2")
    assert slowed < 30
    assert mbit_per_s() > 2 * slowed


def test_a_reset_cluster_is_as_good_as_new(slurm):
    running = slurm.sbatch("--wrap", "trap '' TERM; while :; do sleep 0.2; done")
    slurm.wait(running, "RUNNING")
    waiting = slurm.sbatch("--hold", "--wrap", "true")
    slurm.program("node2", "nvidia-smi", "#!/bin/sh\n")
    slurm.kill("node4")
    slurm.freeze("node3")
    slurm.cut("node2")
    slurm.drain("node1", "test")
    slurm.reset()
    assert slurm.nodes() == {f"node{n}": "idle" for n in range(1, 5)}
    assert slurm.state(running) in ("FAILED", "CANCELLED") and slurm.state(waiting) == "CANCELLED"
    assert slurm.on("node2", "sh", "-c", "command -v nvidia-smi || echo none") == "none"
    assert slurm.on("node3", "hostname") == "node3"


def test_a_wait_that_cannot_succeed_ends_with_what_the_job_said(slurm):
    job = slurm.sbatch("--wrap", "echo something went wrong; exit 7")
    began = time.monotonic()
    with pytest.raises(AssertionError, match="(?s)COMPLETED.*idle.*ExitCode=7:0.*something went wrong"):
        slurm.wait(job, "COMPLETED", timeout_s=100)
    assert time.monotonic() - began < 90


def test_clusters_do_not_see_each_other(slurm, other):
    job = slurm.sbatch("--wrap", "sleep 60")
    slurm.wait(job, "RUNNING")
    assert other.client("squeue", "-h") == ""
    assert list(other.nodes()) == ["node1", "node2"]
    listed = other.tool("list")
    assert f"{slurm.folder}  4 nodes  owner {os.getpid()}\n" in listed + "\n" and str(other.folder) in listed


def test_a_node_without_power_is_down_and_comes_back(other):
    survivor = subprocess.Popen([TOOL, "on", "node2", "sleep", "60"], env=other.environment())
    other.kill("node2")
    assert survivor.wait(timeout=240) != 0
    other.until("node2 is down", lambda: other.nodes()["node2"].startswith("down"), DOWN_S)
    assert other.nodes()["node1"] == "idle"
    other.reset()
    assert other.on("node2", "hostname") == "node2"


def traces(folder: Path, namespaces: set[str]) -> list[str]:
    """Processes that know the folder or live in one of the namespaces, mounts and files."""
    found = [str(path) for path in folder.parent.glob(f"{folder.name}*")]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            known = str(folder).encode() in (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            if known or os.readlink(process / "ns/net") in namespaces:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.parametrize("end", ["down", "owner killed"])
def test_a_cluster_ends_without_a_trace(slurm_cluster, end):
    owner = subprocess.Popen(["sleep", "600"])
    cluster = Cluster(own_folder(), 2, {"SLURM_SIM_OWNER": str(owner.pid)})
    try:
        cluster.up()
        namespaces = {
            os.readlink(f"/proc/{path.read_text().split()[0]}/ns/net") for path in cluster.folder.glob("run/*")
        }
        namespaces.discard(os.readlink("/proc/self/ns/net"))
        assert len(namespaces) == 3
        job = cluster.sbatch("--wrap", "trap '' TERM; setsid sleep 600 & sleep 600")
        cluster.wait(job, "RUNNING")
        person = subprocess.Popen(["srun", "-N2", "sleep", "600"], env=cluster.environment(), stderr=subprocess.DEVNULL)
        if end == "down":
            cluster.freeze("node1")
            cluster.down()
        else:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
        person.wait(timeout=240)
        deadline = time.monotonic() + 30
        while (left := traces(cluster.folder, namespaces)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    finally:
        cluster.down()
        owner.kill()
        owner.wait()


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (["up", "0"], {}, "N must be 1..200, got 0"),
        (["up"], {"SLURM_SIM_DIR": "/tmp/" + "long" * 20}, "has 85 characters, at most 64"),
        (["up"], {"SLURM_SIM_DIR": "/tmp/two words"}, "only letters, digits"),
        (["up"], {"SLURM_SIM_DIR": "/usr/share"}, "/usr/share exists and is not a slurm-sim state folder"),
        (["up"], {"SLURM_SIM_REQUEUE_DELAY": "2"}, "less than 5"),
        (["up"], {"SLURM_SIM_OWNER": "999999999"}, "999999999 is not running"),
        (["down", "all"], {}, "no option all; only --all"),
        (["exec", "true"], {}, "ctl is not running"),
        (["kill", "node9"], {}, "no node node9"),
        (["slow", "node1"], {}, "no node node1"),
        (["fly"], {}, "usage: slurm-sim COMMAND"),
    ],
)  # fmt: skip
def test_wrong_use_is_told(slurm_cluster, words, env, message):
    folder = own_folder()
    env = {"PATH": os.environ["PATH"], "SLURM_SIM_DIR": str(folder)} | env
    done = subprocess.run([TOOL, *words], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert not list(folder.parent.glob(f"{folder.name}*"))


def test_what_is_missing_is_told_at_once(slurm_cluster, tmp_path):
    for name in ("bash", "uname", "id"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    script = tmp_path / "slurm-sim"
    script.write_text(TOOL.read_text())
    command, env = ["/usr/bin/env", "bash", script, "check"], {"PATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "sbatch nsenter" in done.stderr and "apt-get install --no-install-recommends slurmctld slurmd" in done.stderr
    as_nobody = ["bash", "-s", "check"]
    done = subprocess.run(
        as_nobody, input=TOOL.read_text(), user=NOBODY, cwd="/", capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1 and "must be root" in done.stderr


def test_absent_slurm_is_a_loud_skip_and_a_failure_in_ci(monkeypatch):
    """Needs no Slurm itself."""
    monkeypatch.setattr(conftest, "why_not", lambda: "slurmctld not found: apt-get install slurmctld")
    cluster = conftest.slurm_cluster.__wrapped__
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="slurmctld not found") as skipped:
        next(cluster())
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must run the Slurm tests: slurmctld not found"):
        next(cluster())
    said, reports = [], [SimpleNamespace(longrepr=("conftest.py", 1, f"Skipped: {skipped.value}"))] * 2
    reporter = SimpleNamespace(
        section=lambda title, **_: said.append(title), line=said.append, stats={"skipped": reports}
    )
    pytest_terminal_summary(reporter)
    assert said == ["NOT RUN: the Slurm tests", "because slurmctld not found: apt-get install slurmctld"]
