"""(seed, position in the run) → sample id, in O(1) per look-up.

What comes in: how many samples each shard holds, the sources' weights, a seed. What goes out: the endless stream of
sample ids, addressable at any position without a shuffle buffer or a stored permutation. Surprise: "epoch" belongs to a
source, not to the run; a source that is drawn more often simply begins its next permutation earlier.

Shards are permuted, then samples within windows of up to `SHARDS_PER_WINDOW` shards, so that neighbours on disk are
read together but not trained together. Both permutations are 4-round Feistel networks with cycle walking (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002), keyed by (seed, source, epoch).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash

from phi3v_dist.data.shards import ShardTable

SHARDS_PER_WINDOW = 16
WEIGHT_SCALE = 1_000_000_000  # what weights add up to as whole numbers: position x share still fits into 63 bits
ROUNDS = 4


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from anything that names a choice."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def permute(values: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of 0 … size-1, applied to `values` (any integers in that range)."""
    if size <= 1:
        return values.copy()
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    round_keys = [np.uint64(derive_key(key, i)) for i in range(ROUNDS)]
    result = values.astype(np.uint64)
    walking = np.ones(len(result), bool)
    while walking.any():  # the network permutes a power of 4; walk on until inside 0 … size-1
        block = result[walking]
        left, right = block >> shift, block & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[walking] = (left << shift) | right
        walking = result >= np.uint64(size)
    return result.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
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
        self.num_samples = sum(source.num_samples for source in self.sources)

    def sample_ids(self, begin: int, end: int) -> np.ndarray:
        """Sample ids at positions begin … end-1 of the run."""
        positions = np.arange(begin, end)
        sources, places = mix(positions, self.shares)
        ids = np.empty(len(positions), np.int64)
        for number, source in enumerate(self.sources):
            chosen = sources == number
            ids[chosen] = source.sample_ids(places[chosen], self.seed, number)
        return ids


def mix(positions: np.ndarray, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Position of the run → (source, position in that source), with every prefix mixed by the shares.

    Source by source: it takes the positions at which floor(k · share / rest) grows, and hands the others on.
    """
    sources = np.full(len(positions), len(shares) - 1)
    places = positions.astype(np.int64).copy()
    waiting = np.ones(len(positions), bool)
    for number, share in enumerate(shares[:-1]):
        rest = sum(shares[number:])
        before = _portion(places, share, rest)
        taken = waiting & (_portion(places + 1, share, rest) > before)
        sources[taken] = number
        places = np.where(taken, before, np.where(waiting, places - before, places))
        waiting &= ~taken
    return sources, places


def _portion(positions: np.ndarray, share: int, whole: int) -> np.ndarray:
    """floor(position · share / whole) without overflow: positions are split at `whole`."""
    turns, rest = np.divmod(positions, whole)
    return turns * share + rest * share // whole


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
            shuffled = np.empty(len(offset), np.int64)
            for w in np.unique(window):
                inside = window == w
                size = int(windows[w + 1] - windows[w])
                shuffled[inside] = windows[w] + permute(offset[inside] - windows[w], size, derive_key(key, int(w)))
            place = np.searchsorted(begins, shuffled, side="right") - 1
            ids[here] = self.first_id[order[place]] + shuffled - begins[place]
        return ids
