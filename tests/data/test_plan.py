"""Lengths → rows → steps: nothing lost, nothing twice, and the same from any state and for any number of ranks."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v_dist.data.plan import (
    MAX_CARRIES,
    Lengths,
    PlannedRow,
    PlannedStep,
    Planner,
    accumulation,
    assign,
    overfit,
)
from phi3v_dist.errors import DataError

ROW_TOKENS = 100


def lengths_of(tokens: Any) -> Lengths:
    tokens = np.asarray(tokens, np.int32)
    return Lengths(tokens, (tokens + 2) // 3, (tokens % 4).astype(np.int32), tokens, {})


def planner_of(tokens: Any, **options: Any) -> Planner:
    """A planner over sample ids 0, 1, 2, … that begin again when all were drawn."""
    lengths = lengths_of(tokens)
    defaults = {
        "rows_per_step": 3, "row_length_tokens": ROW_TOKENS, "window_samples": 8, "packing": True, "seed": 0,
        "end": len(lengths),
    }  # fmt: skip
    return Planner(lambda begin, end: np.arange(begin, end) % len(lengths), lengths, **defaults | options)


TOKENS = st.lists(st.integers(0, 130), min_size=1, max_size=60).filter(lambda t: any(0 < n <= ROW_TOKENS for n in t))
OPTIONS = st.fixed_dictionaries(
    {"rows_per_step": st.integers(1, 7), "window_samples": st.integers(1, 30), "packing": st.booleans()}
)


@settings(deadline=None)
@given(TOKENS, OPTIONS, st.integers(1, 3))
def test_every_usable_sample_is_in_one_row_per_epoch(tokens: list[int], options: dict, epochs: int) -> None:
    steps = list(planner_of(tokens, end=epochs * len(tokens), **options))
    usable = {i: epochs for i, n in enumerate(tokens) if 0 < n <= ROW_TOKENS}
    assert Counter(i for step in steps for i in step.sample_ids) == usable
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    assert [len(step.rows) for step in steps[:-1]] == [options["rows_per_step"]] * (len(steps) - 1)
    assert 0 < len(steps[-1].rows) <= options["rows_per_step"]


@settings(deadline=None)
@given(TOKENS, OPTIONS)
def test_rows_fit_and_say_what_they_hold(tokens: list[int], options: dict) -> None:
    lengths = lengths_of(tokens)
    for step in planner_of(tokens, **options):
        for row in step.rows:
            columns = (lengths.tokens, lengths.tokens**2, lengths.label_tokens, lengths.crops)
            held = [sum(column[i] for i in row.sample_ids) for column in columns]
            assert [row.tokens, row.squared_tokens, row.label_tokens, row.crops] == held
            assert 0 < row.tokens <= ROW_TOKENS and (options["packing"] or len(row.sample_ids) == 1)
        assert step.tokens == sum(row.tokens for row in step.rows)
        assert step.label_tokens == sum(row.label_tokens for row in step.rows)


@settings(deadline=None, max_examples=50)
@given(TOKENS, OPTIONS, st.booleans())
def test_every_state_leads_on_to_the_same_steps(tokens: list[int], options: dict, endless: bool) -> None:
    planner = planner_of(tokens, **options | ({"end": None} if endless else {}))
    steps = list(islice(planner, 10))
    for step in steps:
        again = planner.resume(json.loads(json.dumps(step.state)))
        assert list(islice(again, 10 - step.number)) == steps[step.number :]


def test_another_seed_or_window_is_another_plan_and_the_same_is_the_same() -> None:
    tokens = np.random.default_rng(0).integers(5, 60, 200)
    plans = [list(planner_of(tokens, **options)) for options in ({}, {}, {"seed": 1}, {"window_samples": 9})]
    assert plans[0] == plans[1]
    assert plans[0][:5] != plans[2][:5] and plans[0][:5] != plans[3][:5]


def test_rows_of_a_window_are_not_trained_in_the_order_of_their_size() -> None:
    steps = list(planner_of(np.arange(1, 100), packing=True, window_samples=99, rows_per_step=1))
    longest = [max(step.sample_ids) for step in steps]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def length_mixes() -> dict[str, tuple[int, np.ndarray]]:
    rng = np.random.default_rng(0)
    captions, documents = rng.lognormal(4.1, 0.8, 6000), rng.lognormal(7.9, 1.5, 6000)
    picture = np.where(rng.random(6000) < 0.75, 1, 0)
    return {
        "800, pictures": (800, captions + 313 * picture),
        "800, never full": (800, np.full(6000, 280)),
        "8192, pictures": (8192, documents / 5 + 1921 * picture),
        "8192, never full": (8192, rng.normal(4500, 300, 6000)),
        "131072, documents": (131_072, documents + 2509 * picture),
        "131072, never full": (131_072, rng.normal(70_000, 2000, 6000)),
        "131072, captions": (131_072, captions),
        "131072, words": (131_072, rng.integers(5, 12, 6000)),
    }


@pytest.mark.parametrize("mix", length_mixes())
def test_the_state_is_json_of_less_than_64_kb(mix: str) -> None:
    """4.2 KB with windows of 4,096 samples, whatever is carried; in the last mix 16,000 samples, which fill no row."""
    row_length_tokens, tokens = length_mixes()[mix]
    planner = planner_of(tokens, row_length_tokens=row_length_tokens, window_samples=4096, rows_per_step=8, end=None)
    for step in islice(planner, 150):
        assert len(json.dumps(step.state)) < 5 * 1024
        if step.state["window"] > 12:
            break


@pytest.mark.parametrize("tokens", [60, 34, 1])
def test_no_sample_waits_more_than_a_few_windows(tokens: int) -> None:
    window_samples = 10
    steps = list(planner_of([tokens] * 300, window_samples=window_samples, rows_per_step=1))
    waited = [step.state["window"] - sample_id // window_samples for step in steps for sample_id in step.sample_ids]
    assert min(waited) >= 0 and max(waited) <= MAX_CARRIES


def num_carried(step: PlannedStep) -> int:
    return int.from_bytes(bytes.fromhex(step.state["carry"])).bit_count()


def test_little_is_carried_where_no_row_can_be_full() -> None:
    steps = planner_of([60] * 300, window_samples=40, rows_per_step=1)
    assert max(num_carried(step) for step in steps) == 10  # a quarter of the window


def test_a_small_data_set_that_comes_round_does_not_pile_up() -> None:
    planner = planner_of([2, 3, 4], window_samples=3, rows_per_step=1, end=None)  # an epoch is a window of 9 tokens
    for step in islice(planner, 30):
        assert num_carried(step) <= 3 * MAX_CARRIES
        assert set(Counter(step.sample_ids).values()) == {MAX_CARRIES + 1}
        assert step.state["window"] == (MAX_CARRIES + 1) * step.number - 1


def test_rows_are_nearly_full_on_long_tailed_lengths() -> None:
    tokens = np.random.default_rng(0).lognormal(7.9, 1.5, 8000)  # median 2.7 thousand tokens
    steps = list(planner_of(tokens, row_length_tokens=32_768, window_samples=256, rows_per_step=8))
    fill_frac = sum(step.tokens for step in steps) / (32_768 * sum(len(step.rows) for step in steps))
    assert fill_frac > 0.997  # measured 0.9992


def test_a_state_deep_in_the_stream_looks_up_one_window_and_what_was_carried() -> None:
    looked_up = []

    def sample_ids(begin: int, end: int) -> np.ndarray:
        looked_up.append((begin, end))
        return np.arange(begin, end) % 500

    lengths = lengths_of(np.random.default_rng(0).integers(5, 60, 500))
    planner = Planner(
        sample_ids, lengths, rows_per_step=3, row_length_tokens=ROW_TOKENS, window_samples=64, packing=True, seed=0,
    )  # fmt: skip
    step = next(step for step in planner if step.state["window"] == 40 and step.state["carry"])
    looked_up.clear()
    next(iter(planner.resume(step.state)))
    assert sum(end - begin for begin, end in looked_up) <= (MAX_CARRIES + 2) * 64
    assert min(begin for begin, _ in looked_up) >= (40 - MAX_CARRIES) * 64


def test_an_end_without_a_full_step_gives_one_short_step_or_none() -> None:
    (step,) = planner_of([60, 60], rows_per_step=9)
    assert (step.number, len(step.rows), list(planner_of([60, 60]).resume(step.state))) == (1, 2, [])
    assert list(planner_of([60, 60], end=0)) == []


def test_data_of_which_nothing_fits_is_refused_and_not_searched_for_ever() -> None:
    with pytest.raises(DataError, match="none of 2 samples can be used in rows of 100 tokens"):
        next(iter(planner_of([0, 101], end=None)))


def test_overfitting_repeats_the_first_step_also_after_a_restart() -> None:
    planner = planner_of([60] * 20, end=None)
    steps = list(islice(overfit(planner), 4))
    assert [step.number for step in steps] == [1, 2, 3, 4]
    assert {step.sample_ids for step in steps} == {next(iter(planner)).sample_ids}
    again = overfit(planner.resume(json.loads(json.dumps(steps[1].state))))
    assert list(islice(again, 2)) == steps[2:]


ROW_SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def step_of(sizes: list[int], number: int = 1) -> PlannedStep:
    rows = tuple(PlannedRow((i,), size, size**2, size, size) for i, size in enumerate(sizes))
    return PlannedStep(number, rows, sum(sizes), sum(sizes), {})


@given(ROW_SIZES, st.integers(1, 70), st.integers(1, 1000))
def test_every_row_goes_to_one_consumer_and_all_have_as_many_micro_steps(sizes, num_consumers, number) -> None:
    step = step_of(sizes, number)
    micro_steps = accumulation(len(sizes), num_consumers)
    table = assign(step, num_consumers, micro_steps)
    assert [len(slice_) for slice_ in table] == [num_consumers] * micro_steps
    dealt = [row for slice_ in table for row in slice_ if row]
    assert sorted(row.sample_ids for row in dealt) == [row.sample_ids for row in step.rows]
    tokens = [sorted((row.tokens for row in slice_ if row), reverse=True) for slice_ in table]
    assert sum(tokens, []) == sorted(sizes, reverse=True)  # micro-steps hold rows of like size


def test_a_short_last_step_still_gives_all_consumers_as_many_micro_steps() -> None:
    table = assign(step_of([5]), num_consumers=4, micro_steps=3)
    assert [len(slice_) for slice_ in table] == [4, 4, 4]
    assert sum(row is not None for slice_ in table for row in slice_) == 1


def test_the_largest_row_goes_to_each_consumer_in_turn() -> None:
    takers = [assign(step_of([9, 5, 1], number), 3, 1)[0].index(step_of([9]).rows[0]) for number in range(3)]
    assert sorted(takers) == [0, 1, 2]


def test_more_rows_than_places_are_never_dropped_silently() -> None:
    with pytest.raises(AssertionError):
        assign(step_of([1] * 7), num_consumers=2, micro_steps=3)


def test_a_row_with_one_long_document_counts_more_than_one_with_as_many_tokens_of_short_ones() -> None:
    short, long, mixed = (PlannedRow((i,), 100, squares, 1, 0) for i, squares in enumerate((1_000, 10_000, 5_000)))
    step = PlannedStep(1, (short, long, mixed), 3, 300, {})
    by_work = assign(step, 1, 3, cost=lambda row: row.tokens + row.squared_tokens)
    assert [slice_[0] for slice_ in by_work] == [long, mixed, short]
    assert [slice_[0] for slice_ in assign(step, 1, 3)] == [short, long, mixed]


@settings(deadline=None, max_examples=1000)
@given(st.integers(1, 600), st.integers(1, 64), st.integers(0, 2**32), st.integers(0, 80))
def test_any_world_and_end_give_all_ranks_as_many_micro_steps_and_lose_no_row(
    num_consumers: int, rows_per_step: int, seed: int, end: int
) -> None:
    tokens = np.random.default_rng(seed).integers(1, 120, 40)
    planner = planner_of(tokens, rows_per_step=rows_per_step, end=end, window_samples=16, seed=seed)
    micro_steps = accumulation(rows_per_step, num_consumers)
    given_out: Counter[int] = Counter()
    for step in planner:
        table = assign(step, num_consumers, micro_steps, cost=lambda row: row.squared_tokens)
        assert [len(slice_) for slice_ in table] == [num_consumers] * micro_steps
        given_out.update(i for slice_ in table for row in slice_ if row for i in row.sample_ids)
    assert given_out == Counter(i % 40 for i in range(end) if tokens[i % 40] <= ROW_TOKENS)


def test_columns_may_be_files_that_are_read_where_needed(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(1, 130, 500).astype(np.int32)
    (tmp_path / "column").write_bytes(tokens.tobytes())
    column = np.memmap(tmp_path / "column", np.int32, "r")
    mapped, plain = (Lengths(c, c, c, c, {}) for c in (column, tokens))
    plans = [
        list(Planner(lambda a, b: np.arange(a, b), lengths, rows_per_step=4, row_length_tokens=100,
                     window_samples=64, packing=True, seed=0, end=500))
        for lengths in (mapped, plain)
    ]  # fmt: skip
    assert plans[0] == plans[1] and mapped.digest == plain.digest


def test_the_digest_names_all_that_decides_the_rows_and_nothing_else() -> None:
    tokens = np.random.default_rng(0).integers(5, 60, 200)

    def rows(**options: Any) -> list[PlannedRow]:
        return [row for step in planner_of(tokens, **options) for row in step.rows]

    digest = planner_of(tokens).digest
    assert planner_of(tokens, rows_per_step=5).digest == digest and rows(rows_per_step=5) == rows()
    others = [{"row_length_tokens": 99}, {"window_samples": 9}, {"packing": False}, {"seed": 1}, {"end": 150}]
    for options in others:
        assert planner_of(tokens, **options).digest != digest and rows(**options) != rows()
    assert planner_of(tokens, order_digest="another order").digest != digest
    assert planner_of(np.where(np.arange(200) == 70, 61, tokens)).digest != digest


def test_another_number_of_rows_a_step_goes_on_where_the_state_left_off() -> None:
    tokens = np.random.default_rng(0).integers(5, 60, 200)
    rows = [row for step in planner_of(tokens, rows_per_step=1) for row in step.rows]
    begun = list(islice(planner_of(tokens, rows_per_step=4), 3))
    rest = list(planner_of(tokens, rows_per_step=7).resume(json.loads(json.dumps(begun[-1].state))))
    assert [row for step in begun + rest for row in step.rows] == rows


@pytest.mark.parametrize("num_consumers", [1, 2, 3, 8, 50])
def test_steps_do_not_depend_on_the_number_of_consumers(num_consumers: int) -> None:
    planner = planner_of(np.random.default_rng(0).integers(5, 60, 200), rows_per_step=7)
    for step in planner:
        table = assign(step, num_consumers, accumulation(7, num_consumers))
        assert {row for slice_ in table for row in slice_ if row} == set(step.rows)
