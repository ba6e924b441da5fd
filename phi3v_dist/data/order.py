"""(seed, position in the run) → sample id, in O(1) per look-up.

What comes in: how many samples each shard holds, the sources' weights, a seed. What goes out: the endless stream of
sample ids, addressable at any position without a shuffle buffer or a stored permutation. Surprise: "epoch" belongs to a
source, not to the run; a source that is drawn more often simply begins its next permutation earlier.

Shards are permuted, then samples within windows of up to `SHARDS_PER_WINDOW` shards, so that neighbours on disk are
read together but not trained together. Both permutations are 4-round Feistel networks with cycle walking (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002), keyed by (seed, source, epoch).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count

import numpy as np
import xxhash

from phi3v_dist.data.shards import ShardTable

ORDER_FORMAT = 2  # counts changes to the rules below: another order from the same seed
SHARDS_PER_WINDOW = 16
WEIGHT_SCALE = 1_000_000_000  # what weights add up to as whole numbers: 2 x position x share still fits into 63 bits
ROUNDS = 4
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's step from one key to the next


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from anything that names a choice."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def permute(values: np.ndarray, size: int | np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """A keyed permutation of 0 … size-1, applied to `values` (any integers in that range).

    size, key: for all values, or an array with one for each.
    """
    sizes = np.broadcast_to(np.asarray(size, np.uint64), values.shape)
    keys = np.broadcast_to(np.asarray(key, np.uint64), values.shape)
    _, bits = np.frexp((sizes - np.uint64(1)).astype(np.float64))  # of the largest value; exact below 2⁵³
    shifts = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    result = values.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):  # the network permutes a power of 4; walk on until inside 0 … size-1
        block, shift, round_key = result[walking], shifts[walking], keys[walking]
        mask = (np.uint64(1) << shift) - np.uint64(1)
        left, right = block >> shift, block & mask
        for _ in range(ROUNDS):
            round_key = round_key + GOLDEN
            left, right = right, left ^ (_mix(right ^ _mix(round_key)) & mask)
        result[walking] = (left << shift) | right
        walking = walking[result[walking] >= sizes[walking]]
    return result.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Order:
    """The stream of sample ids of a run."""

    def __init__(self, table: ShardTable, seed: int):
        self.seed = seed
        self.sources = [_Source(table, number) for number in range(len(table.sources))]
        weights = [source.weight for source in table.sources]
        if any(weights):  # a source without a weight counts as 1, as the others' weights are relative to it
            whole = sum(weight or 1.0 for weight in weights)
            self.shares = [max(1, round((weight or 1.0) / whole * WEIGHT_SCALE)) for weight in weights]
        else:
            self.shares = [source.num_samples for source in self.sources]
        self.mixture = mixture(self.shares)
        self.num_samples = sum(source.num_samples for source in self.sources)

    @cached_property
    def digest(self) -> str:
        """Of all that decides the stream: seed, shares, the shards' sizes, and the rules here."""
        rules = [ORDER_FORMAT, SHARDS_PER_WINDOW, ROUNDS, self.seed, self.shares]
        digest = xxhash.xxh3_64(repr(rules).encode())
        for source in self.sources:
            digest.update(np.stack([source.first_id, source.sizes]).astype("<i8").data)
        return digest.hexdigest()

    def sample_ids(self, begin: int, end: int) -> np.ndarray:
        """Sample ids at positions begin … end-1 of the run."""
        positions = np.arange(begin, end)
        sources, places = mix(positions, self.mixture)
        ids = np.empty(len(positions), np.int64)
        for number, source in enumerate(self.sources):
            chosen = sources == number
            ids[chosen] = source.sample_ids(places[chosen], self.seed, number)
        return ids


@dataclass(frozen=True)
class Mixture:
    """Sources that are mixed two by two: a tree, whose leaves are numbers of sources."""

    share: int
    source: int = -1
    parts: "tuple[Mixture, Mixture] | None" = None


def mixture(shares: Sequence[int]) -> Mixture:
    """The two smallest become one, again and again (Huffman, 1952), so that errors of a split halve further down."""
    order = count()  # decides between equal shares
    heap = [(share, next(order), Mixture(share, source)) for source, share in enumerate(shares)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (small, _, one), (large, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (small + large, next(order), Mixture(small + large, parts=(one, other))))
    return heap[0][2]


def mix(positions: np.ndarray, mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
    """Position of the run → (source, position in that source).

    At every split one side takes the positions at which round(position · share) grows, and the other the rest. So a
    source's count in any prefix is off its share by at most a half with two sources, by less than 1 with three, and by
    less than 1.7 with any number: half the sum over a leaf's ancestors of its share in theirs, which is largest when
    shares are as Fibonacci's numbers. (Measured: 1.34.)
    """
    if mixture.parts is None:
        return np.full(len(positions), mixture.source), positions
    one, _ = mixture.parts
    before = _portion(positions, one.share, mixture.share)
    taken = _portion(positions + 1, one.share, mixture.share) > before
    sources, places = np.empty((2, len(positions)), np.int64)
    for part, chosen, inside in zip(mixture.parts, (taken, ~taken), (before, positions - before), strict=True):
        sources[chosen], places[chosen] = mix(inside[chosen], part)
    return sources, places


def _portion(positions: np.ndarray, share: int, whole: int) -> np.ndarray:
    """round(position · share / whole) without overflow: positions are split at `whole`."""
    turns, rest = np.divmod(positions, whole)
    return turns * share + (2 * rest * share + whole) // (2 * whole)


class _Source:
    """One source's shards and its own endless permuted stream."""

    def __init__(self, table: ShardTable, number: int):
        self.shards = np.flatnonzero(table.source_of_shard == number)
        self.first_id = table.start[self.shards]
        self.sizes = table.start[self.shards + 1] - self.first_id
        self.num_samples = int(self.sizes.sum())
        self._epoch = lru_cache(maxsize=4)(self._shuffle_shards)

    def _shuffle_shards(self, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One epoch: shards in their order, where each begins, and where each window of shards begins."""
        order = permute(np.arange(len(self.shards)), len(self.shards), key)
        begins = np.concatenate([[0], np.cumsum(self.sizes[order])])
        num_windows = -(-len(order) // SHARDS_PER_WINDOW)
        borders = np.linspace(0, len(order), num_windows + 1).astype(int)  # even, so that none is one shard unmixed
        return order, begins, begins[borders]

    def sample_ids(self, places: np.ndarray, seed: int, number: int) -> np.ndarray:
        ids = np.empty(len(places), np.int64)
        epochs, offsets = np.divmod(places, self.num_samples)
        for epoch in np.unique(epochs):
            key = derive_key(seed, number, int(epoch))
            order, begins, windows = self._epoch(key)
            here = epochs == epoch
            offset = offsets[here]
            window = np.searchsorted(windows, offset, side="right") - 1
            begin = windows[window]
            window_key = np.uint64(key) ^ _mix(window.astype(np.uint64))
            shuffled = begin + permute(offset - begin, windows[window + 1] - begin, window_key)
            place = np.searchsorted(begins, shuffled, side="right") - 1
            ids[here] = self.first_id[order[place]] + shuffled - begins[place]
        return ids
