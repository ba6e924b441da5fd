"""One sample in a hundred damaged after indexing: the run ends, each is listed once, and nothing else moves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from conftest import COLOURS, REPOSITORY, environment, picture
from launching import TIMEOUT_S, launch, losses

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.ledger import LedgerReader, Status
from phi3v_dist.data.shards import ShardTable


def write_mixed(path: Path, numbers: range) -> None:
    """Short texts, every eighth with a picture."""
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for n in numbers:
            turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "red " * (1 + n % 9)}]
            sample = {"__key__": f"{n:05d}", "json": json.dumps({"messages": turns}).encode()}
            tar.write(sample | ({"0.jpg": picture(COLOURS[n % 4], 300, 300)} if n % 8 == 0 else {}))


def corrupt(folder: Path, share: float, seed: int) -> list[str]:
    """Flip a byte in one member of some samples, text or picture; their keys, as `shard name:key`."""
    table = ShardTable.open([SourceSettings(shards=[str(folder / "*.tar")])])
    rng = np.random.default_rng(seed)
    names = []
    for sample_id in rng.choice(len(table), round(share * len(table)), replace=False).tolist():
        shard, number = table.locate(sample_id)
        members = table.index(shard).members(number)
        member = members[int(rng.integers(len(members)))]
        with Path(str(table.shards[shard])).open("r+b") as file:
            place = member.offset + int(rng.integers(member.size_bytes))
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ (1 << int(rng.integers(8)))]))
        names.append(f"{Path(str(table.shards[shard])).name}:{table.index(shard).key(number)}")
    return sorted(names)


def compare(tree: dict, folder: Path, num_samples: int, share: float) -> None:
    """A clean run, and one over the same shards damaged since they were indexed and measured."""
    (folder / "clean").mkdir()
    write_mixed(folder / "clean" / "a.tar", range(num_samples // 3))
    write_mixed(folder / "clean" / "b.tar", range(num_samples // 3, num_samples))
    tree["train"] |= {"steps": None, "epochs": 2, "rows_per_step": 4}
    tree["data"] |= {"validation": [], "window_samples": 64}
    tree["checkpoint"] = {"every_steps": 1000}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = launch("torchrun", config, "run.name=clean", f"data.train=[{{shards: {folder}/clean/*.tar}}]")
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(folder / "clean", folder / "damaged")
    names = corrupt(folder / "damaged", share, seed=3)
    done = launch("torchrun", config, "run.name=damaged", f"data.train=[{{shards: {folder}/damaged/*.tar}}]")
    assert done.returncode == 0, done.stderr[-3000:]

    root = Path(tree["run"]["root"])
    entries = [json.loads(line) for line in (root / "damaged" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(f"{Path(entry['shard']).name}:{entry['key']}" for entry in entries) == names
    assert {entry["stage"] for entry in entries} == {"decode"}
    clean, damaged = ([r for r, _ in LedgerReader(root / name / "ledger.bin")] for name in ("clean", "damaged"))
    assert [record.rows for record in damaged] == [record.rows for record in clean]
    bad = {entry["sample_id"]: entry["first_step"] for entry in entries}
    for record in damaged:
        wanted = {place for place, sample_id in enumerate(record.sample_ids) if sample_id in bad}
        assert {place for place, status in record.not_trained.items() if status == Status.QUARANTINED} == wanted
    first = {i: min(r.step for r in damaged if i in r.sample_ids) for i in bad}
    assert first == bad
    audited = subprocess.run(
        [sys.executable, "launch/prepare.py", "audit", str(root / "damaged")], cwd=REPOSITORY, capture_output=True,
        text=True, timeout=TIMEOUT_S, env=environment(COLUMNS="160"),
    )  # fmt: skip
    assert audited.returncode == 0 and "0 lost, 0 repeated" in audited.stdout, audited.stdout + audited.stderr

    before, after = losses(root / "clean"), losses(root / "damaged")
    assert after.keys() == before.keys()
    same = [step for step in before if step < min(bad.values())]
    assert same and all(after[step] == before[step] for step in same)
    assert after[min(bad.values())] != before[min(bad.values())]


@pytest.mark.slow
@pytest.mark.fault(65)
@pytest.mark.fault(81)
def test_one_percent_of_damaged_samples_moves_nothing_else(settings_tree: dict, tmp_path: Path) -> None:
    compare(settings_tree, tmp_path, num_samples=200, share=0.01)


@pytest.mark.slow
@pytest.mark.fault(65)
@pytest.mark.timeout(3600)
def test_one_percent_of_two_thousand(settings_tree: dict, tmp_path: Path) -> None:
    compare(settings_tree, tmp_path, num_samples=2000, share=0.01)


@pytest.mark.slow
@pytest.mark.fault(81)
def test_too_many_damaged_samples_stop_the_run_early_with_a_summary(settings_tree: dict, tmp_path: Path) -> None:
    write_mixed(tmp_path / "a.tar", range(300))
    tree = settings_tree
    tree["train"] |= {"steps": None, "epochs": 2, "rows_per_step": 4}
    tree["data"] |= {"train": [{"shards": str(tmp_path / "*.tar")}], "validation": []}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    measured = subprocess.run(
        [sys.executable, "launch/check.py", "--config", str(config)], cwd=REPOSITORY, env=environment(),
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    corrupt(tmp_path, 0.3, seed=1)
    done = launch("torchrun", config)
    assert done.returncode != 0
    words = ("more than `data.max_bad_frac` 0.01", "by reason:", "by shard:", "quarantine.jsonl", "raise the limit")
    assert all(word in done.stderr for word in words), done.stderr[-3000:]
    assert max(losses(Path(tree["run"]["root"]) / "run")) < 6
