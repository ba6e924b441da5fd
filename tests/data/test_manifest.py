"""The manifest says what the indexes say, notices every change, and looks again at nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS, environment, write_samples

from phi3v_dist.config import SourceSettings
from phi3v_dist.data import lengths as lengths_module
from phi3v_dist.data import manifest
from phi3v_dist.data import shards as shards_module
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable

COLUMNS = ("tokens", "label_tokens", "crops", "full_tokens")


@pytest.fixture(autouse=True)
def _for_small_tables_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(manifest, "MIN_SHARDS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(6):
        write_samples(folder / f"{number:03d}.tar", range(100 * number, 100 * number + 2 + number % 3))
    return folder


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose index is opened."""
    names: list[str] = []
    load_index = shards_module.load_index

    def load(address: str, size_bytes: int):
        names.append(Path(address).stem)
        return load_index(address, size_bytes)

    monkeypatch.setattr(shards_module, "load_index", load)
    return names


def open_table(folder: Path, digest: str | None = None) -> ShardTable:
    return ShardTable.open([SourceSettings(shards=[str(folder / "*.tar")])], known_digest=digest)


def same(one: ShardTable, other: ShardTable) -> bool:
    return one.digest == other.digest and one.start.tolist() == other.start.tolist() and one.shards == other.shards


def test_the_second_open_looks_at_no_index(folder: Path, looked_at: list[str]) -> None:
    first = open_table(folder)
    assert len(looked_at) == 6
    looked_at.clear()
    assert same(open_table(folder), first) and looked_at == []


def test_what_changed_is_looked_at_and_nothing_else(folder: Path, looked_at: list[str]) -> None:
    before = open_table(folder)
    changes = {
        "added": (lambda: write_samples(folder / "0025.tar", range(900, 903)), ["0025"]),
        "touched": (lambda: os.utime(folder / "001.tar"), ["001"]),
        "written anew": (lambda: write_samples(folder / "004.tar", range(700, 705)), ["004"]),
        "index deleted": (lambda: (folder / "003.tar.index.safetensors").unlink(), ["003"]),
        "removed": (lambda: (folder / "000.tar").unlink(), []),
    }
    for what, (change, expected) in changes.items():
        looked_at.clear()
        change()
        table = open_table(folder)
        assert looked_at == expected, what
        anew = manifest._place(table.sources, "")[1]
        (folder / f"manifest.{anew}").rename(folder / "aside.safetensors")
        assert same(open_table(folder), table), what
    assert table.digest != before.digest and len(table.shards) == 6


def test_the_digest_is_of_contents_and_order_and_not_of_the_folder(folder: Path, tmp_path: Path) -> None:
    table = open_table(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors")))
    assert open_table(copy).digest == table.digest
    (copy / "000.tar").rename(copy / "9.tar")
    assert open_table(copy).digest != table.digest


def test_other_ranks_take_the_manifest_that_rank_0_has_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_table(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_find", lambda *_: pytest.fail("it looked for the shards"))
        assert same(open_table(folder, table.digest), table)
    (folder / "000.tar").unlink()
    assert len(open_table(folder, "another").shards) == 5


@pytest.mark.parametrize("damage", ["cut", "words", "other header"])
def test_a_damaged_manifest_is_made_anew(folder: Path, damage: str) -> None:
    table = open_table(folder)
    (path,) = folder.glob("manifest.*")
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:100], "words": b"x" * 300, "other header": data.replace(b"num_bad", b"num_bat")}[damage]
    )
    assert same(open_table(folder), table)


def test_small_tables_leave_no_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MIN_SHARDS", 7)
    open_table(folder)
    assert not list(folder.glob("manifest*"))


def test_lengths_of_a_table_are_mapped_and_only_changed_shards_are_read(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model, num_crops=1)
    asked: list[str] = []
    load_sidecar = lengths_module.load_sidecar
    monkeypatch.setattr(lengths_module, "load_sidecar", lambda *a: asked.append(Path(a[0]).stem) or load_sidecar(*a))
    first = measure(open_table(folder), processor)
    asked.clear()
    second = measure(open_table(folder), processor)
    assert asked == []
    for column in COLUMNS:
        stored = getattr(second, column)
        assert stored.tolist() == getattr(first, column).tolist()
        assert not stored.flags.owndata and not stored.flags.writeable
    write_samples(folder / "004.tar", range(700, 740))  # of another size
    write_samples(folder / "0025.tar", range(900, 903))
    third = measure(open_table(folder), processor)
    assert asked == ["0025", "004"]
    for path in folder.glob("manifest*"):
        path.unlink()
    for column in COLUMNS:
        assert getattr(measure(open_table(folder), processor), column).tolist() == getattr(third, column).tolist()


def test_bad_samples_and_their_reasons_come_back_from_the_manifest(folder: Path, tiny_model: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model, num_crops=1)
    source = [
        SourceSettings(shards=[str(folder / "*.tar")], prompt="What?", answer="{{ messages[0].content[1].text }}")
    ]
    first, second = (measure(ShardTable.open(source), processor) for _ in range(2))
    assert first.bad and first.bad == second.bad  # text-only samples have no second part
    table = ShardTable.open(source)
    named = {table.sample_name(i): why for i, why in first.bad.items()}
    write_samples(folder / "0025.tar", range(900, 903))
    after, table = measure(ShardTable.open(source), processor), ShardTable.open(source)
    assert {table.sample_name(i): why for i, why in after.bad.items()}.items() >= named.items()
    assert np.flatnonzero(after.tokens == 0).tolist() == list(after.bad)


def test_processes_index_as_threads_do(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (folder / "005.tar").write_bytes(b"")
    by_threads = open_table(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors")))
    monkeypatch.setattr(shards_module, "PROCESSES_FROM_BYTES", 0)
    done: list[tuple[int, int]] = []
    sources = [SourceSettings(shards=[str(copy / "*.tar")])]
    table = ShardTable.open(sources, on_progress=lambda *numbers: done.append(numbers))
    assert table.digest == by_threads.digest and done == [(n, 6) for n in range(1, 7)]


@pytest.mark.slow
def test_100_000_shards_open_within_the_limits(tmp_path: Path, tiny_model: Path) -> None:
    command = [sys.executable, TESTS / "bench" / "many_shards.py", "--folder", tmp_path, "--shards", "100000"]
    figures = json.loads(subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True).stdout)
    assert figures["many_shards/open_private_mib"] <= 64
