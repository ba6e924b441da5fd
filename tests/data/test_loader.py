"""Planned steps → Batches: the same rows for any number of ranks, and nothing that a bad sample can move."""

import hashlib
import logging
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v_dist.config import SourceSettings
from phi3v_dist.data import pool
from phi3v_dist.data.batch import Batch, Example, Filling, Row, collate
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.loader import Decoder, Loader
from phi3v_dist.data.order import Order
from phi3v_dist.data.plan import PlannedRow, Planner, accumulation, assign
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import BadSample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.data.slots import Slot
from phi3v_dist.errors import DataError
from phi3v_dist.model import Phi3VForCausalLM

IGNORE = -100
ROWS_PER_STEP = 4


@dataclass(frozen=True)
class World:
    """A data set and the plan over it, from which loaders are made."""

    decoder: Decoder
    planner: Planner

    @classmethod
    def open(cls, folder: Path, model: Path, end: int | None = None) -> "World":
        table = ShardTable.open([SourceSettings(shards=[str(folder / "train-*.tar")])])
        processor = Phi3VProcessor.from_pretrained(model, num_crops=1)
        planner = Planner(
            Order(table, seed=0).sample_ids, measure(table, processor), rows_per_step=ROWS_PER_STEP,
            row_length_tokens=800, window_samples=20, packing=True, seed=0, end=end,
        )  # fmt: skip
        return cls(Decoder(table, Fetcher(table), processor), planner)

    def loader(self, consumer: int = 0, num_consumers: int = 1, **changes: Any) -> Loader:
        loader = Loader(
            steps=self.planner, decoder=self.decoder, lengths=self.planner.lengths, consumer=consumer,
            num_consumers=num_consumers, micro_steps=accumulation(ROWS_PER_STEP, num_consumers), num_workers=2,
            prefetch_rows=4,
        )  # fmt: skip
        return replace(loader, **changes)

    def steps(self, num_steps: int, **changes: Any) -> list[list[Batch]]:
        return [kept(batches) for _, batches in islice(self.loader(**changes), num_steps)]


def kept(batches: Iterable[Batch]) -> list[Batch]:
    """A copy of each, since the loader uses their memory again."""
    return [replace(batch, pixel_values=batch.pixel_values.clone()) for batch in batches]


@pytest.fixture(scope="module")
def world(shards: Path, tiny_model: Path) -> World:
    return World.open(shards, tiny_model)


def fingerprint(batch: Batch) -> str:
    """Everything in a Batch, in a form that compares to the last bit."""
    of_batch = [value for name, value in vars(batch).items() if name != "row"]  # its examples' crops are used again
    values = [*of_batch, *vars(batch.layout).values(), *vars(batch.placement).values()]
    values += [batch.image_sizes, batch.quarantined]
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


def is_empty(batch: Batch) -> bool:
    return batch.input_ids.shape[1] == 8 and not batch.label_tokens


@pytest.mark.parametrize("num_consumers", [2, 3, 5])
@pytest.mark.supports("local", on="one process")
def test_all_ranks_together_get_the_rows_that_one_alone_gets(world: World, num_consumers: int) -> None:
    alone = world.steps(2)
    ranks = [world.steps(2, consumer=rank, num_consumers=num_consumers) for rank in range(num_consumers)]
    for number, step in enumerate(alone):
        shares = [rank[number] for rank in ranks]
        assert {len(share) for share in shares} == {accumulation(ROWS_PER_STEP, num_consumers)}
        batches = [batch for share in shares for batch in share]
        rows = Counter(fingerprint(batch) for batch in batches if not is_empty(batch))
        assert rows == Counter(fingerprint(batch) for batch in step)
        assert sum(map(is_empty, batches)) == len(batches) - ROWS_PER_STEP
        assert sum(batch.label_tokens for batch in batches) == step[0].plan.label_tokens


def test_the_state_of_a_step_leads_on_to_the_same_batches(world: World) -> None:
    whole = world.steps(4)
    rest = world.steps(2, steps=world.planner.resume(whole[1][0].plan.state))
    assert [list(map(fingerprint, step)) for step in rest] == [list(map(fingerprint, step)) for step in whole[2:]]


def test_batches_do_not_depend_on_threads_or_prefetch(world: World) -> None:
    one, many = (world.steps(2, num_workers=n, prefetch_rows=rows) for n, rows in ((1, 1), (4, 8)))
    assert [list(map(fingerprint, step)) for step in one] == [list(map(fingerprint, step)) for step in many]


def test_a_plan_that_ends_gives_all_its_steps(shards: Path, tiny_model: Path) -> None:
    finite = World.open(shards, tiny_model, end=40)
    steps = [plan for plan, _ in finite.loader(prefetch_rows=40)]
    assert steps == list(finite.planner)
    assert sorted(i for step in steps for i in step.sample_ids) == list(range(40))


@pytest.mark.fault(65)
def test_a_bad_sample_becomes_filling_and_moves_nothing(shards: Path, tiny_model: Path, tmp_path: Path, caplog) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    damaged = World.open(folder, tiny_model)
    clean = damaged.steps(2)
    table = damaged.decoder.table
    victim = next(i for i in clean[0][0].plan.sample_ids if damaged.planner.lengths.crops[i])
    shard, number = table.locate(victim)
    (photo,) = [member for member in table.index(shard).members(number) if member.name == "0.jpg"]
    with open(table.shards[shard], "r+b") as file:
        file.seek(photo.offset + photo.size_bytes // 2)
        file.write(b"damage")
    with caplog.at_level(logging.WARNING):
        steps = damaged.steps(2)
    key, tokens = table.index(shard).key(number), int(damaged.planner.lengths.tokens[victim])
    (warning,) = {record.getMessage() for record in caplog.records if "quarantined" in record.getMessage()}
    assert f"{table.shards[shard]}: sample '{key}': the bytes of 0.jpg are not those" in warning
    for before, after in zip(sum(clean, []), sum(steps, []), strict=True):
        assert after.layout.lengths == before.layout.lengths and after.plan == before.plan
        if not after.quarantined:
            assert fingerprint(after) == fingerprint(before)
            continue
        (filling,) = after.quarantined
        assert (filling.sample_id, filling.num_tokens, filling.name[-len(key) :]) == (victim, tokens, key)
        changed = (after.input_ids != before.input_ids)[0].nonzero().flatten()
        begin = int(after.layout.cu_seqlens[(after.layout.cu_seqlens <= changed[0]).nonzero()[-1, 0]])
        here = slice(begin, begin + tokens)
        pad_id = damaged.decoder.processor.tokenizer.pad_token_id
        assert set(after.input_ids[0, here].tolist()) == {pad_id}
        elsewhere = (before.layout.target_positions < begin) | (before.layout.target_positions >= begin + tokens)
        assert torch.equal(after.layout.target_positions, before.layout.target_positions[elsewhere])
        assert torch.equal(after.layout.targets, before.layout.targets[elsewhere])
        assert after.label_tokens == before.label_tokens - damaged.planner.lengths.label_tokens[victim]
    assert sum(len(batch.quarantined) for batch in steps[0]) == 1


def test_a_length_that_is_not_the_planned_one_makes_a_bad_sample(world: World, caplog) -> None:
    longer = replace(world.planner.lengths, tokens=world.planner.lengths.tokens + 1)
    first = world.steps(1, lengths=longer)[0]
    assert sorted(f.sample_id for batch in first for f in batch.quarantined) == sorted(first[0].plan.sample_ids)
    assert "delete its lengths file" in caplog.text


@dataclass(frozen=True)
class Watched(Decoder):
    """Remembers what it decoded, and fails at one sample; some it finds bad when their crops are written already."""

    decoded: list[int] = field(default_factory=list)
    fail_at: int | None = None
    bad: tuple[int, ...] = ()

    def example(self, sample_id: int, planned_tokens: int, out: torch.Tensor | None = None) -> Example:
        self.decoded.append(sample_id)
        if sample_id == self.fail_at:
            raise RuntimeError("a mistake of ours")
        example = super().example(sample_id, planned_tokens, out)
        if sample_id in self.bad:
            example.pixel_values.fill_(77)
            raise BadSample("a shard", str(sample_id), "found late")
        return example


def watched(world: World, **how: Any) -> Watched:
    return Watched(world.decoder.table, world.decoder.fetcher, world.decoder.processor, **how)


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.timeout(30)
def test_a_mistake_that_is_not_a_bad_sample_reaches_the_caller_at_its_batch(world: World) -> None:
    _, second, third = islice(world.planner, 3)
    steps = iter(world.loader(decoder=watched(world, fail_at=third.sample_ids[0])))
    assert [len(kept(batches)) for _, batches in islice(steps, 2)] == [ROWS_PER_STEP] * 2
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        kept(next(steps)[1])
    steps.close()
    assert not decoding_threads()


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("prefetch_rows", "batches_taken"), [(1, 1), (4, 2), (9, 3)])
def test_no_more_is_decoded_ahead_than_was_asked_for(world: World, prefetch_rows: int, batches_taken: int) -> None:
    decoder = watched(world)
    steps = iter(world.loader(decoder=decoder, prefetch_rows=prefetch_rows))
    _, batches = next(steps)
    for _ in range(batches_taken):
        next(batches)
    rows = [row for step in islice(world.planner, 3) for (row,) in assign(step, 1, ROWS_PER_STEP)]
    planned = sorted(i for row in rows[: batches_taken + prefetch_rows] for i in row.sample_ids)
    deadline = time.monotonic() + 20
    while len(decoder.decoded) < len(planned) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(decoder.decoded) == planned
    steps.close()
    assert not decoding_threads()


@pytest.mark.timeout(30)
def test_a_loader_that_is_left_early_throws_away_work_in_flight(world: World) -> None:
    decoder = watched(world)
    steps = iter(world.loader(decoder=decoder, prefetch_rows=100, num_workers=1))
    next(next(steps)[1])
    steps.close()
    assert not decoding_threads()
    assert len(decoder.decoded) < 30  # of 26 steps, about 300 samples, asked for


def test_batches_that_nobody_asked_for_are_passed_over(world: World) -> None:
    steps = iter(world.loader())
    first, batches = next(steps)
    next(batches)
    second, batches = next(steps)
    assert (first.number, second.number) == (1, 2)
    assert list(map(fingerprint, kept(batches))) == list(map(fingerprint, world.steps(2)[1]))


def example_of(labels: list[int], sample_id: int) -> Example:
    ids = torch.arange(len(labels)) + 10
    return Example(
        sample_id, ids, torch.tensor(labels), torch.zeros(0, 3, 336, 336), torch.zeros(0, 2, dtype=torch.int64)
    )


LABELS = st.lists(st.sampled_from([IGNORE, IGNORE, 7, 8, 9]), min_size=1, max_size=12)
PARTS = st.lists(LABELS | st.integers(1, 9), min_size=1, max_size=6)


@settings(deadline=None)
@given(PARTS)
def test_borders_and_targets_are_those_of_each_document_alone(parts: list[list[int] | int]) -> None:
    row = Row(tuple(Filling(p) if isinstance(p, int) else example_of(p, i) for i, p in enumerate(parts)))
    batch = collate(row, pad_id=0)
    documents = [[IGNORE] * part if isinstance(part, int) else part for part in parts]
    borders, positions, wanted, targets = [0], [], [], []
    for labels in documents:
        wanted += [borders[-1] + i - 1 for i, label in enumerate(labels) if i > 0 and label != IGNORE]
        targets += [label for label in labels[1:] if label != IGNORE]
        positions += range(len(labels))
        borders.append(borders[-1] + len(labels))
    layout = batch.layout
    assert layout.cu_seqlens.tolist() == borders and list(layout.lengths) == [len(labels) for labels in documents]
    assert batch.position_ids[0].tolist() == positions
    assert layout.rope_lengths.tolist() == [len(labels) for labels in documents for _ in labels]
    assert layout.num_targets == batch.label_tokens == len(targets)
    assert layout.target_positions.tolist() == (wanted or [0]) and layout.targets.tolist() == (targets or [IGNORE])
    assert batch.pixel_values.shape == (1, 3, 336, 336) and not batch.pixel_values.any()


def test_a_batch_holds_the_pictures_of_its_row_in_order(world: World) -> None:
    for batch in world.steps(1)[0]:
        row = next(r for r in batch.plan.rows if r.tokens == batch.input_ids.shape[1])
        examples = [world.decoder.example(i, int(world.planner.lengths.tokens[i])) for i in row.sample_ids]
        assert torch.equal(batch.input_ids[0], torch.cat([example.input_ids for example in examples]))
        assert torch.equal(batch.image_sizes, torch.cat([example.image_sizes for example in examples]))
        pixels = torch.cat([example.pixel_values for example in examples])
        assert torch.equal(batch.pixel_values, pixels) if len(pixels) else not batch.pixel_values.any()
        assert len(pixels) == row.crops and batch.label_tokens == row.label_tokens


@pytest.mark.parametrize("crops", ["exact", "fast"])
def test_quarantined_pictures_leave_no_gap_and_nothing_of_an_earlier_row(world: World, crops: Any) -> None:
    decoder = replace(world.decoder, crops=crops)
    plan = list(islice(world.planner, 5))  # 20 rows, through 5 slots
    rows = [row.sample_ids for step in plan for row in step.rows]
    bad = {i for number, ids in enumerate(rows) for i in (ids if number % 5 == 4 else ids[number % 3 :: 3])}
    steps = world.steps(5, decoder=watched(world, crops=crops, bad=tuple(bad)))
    num_dummies = num_with_gap = 0
    planned = [row for step in plan for (row,) in assign(step, 1, ROWS_PER_STEP)]
    for row, batch in zip(planned, sum(steps, []), strict=True):
        good = [decoder.example(i, int(world.planner.lengths.tokens[i])) for i in row.sample_ids if i not in bad]
        pixels = torch.cat([example.pixel_values for example in good]) if good else torch.zeros(0)
        assert {filling.sample_id for filling in batch.quarantined} == bad & {*row.sample_ids}
        assert torch.equal(batch.pixel_values, pixels) if len(pixels) else not batch.pixel_values.any()
        num_dummies += not len(pixels)
        num_with_gap += 0 < len(pixels) < row.crops
    assert num_dummies and num_with_gap > 4


def test_a_row_may_hold_a_sample_twice(world: World) -> None:
    (step,) = islice(world.planner, 1)
    lengths = world.planner.lengths
    once = next(i for i in step.sample_ids if lengths.crops[i])
    sizes = (
        int(2 * column[once]) for column in (lengths.tokens, lengths.tokens**2, lengths.label_tokens, lengths.crops)
    )
    twice = replace(step, rows=(PlannedRow((once, once), *sizes),))  # where one epoch ends and the next begins
    ((batch, *_),) = world.steps(1, steps=[twice])
    assert len(batch.layout.lengths) == 2 and len(set(batch.layout.lengths)) == 1
    first, second = batch.pixel_values.chunk(2)
    assert torch.equal(first, second) and len(batch.image_sizes) == 2


@pytest.mark.parametrize("prefetch_rows", [1, 5])
def test_memory_for_crops_is_used_again(world: World, prefetch_rows: int, monkeypatch) -> None:
    alive: weakref.WeakSet[Slot] = weakref.WeakSet()
    most = made = 0

    class Counted(Slot):
        def __init__(self, *arguments: Any):
            nonlocal made
            super().__init__(*arguments)
            alive.add(self)
            made += 1

    monkeypatch.setattr("phi3v_dist.data.slots.Slot", Counted)
    for _, batches in islice(world.loader(prefetch_rows=prefetch_rows), 6):
        for _ in batches:
            most = max(most, len(alive))
    assert most == prefetch_rows + 1
    assert made <= 2 * most < 6 * ROWS_PER_STEP  # some had to grow


@pytest.mark.parametrize("crops", ["exact", "fast"])
@pytest.mark.parametrize("chunk_crops", [None, 2])  # 2: several calls, recomputed in the backward pass
def test_gradients_do_not_change_when_crops_are_overwritten_after_their_backward(
    world: World, tiny_model: Path, crops: Any, chunk_crops: int | None
) -> None:
    decoder = replace(world.decoder, crops=crops)
    gradients = []
    for overwrite in (False, True):
        model = Phi3VForCausalLM.from_pretrained(tiny_model).train()
        model.set_gradient_checkpointing(chunk_crops is not None, chunk_crops)
        for _, batches in islice(world.loader(decoder=decoder, vision_chunk_crops=chunk_crops), 2):
            for batch in batches if overwrite else kept(batches):
                model(**batch.inputs(torch.device("cpu"))).token_losses.sum().backward()
                if overwrite:
                    batch.pixel_values.fill_(99)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(map(torch.equal, *gradients))


@dataclass(frozen=True)
class Stopped(Fetcher):
    """A fetcher whose storage does not answer for one sample."""

    table: ShardTable
    sample_id: int
    let_go: threading.Event

    def fetch(self, sample_id: int, text_only: bool = False) -> dict[str, bytes]:
        if sample_id == self.sample_id:
            self.let_go.wait()
        return Fetcher(self.table).fetch(sample_id, text_only)


@pytest.mark.fault(62)
@pytest.mark.timeout(60)
def test_a_decode_that_hangs_stops_the_run_by_name(world: World, monkeypatch) -> None:
    monkeypatch.setattr(pool, "DECODE_LIMIT_S", 0.5)
    monkeypatch.setattr(pool, "POLL_S", 0.1)
    monkeypatch.setattr(pool, "CLOSE_S", 0.2)
    first, second = islice(world.planner, 2)
    victim, let_go = second.sample_ids[0], threading.Event()
    decoder = replace(world.decoder, fetcher=Stopped(world.decoder.table, victim, let_go))
    steps = iter(world.loader(decoder=decoder, num_workers=1))
    assert len(kept(next(steps)[1])) == ROWS_PER_STEP
    with pytest.raises(DataError, match=f"{world.decoder.table.sample_name(victim)}: .* in `sample` .loader.py, line"):
        kept(next(steps)[1])
    steps.close()
    assert decoding_threads()  # left behind
    let_go.set()


@pytest.mark.parametrize("num_consumers", [3, 5])
def test_every_rank_plans_the_same_calls_of_the_vision_tower(world: World, num_consumers: int) -> None:
    ranks = [
        world.steps(2, consumer=r, num_consumers=num_consumers, vision_chunk_crops=2) for r in range(num_consumers)
    ]
    crops_seen = set()  # 4 in a row of this world, 1 in an empty one
    for micro_step in zip(*(sum(rank, []) for rank in ranks), strict=True):
        most = max(len(batch.pixel_values) for batch in micro_step)
        assert {batch.num_vision_chunks for batch in micro_step} == {-(-most // 2)}
        crops_seen |= {len(batch.pixel_values) for batch in micro_step}
    assert len(crops_seen) > 1
    assert {batch.num_vision_chunks for batch in world.steps(1)[0]} == {1}  # no limit was set


def test_pictures_that_cannot_be_decoded_do_not_change_the_number_of_calls(world: World) -> None:
    longer = replace(world.planner.lengths, tokens=world.planner.lengths.tokens + 1)  # so that none is as planned
    planned, found = (world.steps(1, vision_chunk_crops=2, **change)[0] for change in ({}, {"lengths": longer}))
    assert all(len(batch.pixel_values) == 1 and batch.quarantined for batch in found)
    assert [batch.num_vision_chunks for batch in found] == [batch.num_vision_chunks for batch in planned]
    assert max(batch.num_vision_chunks for batch in planned) > 1


@pytest.mark.parametrize(("crops", "dtype"), [("fast", torch.uint8), ("exact", torch.float32)])
def test_a_run_has_one_kind_of_crops_pictures_or_not(world: World, crops: Any, dtype: torch.dtype) -> None:
    decoder = replace(world.decoder, crops=crops)
    longer = replace(world.planner.lengths, tokens=world.planner.lengths.tokens + 1)
    empty = world.steps(1, decoder=decoder, consumer=1, num_consumers=5)[0]
    batches = [*world.steps(1, decoder=decoder)[0], *world.steps(1, decoder=decoder, lengths=longer)[0], *empty]
    assert {batch.pixel_values.dtype for batch in batches} == {dtype}
    normalization = decoder.processor.normalization if crops == "fast" else None
    assert all(batch.normalization == normalization for batch in batches)


def test_fast_crops_leave_everything_else_as_it_is(world: World) -> None:
    exact, fast = (world.steps(2, decoder=replace(world.decoder, crops=crops)) for crops in ("exact", "fast"))
    for one, other in zip(sum(exact, []), sum(fast, []), strict=True):
        near = world.decoder.processor.normalization(other.pixel_values)
        if len(one.image_sizes):
            assert (near - one.pixel_values).abs().mean() <= 0.01  # one grey step is 0.015
        plain = replace(other, pixel_values=one.pixel_values, normalization=None)
        assert fingerprint(plain) == fingerprint(one)
