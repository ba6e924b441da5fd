"""Bad samples: each listed once, in words that can do no harm, and too many of them stop the run."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import write_samples

from phi3v_dist import config, run
from phi3v_dist.config import SourceSettings
from phi3v_dist.data import shards
from phi3v_dist.data.lengths import COLUMNS
from phi3v_dist.data.plan import Lengths
from phi3v_dist.data.quarantine import Entry, Quarantine, entries, summarize, summarize_unusable, too_many, unusable
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import ConfigError

HOSTILE = "key\x1b[31m\n2026-12-01 12:00:00 INFO [rank 0] all is well\u202e\udc80"


def entry(sample_id: int, **changes: object) -> Entry:
    values = {"shard": "a.tar", "key": f"{sample_id:03d}", "reason": "cut off", "stage": "decode", "first_step": 3}
    return Entry(sample_id=sample_id, **values | changes)


def listed(path: Path) -> list[int]:
    return [line["sample_id"] for line in entries(path.read_bytes())]


def test_a_sample_is_listed_once_over_epochs_and_restarts(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    from_the_start = [entry(1, stage="index", first_step=None), entry(2, stage="length", first_step=None)]
    first = Quarantine(path, None)
    first.add(from_the_start)
    first.add([entry(7), entry(2)])
    first.add([entry(7, first_step=90)])
    head = first.sync()
    again = Quarantine(path, head)
    again.add(from_the_start)
    again.add([entry(7), entry(8)])
    assert listed(path) == [1, 2, 7, 8]
    assert json.loads(path.read_text().splitlines()[2])["first_step"] == 3


def test_lines_after_the_checkpoint_go_and_come_again_when_they_are_met(tmp_path: Path, caplog) -> None:
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path, None)
    first.add([entry(1)])
    head = first.sync()
    first.add([entry(2)])
    with path.open("ab") as file:
        file.write(b'{"sample_id": 3, "sh')  # a kill
    again = Quarantine(path, head)
    again.add([entry(1)])
    assert listed(path) == [1] and not caplog.records
    again.add([entry(2)])
    assert listed(path) == [1, 2]


@pytest.mark.parametrize("damage", [b"", b'{"sample_id": 5}\n', b"hello"])
def test_a_file_that_somebody_changed_is_kept_said_and_completed(tmp_path: Path, damage: bytes, caplog) -> None:
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path, None)
    first.add([entry(1)])
    head = first.sync()
    first.close()
    path.write_bytes(damage)
    Quarantine(path, head).add([entry(1)])
    assert listed(path)[-1] == 1
    assert "is not as the checkpoint left it (1 samples were listed)" in caplog.text


@pytest.mark.fault(80)
def test_names_and_reasons_of_strangers_cannot_forge_a_line_or_a_colour(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, None)
    quarantine.add([entry(1, key=HOSTILE, reason=HOSTILE, shard=HOSTILE)])
    assert path.read_bytes().count(b"\n") == 1 and path.read_bytes().replace(b"\n", b"").decode("ascii").isprintable()
    assert json.loads(path.read_text())["key"] == HOSTILE  # and nothing is lost
    assert quarantine.summary().isprintable()


def test_a_summary_counts_by_reason_and_by_shard_and_names_the_first(tmp_path: Path) -> None:
    bad = [entry(i, reason="cut off" if i % 3 else "no picture", shard=f"{i % 2}.tar") for i in range(9)]
    text = summarize(bad)
    assert "6 x cut off, 3 x no picture" in text and "5 x 0.tar, 4 x 1.tar" in text and "0.tar:000, 1.tar:001" in text


def broken_table(folder: Path, num_shards: int) -> tuple[ShardTable, Lengths]:
    """Shards of 3 samples, of which two cannot be used."""
    for shard in range(num_shards):
        write_samples(folder / f"{shard}.tar", range(3))
    table = ShardTable.open([SourceSettings(shards=[str(folder / "*.tar")])])
    bad = {i: f"cut off in {i % 3}" for i in range(len(table)) if i % 3}
    zeros = np.zeros(len(table), np.int32)
    return table, Lengths(**dict.fromkeys(COLUMNS, zeros), bad=bad)


def test_a_start_opens_each_index_once_a_resume_none_and_a_summary_a_few(tmp_path: Path, monkeypatch) -> None:
    table, lengths = broken_table(tmp_path, 9)
    opened: list[int] = []
    load = ShardTable._load_index
    monkeypatch.setattr(shards, "INDEXES_IN_MEMORY", 1)
    monkeypatch.setattr(ShardTable, "_load_index", lambda self, shard: opened.append(shard) or load(self, shard))
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path, None)
    first.add_unusable(table, lengths)
    head = first.sync()
    assert opened == list(range(9)) and listed(path) == sorted(lengths.bad)
    opened.clear()
    resumed = Quarantine(path, head)
    resumed.add_unusable(table, lengths)
    assert not opened and resumed.sync() == head
    text = summarize_unusable(table, lengths)
    assert len(opened) <= 3
    assert text == summarize(unusable(table, lengths))


def test_an_entry_names_a_remote_shard_without_its_signature(tmp_path: Path, monkeypatch) -> None:
    table, lengths = broken_table(tmp_path, 1)
    address = "https://user:password@data.example/0.tar?signature=secret"
    table.index(0)  # in memory: nothing is asked of the network
    monkeypatch.setitem(table.__dict__, "shards", (address,))
    entry = next(unusable(table, lengths))
    assert entry.shard == "https://data.example/0.tar"
    assert "secret" not in summarize_unusable(table, lengths)


@pytest.mark.fault(81)
def test_one_percent_at_random_never_stops_a_run_and_five_percent_does_so_early() -> None:
    """20 orders of 2,000 samples: no false alarm after any sample; 5 % are found after 1,000 samples at the latest."""
    seen = range(1, 2001)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        one, five = (np.cumsum(rng.permutation(2000) < num_bad).tolist() for num_bad in (20, 100))
        assert not any(too_many(bad, n, 0.01) for bad, n in zip(one, seen, strict=True))
        assert next(n for bad, n in zip(five, seen, strict=True) if too_many(bad, n, 0.01)) <= 1000
    assert not too_many(20, 2000, 0.01, at_end=True) and too_many(21, 2000, 0.01, at_end=True)


def test_a_limit_of_0_allows_none_and_other_limits_always_one() -> None:
    assert too_many(1, 1000, 0.0) and not too_many(0, 1000, 0.0)
    assert not too_many(1, 3, 0.01, at_end=True) and too_many(2, 3, 0.01, at_end=True)


def damaged_shards(folder: Path, num_bad: int, num_long: int) -> Path:
    """40 samples, of which some hold no conversation and some are longer than a row."""
    folder.mkdir()
    write_samples(folder / "good.tar", range(40 - num_bad - num_long))
    with webdataset.TarWriter(str(folder / "bad.tar"), mtime=0) as tar:
        for n in range(num_bad):
            tar.write({"__key__": f"bad{n}", "json": b'{"caption": 1}'})
        for n in range(num_long):
            turns = [{"role": "user", "content": "hello " * 3000}, {"role": "assistant", "content": "hello"}]
            tar.write({"__key__": f"long{n}", "json": json.dumps({"messages": turns}).encode()})
    return folder


@pytest.mark.fault(81)
def test_too_many_unusable_samples_are_refused_before_the_first_step(config_file: Path, tmp_path: Path) -> None:
    words = [f"data.train=[{{shards: {damaged_shards(tmp_path / 'bad', 2, 3)}/*.tar}}]"]
    with pytest.raises(ConfigError) as raised:
        config.load(config_file, words, lambda settings: run.problems(settings, 1))
    assert "2 of 40 samples cannot be used, more than `data.max_bad_frac` 0.01; by reason: 2 x no `messages`" in str(
        raised.value
    )
    config.load(config_file, [*words, "data.max_bad_frac=0.05"], lambda settings: run.problems(settings, 1))


def test_samples_that_the_fit_policy_leaves_out_are_no_damage(config_file: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.ERROR)
    words = [f"data.train=[{{shards: {damaged_shards(tmp_path / 'long', 0, 9)}/*.tar}}]"]
    config.load(config_file, words, lambda settings: run.problems(settings, 1))
