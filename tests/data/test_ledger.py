"""The ledger: what is written comes back, a torn end is left out, no change below a checkpoint's head goes unseen."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v_dist.data import identity
from phi3v_dist.data.ledger import COUNTS, Head, Ledger, LedgerReader, Record, Status, decode, encode
from phi3v_dist.data.plan import PlannedRow, PlannedStep
from phi3v_dist.errors import CheckpointError, DataError
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.train.accounts import Accounts, plan_state

IDS = st.integers(0, 2**32 - 1)
RECORDS = st.builds(
    Record, step=st.integers(1, 2**60), attempt=st.integers(1, 9), world_size=st.integers(1, 9999),
    rows=st.lists(st.lists(IDS, max_size=5).map(tuple), max_size=5).map(tuple), empty_rows=st.integers(0, 9),
)  # fmt: skip


def record_of(step: int, **changes: Any) -> Record:
    rows = ((10 * step, 10 * step + 1), (10 * step + 2,))
    return replace(Record(step, attempt=1, world_size=2, rows=rows), **changes)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[Head]]:
    """A ledger of five steps, and the head after each, the beginning first."""
    ledger = Ledger.begin(tmp_path / "run" / "ledger.bin", {"plan": "p"})
    heads = [ledger.head]
    for step in range(1, 6):
        ledger.append(record_of(step, not_trained={1: Status.QUARANTINED} if step == 3 else {}))
        heads.append(ledger.sync())
    ledger.close()
    return ledger.path, heads


@given(RECORDS, st.data())
def test_a_record_comes_back_as_it_was(record: Record, data: st.DataObject) -> None:
    places = st.integers(0, max(0, len(record.sample_ids) - 1))
    not_trained = data.draw(st.dictionaries(places, st.sampled_from(Status), max_size=len(record.sample_ids)))
    record = replace(record, not_trained=not_trained)
    assert decode(encode(record)) == record


@given(st.binary(min_size=COUNTS.size, max_size=200))
def test_a_payload_of_anything_is_a_record_or_none(payload: bytes) -> None:
    record = decode(payload)
    assert record is None or encode(record) == payload or len(record.not_trained) > 1


def test_what_was_written_is_read_with_its_heads(written: tuple[Path, list[Head]]) -> None:
    path, heads = written
    reader = LedgerReader(path)
    read = list(reader)
    assert [record.step for record, _ in read] == [1, 2, 3, 4, 5]
    assert [reader.start, *(head for _, head in read)] == heads
    assert read[2][0].not_trained == {1: Status.QUARANTINED} and reader.facts["plan"] == "p"
    assert json.loads(path.read_bytes().split(b"\n")[0])["version"] == 1  # `head -1` shows it


def test_a_sample_takes_few_bytes(tmp_path: Path) -> None:
    """100 million samples: half a gigabyte."""
    ledger = Ledger.begin(tmp_path / "ledger.bin", {})
    begin = ledger.head.size_bytes
    rows = tuple(tuple(range(12)) for _ in range(64))
    ledger.append(record_of(1, rows=rows))
    assert (ledger.head.size_bytes - begin) / (64 * 12) < 5


def test_a_record_torn_at_any_byte_is_left_out_and_cut_off_at_a_resume(written: tuple[Path, list[Head]]) -> None:
    path, heads = written
    content = path.read_bytes()
    for end in range(heads[4].size_bytes + 1, heads[5].size_bytes):
        path.write_bytes(content[:end])
        reader = LedgerReader(path)
        assert [record.step for record, _ in reader] == [1, 2, 3, 4]
        assert reader.torn_bytes == end - heads[4].size_bytes
        Ledger.resume(path, heads[4]).close()
        assert path.read_bytes() == content[: heads[4].size_bytes]


def test_a_resume_forgets_steps_above_the_checkpoint_and_goes_on(written: tuple[Path, list[Head]]) -> None:
    path, heads = written
    ledger = Ledger.resume(path, heads[2])
    assert [record.step for record, _ in LedgerReader(path)] == [1, 2]
    ledger.append(record_of(3, attempt=2))
    assert [(record.step, record.attempt) for record, _ in LedgerReader(path)] == [(1, 1), (2, 1), (3, 2)]


def test_garbage_above_the_checkpoint_is_no_obstacle(written: tuple[Path, list[Head]]) -> None:
    path, heads = written
    content = path.read_bytes()
    path.write_bytes(content[: heads[3].size_bytes] + bytes(500))  # what some file systems leave after a power cut
    Ledger.resume(path, heads[3]).append(record_of(4))
    assert len(list(LedgerReader(path))) == 4


def test_every_changed_byte_below_the_head_is_found_and_its_record_named(written: tuple[Path, list[Head]]) -> None:
    path, heads = written
    content = path.read_bytes()
    for place in range(heads[5].size_bytes):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DataError) as raised:
            Ledger.resume(path, heads[5])
        number = sum(place >= head.size_bytes for head in heads)
        if number:
            says = (f"record {number}, from byte {heads[number - 1].size_bytes} on", f"ends after step {number - 1}")
            assert any(text in str(raised.value) for text in says), place
        assert "put the run's own file back" in str(raised.value) or "version" in str(raised.value)
    path.write_bytes(content)
    Ledger.resume(path, heads[5])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path, heads: path.unlink(), "there is no ledger"),
        (lambda path, heads: path.write_bytes(b""), "damaged in its first line"),
        (lambda path, heads: path.write_bytes(b"\x1f\x8b" * 99), "damaged in its first line"),
        (lambda path, heads: os.truncate(path, heads[4].size_bytes), r"ends after step 4, .* saved with step 5"),
        (lambda path, heads: Ledger.begin(path, {"plan": "other"}), "ends after step 0"),
        (lambda path, heads: other_run(path), "not the ledger this checkpoint was saved with"),
        (
            lambda path, heads: path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 2')),
            "has ledger version 2, this program reads version 1",
        ),
    ],
)
def test_a_ledger_that_is_not_the_checkpoints_stops_a_resume(written: tuple, damage: Any, words: str) -> None:
    path, heads = written
    damage(path, heads)
    found = path.read_bytes() if path.exists() else None
    with pytest.raises(DataError, match=words):
        Ledger.resume(path, heads[5])
    assert (path.read_bytes() if path.exists() else None) == found, "and it is not touched"


def other_run(path: Path) -> None:
    ledger = Ledger.begin(path, {"plan": "q"})
    for step in range(1, 9):
        ledger.append(record_of(step))


def test_a_second_writer_is_noticed(written: tuple[Path, list[Head]]) -> None:
    path, heads = written
    one, other = Ledger.resume(path, heads[5]), Ledger.resume(path, heads[5])
    one.append(record_of(6))
    with pytest.raises(DataError, match="started twice"):
        other.append(record_of(6))


FACTS = {
    "plan": "a", "shards": "s", "lengths": "l", "weights": "w", "seed": 0, "row_length_tokens": 800,
    "window_samples": 20, "packing": True, "end": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shards", "`data.train`"), ("lengths", "tokenizer"), ("weights", "`weight`"), ("seed", "`run.seed`"),
        ("row_length_tokens", "`data.row_length_tokens`"), ("window_samples", "`data.window_samples`"),
        ("packing", "`data.packing`"), ("end", "`train.epochs`"), ("plan", "release"),
    ],
)  # fmt: skip
def test_a_difference_is_named_with_what_to_put_back(name: str, words: str) -> None:
    (message,) = identity.differences(FACTS, FACTS | {name: "other"})
    assert words in message
    assert identity.differences(FACTS, dict(FACTS)) == []


def test_other_shards_are_one_difference_and_not_five() -> None:
    changed = FACTS | {"plan": "b", "shards": "t", "lengths": "m", "weights": "v", "window_samples": 10, "end": 9}
    (message,) = identity.differences(FACTS, changed)
    assert message.startswith("shards s is now t")


def test_the_hash_of_rows_does_not_depend_on_how_steps_cut_them() -> None:
    rows = [(1, 2), (3,), (4, 5, 6), ()]
    whole = identity.chain_rows(identity.NO_ROWS_YET, rows)
    assert identity.chain_rows(identity.chain_rows(identity.NO_ROWS_YET, rows[:1]), rows[1:]) == whole
    assert identity.chain_rows(identity.NO_ROWS_YET, [(1,), (2, 3), (4, 5, 6), ()]) != whole


@dataclass(frozen=True)
class TwoRanks(Topology):
    """Rank 0, and what rank 1 would have said instead."""

    world_size: int = 2
    host: str = "node-a"
    other: Any = None

    def gather(self, value: Any) -> list[Any]:
        host, facts = value
        return [value, ("node-b", facts | (self.other or {}))]

    def broadcast(self, value: Any) -> Any:
        return value


@pytest.fixture
def world(shards: Path, tiny_model: Path) -> Any:
    """Real shards and a plan of them."""
    from phi3v_dist.config import SourceSettings
    from phi3v_dist.data.lengths import measure
    from phi3v_dist.data.order import Order
    from phi3v_dist.data.plan import Planner
    from phi3v_dist.data.processor import Phi3VProcessor
    from phi3v_dist.data.shards import ShardTable

    table = ShardTable.open([SourceSettings(shards=[str(shards / "train-*.tar")])])
    lengths = measure(table, Phi3VProcessor.from_pretrained(tiny_model, num_crops=1))

    def planner(**changes: Any) -> Planner:
        options = {"rows_per_step": 3, "row_length_tokens": 800, "window_samples": 20, "packing": True, "seed": 0}
        return Planner(Order(table, options["seed"]).sample_ids, lengths, **options | changes)

    return table, lengths, planner


def books(folder: Path, world: Any, state: Any = None, topology: Topology | None = None, **changes: Any) -> Accounts:
    table, lengths, planner = world
    return Accounts.open(folder, topology or Topology(), table, lengths, planner(**changes), 1.0, 1, state)


@pytest.mark.fault(20)
def test_a_rank_that_sees_other_data_is_named_before_the_first_step(tmp_path: Path, world: Any) -> None:
    with pytest.raises(DataError, match=r"rank 1 on node-b: lengths is 7777, rank 0 on node-a has "):
        books(tmp_path, world, topology=TwoRanks(other={"lengths": "7777"}))
    books(tmp_path, world, topology=TwoRanks())


@pytest.mark.fault(20)
def test_a_rank_that_planned_other_rows_is_named_at_the_checkpoint(tmp_path: Path, world: Any) -> None:
    accounts = books(tmp_path, world, topology=TwoRanks())
    step = next(iter(world[2]()))
    accounts.record(step, [], 0)
    accounts.topology = TwoRanks(other={"chain": "7777"})
    with pytest.raises(DataError, match=r"rows up to step 1.*\n.*rank 1 on node-b: chain is 7777"):
        accounts.state(step)


@pytest.mark.parametrize("changes", [{"rows_per_step": 7}, {}])
def test_a_resume_goes_on_with_the_same_rows_whatever_a_step_holds(tmp_path: Path, world: Any, changes: Any) -> None:
    accounts = books(tmp_path, world)
    step = next(iter(world[2]()))
    accounts.record(step, [], 0)
    state = json.loads(json.dumps(accounts.state(step)))
    again = books(tmp_path, world, state, **changes)
    assert plan_state(state) == step.state and again.chain == accounts.chain
    assert again.ledger is not None and again.ledger.head.step == 1


@pytest.mark.parametrize("changes", [{"seed": 1}, {"row_length_tokens": 900}, {"window_samples": 30}, {"end": 40}])
def test_a_resume_with_another_plan_is_refused(tmp_path: Path, world: Any, changes: dict[str, Any]) -> None:
    accounts = books(tmp_path, world)
    step = next(iter(world[2]()))
    accounts.record(step, [], 0)
    with pytest.raises(DataError, match=f"(?s)cannot go on where its checkpoint ends.*{next(iter(changes))}"):
        books(tmp_path, world, accounts.state(step), **changes)


def test_a_checkpoint_of_a_release_without_a_ledger_is_refused(tmp_path: Path, world: Any) -> None:
    old = {"step": 1, "window": 0, "rows_used": 3, "carry": []}
    with pytest.raises(CheckpointError, match="data state has version None"):
        books(tmp_path, world, old)


def test_books_are_begun_anew_only_where_there_is_no_checkpoint_and_say_so(tmp_path: Path, world: Any, caplog) -> None:
    accounts = books(tmp_path, world)
    accounts.record(next(iter(world[2]())), [], 0)
    books(tmp_path, world)
    assert "begun anew, as the weights are" in caplog.text
    assert not list(LedgerReader(tmp_path / "ledger.bin"))


def test_the_books_are_on_the_disk_before_a_checkpoint_names_them(tmp_path: Path, world: Any, monkeypatch) -> None:
    accounts = books(tmp_path, world)
    step = next(iter(world[2]()))
    accounts.record(step, [], 0)
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    accounts.state(step)
    assert set(flushed) == {"ledger.bin", "quarantine.jsonl"}


def test_a_step_that_changed_nothing_is_marked(tmp_path: Path, world: Any) -> None:
    accounts = books(tmp_path, world)
    row = PlannedRow((0, 1), *[2] * (len(PlannedRow.__dataclass_fields__) - 1))
    accounts.record(PlannedStep(1, (row,), 2, 2, {}), [(1, "cut off")], 1, updated=False)
    ((record, _),) = LedgerReader(tmp_path / "ledger.bin")
    assert record.not_trained == {0: Status.SKIPPED, 1: Status.QUARANTINED} and record.empty_rows == 2
    assert np.array(record.sample_ids).tolist() == [0, 1]
