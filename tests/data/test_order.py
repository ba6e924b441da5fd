"""The stream of sample ids: every sample once an epoch, mixed by weight, addressable anywhere."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.order import Order, mix, mixture, permute
from phi3v_dist.data.shards import ShardTable

SHARD_SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def table(*sizes_by_source: list[int], weights: tuple[float | None, ...] = ()) -> ShardTable:
    """A table of shards with so many samples, without files."""
    sources = tuple(
        SourceSettings(shards=["x.tar"], weight=weight) for weight in weights or (None,) * len(sizes_by_source)
    )
    sizes = [size for sizes in sizes_by_source for size in sizes]
    source_of_shard = np.repeat(np.arange(len(sources)), [len(sizes) for sizes in sizes_by_source])
    return ShardTable(sources, ("x.tar",) * len(sizes), np.cumsum([0, *sizes]), source_of_shard)


def shard_of(table: ShardTable, sample_ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(table.start, sample_ids, side="right") - 1


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.randoms())
def test_permute_is_a_permutation_whatever_the_order_it_is_asked_in(size: int, key: int, random) -> None:
    whole = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(whole), np.arange(size))
    some = np.array(random.choices(range(size), k=5))
    assert np.array_equal(permute(some, size, key), whole[some])


@settings(deadline=None, max_examples=60)
@given(st.lists(SHARD_SIZES, min_size=1, max_size=3), st.integers(0, 2**32))
def test_every_epoch_holds_every_sample_once(sizes_by_source: list[list[int]], seed: int) -> None:
    order = Order(table(*sizes_by_source), seed)
    whole = np.arange(order.num_samples)
    for epoch in (0, 1, 7):
        ids = order.sample_ids(epoch * len(whole), (epoch + 1) * len(whole))
        assert np.array_equal(np.sort(ids), whole)


@settings(deadline=None, max_examples=40)
@given(SHARD_SIZES, st.lists(st.integers(0, 400), min_size=1, max_size=6), st.integers(0, 10**12))
def test_the_stream_is_the_same_in_any_pieces(sizes: list[int], cuts: list[int], begin: int) -> None:
    sizes = [50, *sizes]
    order = Order(table(sizes, [35, 36], weights=(2, 1)), seed=3)
    borders = sorted([0, 400, *cuts])
    pieces = [order.sample_ids(begin + a, begin + b) for a, b in pairwise(borders)]
    again = Order(table(sizes, [35, 36], weights=(2, 1)), seed=3)
    assert np.array_equal(np.concatenate(pieces), again.sample_ids(begin, begin + 400))


def test_seeds_epochs_and_sources_have_orders_of_their_own() -> None:
    one = table([50] * 8)
    orders = [Order(one, seed).sample_ids(0, 800).reshape(2, 400) for seed in (0, 1)]
    two = Order(table([50] * 8, [50] * 8), 0).sample_ids(0, 800)
    streams = [*orders[0], *orders[1], two[two >= 400] - 400]
    assert np.array_equal(two[two < 400], orders[0][0])  # a source's stream does not depend on the others
    for i, stream in enumerate(streams):
        for other in streams[:i]:
            assert (stream == other).mean() < 0.03  # 1 in 400 by chance


@pytest.mark.parametrize(
    ("weights", "bound"),
    [
        ((1, 1), 0.5), ((3, 1), 0.5), ((1e6, 1), 0.5), ((1e-6, 3e-6), 0.5), ((1e12, 2e12), 0.5),
        ((0.5, None, 7), 1), ((5, 3, 2.99), 1), ((1, 2, 3, 4), 1.7), ((1,) * 9 + (500,), 1.7),
        ((1, 1, 2, 3, 5, 8, 13, 21), 1.7),
    ],
)  # fmt: skip
def test_every_prefix_is_mixed_by_the_weights_to_about_one_sample(weights: tuple[float, ...], bound: float) -> None:
    order = Order(table(*([20, 30] for _ in weights), weights=weights), seed=0)
    shares = np.array([weight or 1 for weight in weights]) / sum(weight or 1 for weight in weights)
    for begin in (0, 10**11):  # the second: a far position, where a product of whole numbers might overflow
        source = order.sample_ids(begin, begin + 3000) // 50
        counts = (source[:, None] == np.arange(len(weights))).cumsum(axis=0)
        wanted = np.arange(1, 3001)[:, None] * shares
        # Twice: a piece that begins anywhere has two ends; and shares are whole billionths, 100 samples at 10¹¹.
        assert np.abs(counts - wanted).max() <= (bound + 1e-3 if begin == 0 else 2 * bound + 1e-3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=20))
def test_no_prefix_of_any_mixture_is_off_by_two_samples(shares: list[int]) -> None:
    sources, places = mix(np.arange(2000), mixture(shares))
    counts = (sources[:, None] == np.arange(len(shares))).cumsum(axis=0)
    wanted = np.arange(1, 2001)[:, None] * (np.array(shares) / sum(shares))
    assert np.abs(counts - wanted).max() < (0.501 if len(shares) <= 2 else 1 if len(shares) == 3 else 1.7)
    for number in range(len(shares)):
        assert np.array_equal(places[sources == number], np.arange((sources == number).sum()))


def test_a_source_that_is_drawn_more_often_shows_each_sample_once_before_any_again() -> None:
    order = Order(table([40], [1000], weights=(3, 1)), seed=5)
    ids = order.sample_ids(0, 400)
    small = ids[ids < 40]
    assert len(small) == 300
    for begin in range(0, 280, 40):
        assert len(set(small[begin : begin + 40].tolist())) == 40


@pytest.mark.parametrize("num_shards", [17, 33, 64, 200])
def test_samples_of_one_shard_are_not_trained_together(num_shards: int) -> None:
    shards = table([50] * num_shards)
    stream = shard_of(shards, Order(shards, seed=1).sample_ids(0, len(shards)))
    same = stream[1:] == stream[:-1]
    assert same.mean() < 0.15  # in windows of 16 shards 0.06 by chance, of 8 (the fewest, with 17 shards) 0.12
    assert np.convolve(same, np.ones(12), "valid").max() < 10  # nowhere a run of one shard
    assert abs(np.corrcoef(stream, np.arange(len(stream)))[0, 1]) < 0.5


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(SHARD_SIZES, st.floats(0.01, 100)), min_size=2, max_size=4), st.integers(0, 2**32))
def test_every_source_has_exact_epochs_of_its_own_whatever_its_weight(sources: list, seed: int) -> None:
    whole = table(*(sizes for sizes, _ in sources), weights=tuple(weight for _, weight in sources))
    order = Order(whole, seed)
    ids = order.sample_ids(0, 3 * order.num_samples)
    begin = 0
    for sizes, _ in sources:
        size = sum(sizes)
        own = ids[(ids >= begin) & (ids < begin + size)] - begin
        for epoch in range(-(-len(own) // size)):
            seen = own[epoch * size : (epoch + 1) * size]
            assert len(set(seen.tolist())) == len(seen)
        begin += size


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2**64 - 1)), min_size=1, max_size=8))
def test_many_permutations_at_once_are_those_one_by_one(permutations: list[tuple[int, int]]) -> None:
    values, sizes, keys = (
        np.concatenate(column)
        for column in zip(
            *((np.arange(n), np.full(n, n), np.full(n, key, np.uint64)) for n, key in permutations), strict=True
        )
    )
    alone = [permute(np.arange(size), size, key) for size, key in permutations]
    assert np.array_equal(permute(values, sizes, keys), np.concatenate(alone))


def test_the_digest_changes_with_seed_weights_and_shards() -> None:
    digests = [
        Order(table([3, 4], [5], weights=weights), seed).digest
        for seed, weights in ((0, (1, 2)), (1, (1, 2)), (0, (2, 1)), (0, ()))
    ]
    digests += [
        Order(table([4, 3], [5], weights=(1, 2)), 0).digest,
        Order(table([3], [4, 5], weights=(1, 2)), 0).digest,
    ]
    assert len(set(digests)) == len(digests)
    assert Order(table([3, 4], [5], weights=(2, 4)), 0).digest == digests[0]  # the same shares


@pytest.mark.parametrize("shard_samples", [1, 3, 1000])
def test_100_000_shards_are_ordered_anywhere_in_the_run(shard_samples: int) -> None:
    large = table([shard_samples] * 100_000)
    order = Order(large, seed=0)
    for begin in (0, len(large) // 2, 2 * len(large) + len(large) // 2):
        assert len(set(order.sample_ids(begin, begin + 1024).tolist())) == 1024
