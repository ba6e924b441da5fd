"""What is found before the first step: unlike ranks, clocks, folders that cannot be written, taken ports, old locks."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment as of_process
from launching import free_port

from phi3v_dist.attempt import build_cache, environment
from phi3v_dist.cli.app import OWNER_ONLY
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.survive import durable

RANKS = Path(__file__).with_name("environment_ranks.py")
TIMEOUT_S = 240


def ranks(folder: Path, *each: dict) -> list[dict]:
    """Start one process per entry: {"steps": …, "clock": …, "path": first folder of its PYTHONPATH}."""
    shared = {"WORLD_SIZE": str(len(each)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank, its in enumerate(each):
        env = of_process(**shared, RANK=str(rank))
        env["PYTHONPATH"] = f"{its.get('path', '')}:{env['PYTHONPATH']}"
        words = [sys.executable, str(RANKS), str(folder), str(its.get("steps", 10)), str(its.get("clock", 0))]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    return [json.loads(process.communicate(timeout=TIMEOUT_S)[0].splitlines()[-1]) for process in processes]


@pytest.mark.fault(20, 21)
def test_ranks_with_other_packages_settings_or_clocks_are_named_on_every_rank(tmp_path):
    stub = tmp_path / "stub" / "transformers-0.0.1.dist-info"
    stub.mkdir(parents=True)
    (stub / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    found = ranks(tmp_path / "run", {}, {"path": stub.parent}, {"steps": 11, "clock": 3600})
    assert len({result["errors"][0] for result in found}) == 1
    (text,) = found[0]["errors"]
    assert "the ranks are not alike" in text and "transformers, settings must be the same" in text
    assert re.search(r"transformers +\S+ on 2 ranks: 0, 2 \(2 hosts: node0, node1\)", text)
    assert re.search(r"0\.0\.1 on rank 1 \(host node0\)", text)
    assert re.search(r"train\.steps +10 on 2 ranks: 0, 1 ", text) and "11 on rank 2 (host node1)" in text
    assert "python" not in text and "cache" not in text, "what is alike, or a node's own, is left out"
    (warning,) = [words for result in found for words in result["said"]]
    assert "the clock of node1 is 3600 s ahead of that of node" in warning and "does not depend on it" in warning
    assert all(3590 < result["spread"] < 3700 for result in found)


@pytest.mark.fault(20)
def test_hundreds_of_ranks_give_a_line_per_value():
    values = ["2.13.0"] * 512
    values[302:306] = ["2.12.0"] * 4
    hosts = [f"n{rank // 8:03d}" for rank in range(512)]
    assert environment._table("torch", values, hosts) == [
        "  torch            2.13.0 on 508 ranks: 0, 1, 2, 3 … (64 hosts: n000, n001, n002, n003 …)",
        "                   2.12.0 on 4 ranks: 302, 303, 304, 305 (2 hosts: n037, n038)",
    ]
    assert len(environment._table("x", [str(rank) for rank in range(512)], hosts)) == 5


@pytest.mark.fault(20)
def test_a_changed_source_file_is_seen(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = environment.digest_of_files(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert environment.digest_of_files(tmp_path) != before
    assert environment.digest_of_files(environment.PACKAGE) == environment.digest_of_files(environment.PACKAGE)


@pytest.mark.fault(35)
def test_a_read_only_mount_is_an_error_at_the_start_with_path_user_and_host(tmp_path):
    """Mounted in a namespace of the child's own, so nothing is left to unmount."""
    folder = tmp_path / "runs"
    folder.mkdir()
    mount = f'mount --bind "{folder}" "{folder}" && mount -o remount,ro,bind "{folder}"'
    words = ["unshare", "--mount", "sh", "-c"]
    if os.getuid() != 0 or subprocess.run([*words, mount], capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    run = f'{mount} && exec "{sys.executable}" "{RANKS}" "{folder}/quickstart" 10 0'
    env = of_process(RANK="0", WORLD_SIZE="1")
    done = subprocess.run([*words, run], capture_output=True, text=True, env=env, timeout=TIMEOUT_S)
    (text,) = json.loads(done.stdout.splitlines()[-1])["errors"]
    for part in (f"{folder}/quickstart", "user root", f"host {socket.gethostname()}", "Read-only file system",
                 "set run.root to another place"):  # fmt: skip
        assert part in text, part


@pytest.mark.fault(35)
@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO, errno.EACCES])
def test_each_kind_of_refusal_says_what_to_do(code, tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(environment.LaunchError) as caught:
        environment.require_writable(tmp_path, Topology(host="n1"))
    assert environment.WHAT_TO_DO[code] in str(caught.value) and "on host n1" in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "the test file is gone"


def test_a_good_folder_is_left_as_it_was(tmp_path):
    environment.require_writable(tmp_path / "new", Topology())
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.fault(94)
@pytest.mark.parametrize(("mode", "warned"), [(0o777, True), (0o1777, False), (0o755, False)])
def test_a_folder_that_anybody_may_exchange_is_warned_of(mode, warned, tmp_path, caplog):
    (tmp_path / "root").mkdir()
    (tmp_path / "root").chmod(mode)
    environment.require_writable(tmp_path / "root" / "run", Topology())
    assert ("can be written by everybody" in caplog.text) == warned


@pytest.mark.fault(18)
def test_a_taken_port_is_named_with_its_holder():
    code = (
        "from phi3v_dist.cli.app import run_script\n"
        "from phi3v_dist.parallel.topology import Topology\n"
        "run_script(lambda: Topology.from_environment().start(20.0))\n"
    )
    with socket.create_server(("0.0.0.0", 0)) as holder:
        port = holder.getsockname()[1]
        env = of_process(
            RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 5, done.stderr[-2000:]
    assert f"port {port}" in done.stderr and f"process {os.getpid()} (" in done.stderr and "MASTER_PORT" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.fault(99)
def test_a_build_lock_without_a_holder_is_named_with_its_age(tmp_path, monkeypatch):
    from torch.utils.file_baton import FileBaton

    monkeypatch.setenv(build_cache.VARIABLE, str(tmp_path))
    for name in ("cpu_adam", "utils"):
        (tmp_path / name).mkdir()
    alive = FileBaton(str(tmp_path / "utils" / build_cache.LOCK_NAME))  # torch's own, as in a build
    assert alive.try_acquire()
    left = tmp_path / "cpu_adam" / build_cache.LOCK_NAME
    left.touch()
    os.utime(left, (0, left.stat().st_mtime - 3 * 3600))
    (message,) = build_cache.leftover_locks()
    assert str(left) in message and "3 h old" in message and "delete the file" in message
    alive.release()
    left.unlink()
    assert build_cache.leftover_locks() == []


@pytest.mark.fault(99)
def test_each_environment_builds_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(build_cache.VARIABLE, raising=False)
    build_cache.own_build_folder()
    first = os.environ[build_cache.VARIABLE]
    monkeypatch.setattr(sys, "prefix", "/another/venv")
    monkeypatch.delenv(build_cache.VARIABLE)
    build_cache.own_build_folder()
    second = os.environ[build_cache.VARIABLE]
    assert first != second and Path(first).parent == Path(second).parent == tmp_path / "phi3v_dist/torch_extensions"
    monkeypatch.setenv(build_cache.VARIABLE, "/chosen")
    build_cache.own_build_folder()
    assert os.environ[build_cache.VARIABLE] == "/chosen"
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv(build_cache.VARIABLE, first)
    assert _get_build_directory("x", verbose=False).startswith(first), "torch asks when it builds, not before"


@pytest.mark.fault(95)
def test_links_that_lead_out_of_a_run_folder_are_named_and_others_are_not(tmp_path):
    real = tmp_path / "scratch"
    run = real / "quickstart"
    (run / "checkpoints").mkdir(parents=True)
    (run / "wandb").mkdir()
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "runs").symlink_to(real)
    assert environment.links_out(tmp_path / "runs" / "quickstart") == [], "the root may be a link"
    assert environment.links_out(tmp_path / "none") == []
    (run / "config.yaml").symlink_to("/etc/hostname")
    (run / "checkpoints" / "step-00000004").symlink_to(tmp_path)
    (run / "loop").symlink_to("loop")
    found = environment.links_out(tmp_path / "runs" / "quickstart")
    assert len(found) == 2 and "step-00000004 is a symbolic link" in found[1] and "to /etc/hostname" in found[0]
    (real / "other").symlink_to(tmp_path)
    (message,) = environment.links_out(real / "other")
    assert "the run folder" in message and "run.root" in message


@pytest.mark.fault(95)
def test_a_planted_partial_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "manifest.json.partial").symlink_to(victim)
    durable.write_durably(tmp_path / "manifest.json", "{}")
    assert victim.read_text() == "mine" and (tmp_path / "manifest.json").read_text() == "{}"
    previous = os.umask(OWNER_ONLY)
    try:
        durable.write_durably(tmp_path / "good.json", "{}")
    finally:
        os.umask(previous)
    assert (tmp_path / "good.json").stat().st_mode & 0o777 == 0o600
