"""The audit: it proves what is so, and finds every sample that is lost or trained twice."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_samples

from phi3v_dist import config
from phi3v_dist.cli import prepare
from phi3v_dist.cli.app import plain_console
from phi3v_dist.data import audit_report, identity
from phi3v_dist.data.audit import Audit, SourceAudit, audit, step_of
from phi3v_dist.data.ledger import Head, Ledger, LedgerReader, Record, Status
from phi3v_dist.data.plan import Planner
from phi3v_dist.data.quarantine import Quarantine, entry_of
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.run import Data, plan


@dataclass(frozen=True)
class World:
    """A run folder with its settings, and the plan of three epochs of two weighted sources."""

    folder: Path
    data: Data
    planner: Planner

    def records(self, count: int | None = None, planner: Planner | None = None) -> Iterator[Record]:
        for step in islice(planner or self.planner, count):
            yield Record(step.number, 1, 2, tuple(row.sample_ids for row in step.rows))

    def write(self, records: Any) -> list[Head]:
        ledger = Ledger.begin(
            self.folder / "ledger.bin", identity.facts_of(self.data.table, self.data.lengths, self.planner)
        )
        heads = [ledger.head]
        for record in records:
            ledger.append(record)
            heads.append(ledger.head)
        ledger.close()
        return heads

    def audit(self, **options: Any) -> Audit:
        reader = LedgerReader(self.folder / "ledger.bin")
        return audit(reader, self.data.table, self.data.lengths, self.planner, **options)


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: Any) -> World:
    import conftest

    shards = tmp_path_factory.mktemp("audited")
    write_samples(shards / "many-000.tar", range(0, 30))
    write_samples(shards / "many-001.tar", range(100, 123))
    write_samples(shards / "few-000.tar", range(200, 211))
    tree = conftest.settings_tree.__wrapped__(tiny_model, shards, tmp_path_factory.mktemp("run"))
    tree["data"] |= {"validation": [], "train": [
        {"shards": str(shards / "many-*.tar"), "weight": 2}, {"shards": str(shards / "few-*.tar"), "weight": 1},
    ]}  # fmt: skip
    tree["train"] |= {"steps": None, "epochs": 3, "rows_per_step": 4}
    settings = config.Settings.model_validate(tree)
    settings.run.folder.mkdir(parents=True)
    recorded = config.dump(settings) | {"environment": {"commit": "unknown"}}
    (settings.run.folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    data = Data.open(settings.data.train, settings)
    return World(settings.run.folder, data, plan(settings, data))


def command(*words: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "audit", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "80")
    prepare.run_command()


def test_a_finished_run_is_proven_by_source(world: World) -> None:
    world.write(world.records())
    found = world.audit()
    assert found.problems == ()
    many, few = found.sources
    assert (many.name, many.samples, many.epochs, many.lost, many.repeated) == ("many", 53, 2, 0, 0)
    assert (few.name, few.samples, few.epochs, few.lost, few.repeated) == ("few", 11, 5, 0, 0)
    assert many.uses + few.uses == 3 * 64 and many.uses == 128 and many.passes == pytest.approx(128 / 53)
    assert many.in_flight == few.in_flight == 0


@pytest.mark.parametrize("num_steps", range(0, 14, 3))
def test_of_a_run_in_progress_it_says_what_is_in_flight(world: World, num_steps: int) -> None:
    world.write(world.records(num_steps))
    found = world.audit()
    assert found.problems == () and found.steps == num_steps
    assert (sum(source.in_flight for source in found.sources) > 0) == (num_steps > 0)


def test_steps_may_be_cut_otherwise_on_the_way_and_attempts_are_told(world: World) -> None:
    first = list(world.records(3))
    rest = world.planner.resume(next(s.state for s in world.planner if s.number == 3))
    rest.rows_per_step = 3
    world.write([*first, *(replace(r, attempt=2, world_size=5) for r in world.records(planner=rest))])
    found = world.audit()
    assert found.problems == () and sum(source.in_flight for source in found.sources) == 0
    assert [tuple(attempt) for attempt in found.attempts] == [(1, 2, 1, 3), (2, 5, 4, found.steps)]


def without_a_sample(record: Record) -> Record:
    return replace(record, rows=(record.rows[0][1:], *record.rows[1:]))


def with_a_sample_twice(record: Record) -> Record:
    return replace(record, rows=(record.rows[0] + record.rows[0][:1], *record.rows[1:]))


@pytest.mark.parametrize("num_steps", [7, None])
@pytest.mark.parametrize(
    ("change", "what", "lost", "repeated"),
    [(without_a_sample, "lost", 1, 0), (with_a_sample_twice, "repeated", 0, 1)],
)
def test_one_sample_lost_or_repeated_is_found_and_named(
    world: World, num_steps: int | None, change: Any, what: str, lost: int, repeated: int
) -> None:
    records = list(world.records(num_steps))
    victim = records[4].rows[0][0]
    records[4] = change(records[4])
    world.write(records)
    found = world.audit()
    assert sum(source.lost for source in found.sources) == lost
    assert sum(source.repeated for source in found.sources) == repeated
    differs, named = found.problems
    assert differs.startswith("step 5, row 1 is not what the plan has there")
    assert named == f"{what}: 1 uses of 1 samples ({world.data.table.sample_name(victim)})"


def test_a_whole_step_trained_twice_is_found(world: World) -> None:
    records = list(world.records())
    records.insert(3, records[2])
    world.write(replace(record, step=step) for step, record in enumerate(records, start=1))
    found = world.audit()
    assert sum(source.repeated for source in found.sources) == len(records[2].sample_ids)
    assert "step 4, row 1 is not what the plan has there" in found.problems[0]


def test_rows_in_another_order_are_not_the_plan(world: World) -> None:
    records = list(world.records())
    records[4] = replace(records[4], rows=records[4].rows[::-1])
    world.write(records)
    (problem,) = world.audit().problems
    assert problem.startswith("step 5, row 1")


def test_quarantined_samples_are_counted_and_must_be_listed(world: World) -> None:
    records = list(world.records())
    records[2] = replace(records[2], not_trained={0: Status.QUARANTINED})
    world.write(records)
    sample_id = records[2].sample_ids[0]
    found = world.audit(listed={sample_id})
    assert found.problems == () and sum(source.quarantined for source in found.sources) == 1
    (problem,) = world.audit(listed=set()).problems
    assert "1 samples quarantined in the ledger are not listed" in problem


def test_a_ledger_that_ends_before_its_checkpoint_is_refused(world: World) -> None:
    heads = world.write(world.records())
    (world.folder / "ledger.bin").write_bytes((world.folder / "ledger.bin").read_bytes()[: heads[5].size_bytes])
    assert world.audit().problems == (), "it is a sound chain by itself"
    with pytest.raises(DataError, match="ends after step 5"):
        world.audit(checkpoint=heads[9])


def test_a_damaged_ledger_names_the_record(world: World) -> None:
    heads = world.write(world.records())
    content = bytearray((world.folder / "ledger.bin").read_bytes())
    content[heads[6].size_bytes + 20] ^= 255
    (world.folder / "ledger.bin").write_bytes(content)
    with pytest.raises(DataError, match="record 7, from byte"):
        world.audit()


def test_the_command_prints_a_table_and_fails_when_a_sample_is_lost(world: World, monkeypatch, capsys) -> None:
    world.write(world.records())
    command(world.folder, monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert "many" in text and "0 lost, 0 repeated: every row is the plan's" in text and "on 2 ranks" in text
    records = list(world.records())
    records[4] = without_a_sample(records[4])
    world.write(records)
    with pytest.raises(DataError, match="lost: 1 uses of 1 samples"):
        command(world.folder, monkeypatch=monkeypatch)
    assert "1 lost, 0 repeated\n" in capsys.readouterr().out


def test_the_command_names_the_samples_of_a_step_and_shows_them(world: World, monkeypatch, capsys, tmp_path) -> None:
    records = list(world.records())
    records[2] = replace(records[2], not_trained={1: Status.QUARANTINED})
    world.write(records)
    command(world.folder, "--step", 3, "--preview", tmp_path / "page.html", monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert "step 3: attempt 1, 2 ranks, 4 rows" in text and text.count("quarantined") == 1
    lines = text.splitlines()[1:]
    assert len(lines) == len(records[2].sample_ids)
    for line, sample_id in zip(lines, records[2].sample_ids, strict=True):
        tokens = world.data.lengths.tokens[sample_id]
        assert f"  {world.data.table.sample_name(sample_id)}  {tokens} tokens  " in line
    assert "step 3" in (tmp_path / "page.html").read_text()
    with pytest.raises(DataError, match=r"has no step 99: it holds steps 1 to \d+"):
        command(world.folder, "--step", 99, monkeypatch=monkeypatch)
    with pytest.raises(ConfigError, match="--step N too"):
        command(world.folder, "--preview", monkeypatch=monkeypatch)
    assert step_of(LedgerReader(world.folder / "ledger.bin"), 3) == records[2]


def test_a_line_of_a_step_names_its_sample_in_full_and_as_it_is(world: World, monkeypatch) -> None:
    name = "/" + "long/" * 30 + "a-:fire:-[red]b.tar:key\x1b[2J\n"
    monkeypatch.setattr(ShardTable, "sample_name", lambda table, sample_id: name)
    _, line = audit_report.step_lines(Record(1, 1, 1, ((1,),)), world.data.table, world.data.lengths)
    tokens = world.data.lengths.tokens[1]
    shown = "/" + "long/" * 30 + "a-:fire:-[red]b.tar:key\\x1b[2J\\n"
    assert line == f"row 1  {shown}  {tokens} tokens  trained"


def test_the_tables_show_every_count_whole_at_80_columns(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = ("a-catalogue-of-garments-and-other-things", ":fire:[red]", "c", "d", "e", "f")
    sources = tuple(
        SourceAudit(name, 3_000_000 + i, 41_000 + i, 2, 2.5, 7_500_000 + i, 0, 0, 1_234_560 + i, 0, 0)
        for i, name in enumerate(names)
    )
    for table in audit_report.tables_of(Audit(1_500_000, 12_000_000, "", 0, 0, (), sources, ())):
        plain_console().print(table)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert ":fire:[red]" in text and "1,500,000 steps, 12,000,000 rows" in text
    for i in range(len(names)):
        assert all(f" {count:,} " in text for count in (3_000_000 + i, 41_000 + i, 7_500_000 + i, 1_234_560 + i))
    (samples, *_) = (line for line in text.splitlines() if "samples" in line)
    assert all(f"{3_000_000 + i:,}" in samples for i in range(3))


def test_progress_reaches_the_end_of_the_ledger(world: World) -> None:
    world.write(world.records())
    told: list[tuple[int, int]] = []
    world.audit(on_progress=lambda *bytes_: told.append(bytes_))
    size_bytes = (world.folder / "ledger.bin").stat().st_size
    assert told[-1] == (size_bytes, size_bytes) and told == sorted(told)


def test_shards_that_moved_are_found_again_when_told(world: World, monkeypatch, tmp_path, capsys) -> None:
    world.write(world.records())
    here = world.data.table
    for number, shard in enumerate(here.shards):
        Path(str(shard)).rename(tmp_path / Path(str(shard)).name)
        index = Path(f"{shard}.index.safetensors")
        assert number < 3 and index.exists()
    try:
        with pytest.raises(DataError, match="many-.*no such shard"):
            command(world.folder, monkeypatch=monkeypatch)
        found = [f"data.train.{i}.shards={tmp_path}/{name}-*.tar" for i, name in enumerate(("many", "few"))]
        command(world.folder, *found, monkeypatch=monkeypatch)
        assert "0 lost, 0 repeated" in capsys.readouterr().out
        with pytest.raises(DataError, match="written with other data.*\n.*`data.train` names other shards"):
            command(world.folder, f"data.train=[{{shards: {tmp_path}/few-*.tar}}]", monkeypatch=monkeypatch)
    finally:
        for shard in here.shards:
            (tmp_path / Path(str(shard)).name).rename(str(shard))


@pytest.mark.parametrize(
    ("word", "names"),
    [("data.row_length_tokens=700", "row_length_tokens 800 is now 700"), ("run.seed=3", "`run.seed` changed")],
)
def test_other_settings_are_named(world: World, word: str, names: str, monkeypatch) -> None:
    world.write(world.records())
    with pytest.raises(DataError, match=names):
        command(world.folder, word, monkeypatch=monkeypatch)


def test_wrong_folders_and_words_are_told_plainly(world: World, monkeypatch, tmp_path) -> None:
    with pytest.raises(ConfigError, match="no config.yaml, so this is no run folder"):
        command(tmp_path, monkeypatch=monkeypatch)
    with pytest.raises(ConfigError, match="did you mean `data.num_crops`"):
        command(world.folder, "data.num_crop=4", monkeypatch=monkeypatch)
    (world.folder / "ledger.bin").unlink()
    with pytest.raises(DataError, match="there is no ledger"):
        command(world.folder, monkeypatch=monkeypatch)


def test_samples_listed_by_a_run_are_read_from_its_folder(world: World) -> None:
    quarantine = Quarantine(world.folder / "quarantine.jsonl", None)
    quarantine.add([entry_of(world.data.table, 7, "cut off", 3), entry_of(world.data.table, 9, "cut off", 3)])
    quarantine.close()
    assert audit_report.listed_in(world.folder) == {7, 9}
    (world.folder / "quarantine.jsonl").unlink()
