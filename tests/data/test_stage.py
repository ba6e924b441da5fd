"""Shards given as paths, copied to the node's own disk → the same bytes, whatever becomes of the copies."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment
from test_shards import WORDS, open_table, write

from phi3v_dist.config import CacheSettings, DataSettings, SourceSettings
from phi3v_dist.data.cache import ShardCache
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.samples import BadSample
from phi3v_dist.data.staging import Staged, stage
from phi3v_dist.errors import ConfigError, DataError

SLOW = """
import atexit, os, time
from pathlib import Path
from phi3v_dist.data import cache
from phi3v_dist.cli import prepare
pieces = []
cache.PIECE_BYTES = 1 << 12
cache.heartbeat.read_on = lambda: (pieces.append(1), time.sleep(0.05))
atexit.register(lambda: print(len(pieces), "pieces"))
meeting = Path(os.environ["MEETING"])
(meeting / str(os.getpid())).touch()
while len(list(meeting.iterdir())) < int(os.environ["TOGETHER"]):
    time.sleep(0.01)
prepare.main()
"""


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    """Three shards to train on and one to evaluate on, of 100 to 400 kB."""
    folder = tmp_path / "shared"
    folder.mkdir()
    for n, name in enumerate(("train-0", "train-1", "train-2", "validation-0"), 1):
        write(folder / f"{name}.tar", [(f"{name}{i}.txt", b"%d%d" % (n, i) * 10_000) for i in range(5 * n)])
    return folder


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "node" / "shards"


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 512 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", mount], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system needs the right to mount one: {done.stderr.strip()}")
    yield mount / "shards"
    subprocess.run(["umount", mount], check=True)


def data_of(folder: Path, path: Path | None, limit_gb: float = 1, local_shards: bool = True) -> DataSettings:
    train, validation = ([SourceSettings(shards=[f"{folder}/{side}-*.tar"])] for side in ("train", "validation"))
    cache = CacheSettings(path=path, limit_gb=limit_gb, local_shards=local_shards)
    return DataSettings(train=train, validation=validation, cache=cache)


def staged(folder: Path, local: Path, limit_bytes: int = 10**9) -> Staged:
    return stage(data_of(folder, local, limit_bytes / 1e9), threading.Event())


def fetcher_of(folder: Path, local: Path, limit_bytes: int = 10**9) -> Fetcher:
    return Fetcher(open_table(f"{folder}/*.tar"), ShardCache(local, limit_bytes, local_shards=True))


def everything(fetcher: Fetcher) -> list[dict[str, bytes]]:
    return [fetcher.fetch(number) for number in range(len(fetcher.table))]


def copies(local: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in local.iterdir() if path.name != "lock"}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


@pytest.mark.supports("cache", on="one process")
def test_what_was_staged_is_read_when_the_original_is_gone(originals: Path, local: Path) -> None:
    fetcher = fetcher_of(originals, local)
    before = everything(Fetcher(fetcher.table))
    done = staged(originals, local)
    assert (len(done.copied), done.copied_bytes, done.missed) == (4, size_of(originals), [])
    for shard in originals.glob("*.tar"):
        shard.rename(shard.with_suffix(".away"))
    assert everything(fetcher) == before


def test_copies_are_shown_in_bytes(originals: Path, local: Path, shown: list) -> None:
    stage(data_of(originals, local), threading.Event())
    copies = [report for report in shown if report[0] == "copying shards"]
    assert copies and all(0 <= done <= total == size_of(originals) for _, done, total, _ in copies)
    assert {unit for *_, unit in copies} == {"bytes"}


def test_a_second_call_finds_nothing_to_do_and_says_so(originals: Path, local: Path) -> None:
    staged(originals, local)
    again = staged(originals, local)
    assert again.copied_bytes == 0 and again.lines(local) == [f"4 shards (0.00 GB) in {local} already: nothing to do"]
    os.truncate(local / next(iter(copies(local))), 100)  # as a power loss may leave it
    assert len(staged(originals, local).copied) == 1
    assert sum(copies(local).values()) == size_of(originals)


def test_a_shard_is_copied_when_it_is_first_read_too_and_by_any_of_its_names(originals: Path, local: Path) -> None:
    (originals.parent / "link").symlink_to(originals)
    everything(fetcher_of(originals, local))
    there = copies(local)
    assert len(there) == 4 and len(staged(originals.parent / "link", local).there) == 4
    assert copies(local) == there


def test_without_being_asked_paths_are_not_copied(originals: Path, local: Path) -> None:
    everything(Fetcher(open_table(f"{originals}/*.tar"), ShardCache(local, 10**9)))
    assert not local.exists()
    with pytest.raises(ConfigError, match=r"data\.cache\.local_shards=true"):
        stage(data_of(originals, local, local_shards=False), threading.Event())
    with pytest.raises(ConfigError, match=r"`data\.cache\.path` is not set"):
        stage(data_of(originals, None), threading.Event())


def test_a_shard_that_was_written_anew_is_not_read_from_its_old_copy(tmp_path: Path, local: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in ("train-0", "validation-0"):
        write(folder / f"{name}.tar", WORDS)
    staged(folder, local)
    write(folder / "train-0.tar", [(name, data.replace(b"3", b"8")) for name, data in WORDS])  # of the same size
    (folder / "train-0.tar.index.safetensors").unlink(missing_ok=True)
    assert everything(fetcher_of(folder, local))[3]["txt"] == b"8" * 300
    assert len(staged(folder, local).there) == 2


def test_a_shard_that_changes_under_the_run_leaves_no_copy(originals: Path, local: Path) -> None:
    fetcher = fetcher_of(originals, local)
    shard = originals / "train-0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"1111", b"9999"))
    with pytest.raises(BadSample, match="not those that were indexed"):
        fetcher.fetch(1)
    assert not copies(local)


@pytest.mark.parametrize("harm", ["other bytes", "cut"])
def test_a_damaged_copy_is_dropped_and_the_sample_still_right(originals: Path, local: Path, harm: str) -> None:
    fetcher = fetcher_of(originals, local)
    staged(originals, local)
    for copy in copies(local):
        size = (local / copy).stat().st_size
        (local / copy).write_bytes(bytes(size) if harm == "other bytes" else b"")
    assert everything(fetcher) == everything(Fetcher(fetcher.table))
    assert sum(copies(local).values()) == size_of(originals)


def test_a_damaged_original_does_not_cost_a_copy_at_each_look(originals: Path, local: Path) -> None:
    fetcher = fetcher_of(originals, local)
    shard = originals / "train-0.tar"
    time_ns = shard.stat().st_mtime_ns
    shard.write_bytes(shard.read_bytes().replace(b"1111", b"9999"))
    os.utime(shard, ns=(time_ns, time_ns))  # a bad disk tells nobody
    for _ in range(2):
        with pytest.raises(BadSample, match="not those that were indexed"):
            fetcher.fetch(1)
        (copy,) = local.glob(f"*-{shard.stat().st_size}")
        first = copy.stat().st_ino
    assert copy.stat().st_ino == first


def test_a_full_disk_is_one_warning_and_the_rest_is_read_where_it_is(originals, small_disk: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        done = staged(originals, small_disk)
    (warning,) = caplog.messages
    assert "no more copies of shards" in warning and "No space left" in warning
    assert done.missed and any("are read where they are" in line for line in done.lines(small_disk))
    caplog.clear()
    fetcher = fetcher_of(originals, small_disk)
    with caplog.at_level(logging.WARNING):
        assert everything(fetcher) == everything(Fetcher(fetcher.table))
    (warning,) = caplog.messages
    assert "No space left" in warning


def test_a_folder_that_cannot_be_made_is_one_warning(originals: Path, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        done = staged(originals, tmp_path / "file" / "shards")
        fetcher = fetcher_of(originals, tmp_path / "file" / "shards")
        assert everything(fetcher) == everything(Fetcher(fetcher.table))
    assert len(done.missed) == 4 and len(caplog.messages) == 2  # one of each


def test_the_limit_holds_and_training_comes_first(originals: Path, local: Path) -> None:
    sizes = {path.stem: path.stat().st_size for path in originals.glob("*.tar")}
    limit = sizes["train-0"] + sizes["train-1"] + sizes["train-2"] + 10
    done = staged(originals, local, limit)
    assert [Path(one.address).stem for one in done.too_large] == ["validation-0"]
    assert sum(copies(local).values()) == limit - 10
    assert "1 shards" in done.lines(local)[1] and "did not fit" in done.lines(local)[1]
    there = copies(local)
    fetcher = fetcher_of(originals, local, limit)
    assert everything(fetcher) == everything(Fetcher(fetcher.table))
    assert copies(local) == there  # what is read where it is pushes nothing out


def test_copies_of_other_shards_make_room_and_those_of_the_run_stay(originals: Path, local: Path) -> None:
    other = originals.parent / "other"
    shutil.copytree(originals, other)
    limit = size_of(originals) + 1000
    staged(other, local, limit)
    assert len(staged(originals, local, limit).copied) == 4
    assert sum(copies(local).values()) == size_of(originals)


def test_a_shard_that_is_missing_is_named(originals: Path, local: Path) -> None:
    data = data_of(originals, local)
    data.train[0].shards.append(str(originals / "train-9.tar"))
    with pytest.raises(DataError, match=r"train-9\.tar"):
        stage(data, threading.Event())


# --- as a command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(originals: Path, local: Path, tiny_model: Path, tmp_path: Path) -> list[str]:
    """The words after `python`: copies come at 80 kB a second and thread."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run: {{name: x, root: {tmp_path}}}\nmodel: {{path: {tiny_model}}}\ntrain: {{steps: 5}}\n"
        f"data: {{train: [{{shards: {originals}/train-*.tar}}], validation: [{{shards: {originals}/val*.tar}}]}}\n"
    )
    return [sys.executable, "-c", SLOW, "stage", "--config", str(config), f"data.cache.path={local}",
            "data.cache.local_shards=true"]  # fmt: skip


def start(command: list[str], meeting: Path, together: int = 1) -> subprocess.Popen[str]:
    """together: so many begin at the same time."""
    meeting.mkdir(exist_ok=True)
    env, pipe = environment(MEETING=str(meeting), TOGETHER=str(together)), subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM])
def test_staging_that_was_ended_goes_on_where_it_was(command, originals, local, tmp_path, number) -> None:
    process = start(command, tmp_path / "meeting")
    end = time.monotonic() + 60
    while not (local.is_dir() and sum(copies(local).values()) > 100_000):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=240)
    there = copies(local)
    assert any(name.endswith(".partial") for name in there) and sum(there.values()) < size_of(originals)
    if number != signal.SIGKILL:
        assert process.returncode == 0, errors
        assert "another call goes on" in output
    assert staged(originals, local).copied_bytes == size_of(originals) - sum(there.values())
    fetcher = fetcher_of(originals, local)
    assert everything(fetcher) == everything(Fetcher(fetcher.table))


def test_processes_of_a_node_do_not_copy_a_shard_twice(command, originals: Path, local: Path, tmp_path: Path) -> None:
    processes = [start(command, tmp_path / "meeting", together=2) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all("4 shards" in output and "not copied" not in output for output, _ in outputs), outputs
    assert sum(copies(local).values()) == size_of(originals)
    pieces = [int(re.findall(r"(\d+) pieces", output)[0]) for output, _ in outputs]
    sizes = [path.stat().st_size for path in originals.glob("*.tar")]
    assert sum(pieces) == sum(-(-size // 4096) for size in sizes)
    assert {path.stat().st_mode & 0o077 for path in local.iterdir()} == {0}  # for their owner alone
