"""What is known of all records → which shard of which split each one goes to.

What comes in: the survey's columns. What goes out: one number per record. Surprise: without a split key, samples that
share a picture, directly or through others, are one group and go to one split; whatever the order of the records, a
group's split is drawn from a keyed hash of its smallest picture hash.

Shards of a split: enough that none is larger than `shard_size_bytes`, for `train` at least 4 per rank and a multiple of
the ranks, for other splits at least one per rank, but none of fewer than 8 samples. All shards of a split are about
equally large. Our own loader reads any number of shards at any world size; readers that hand out whole shards do not.
"""

from dataclasses import dataclass

import numpy as np
import xxhash

from phi3v_dist.data.importers.settings import ImportSettings
from phi3v_dist.data.importers.survey import Survey
from phi3v_dist.data.tar import BLOCK

SPLITS = ("train", "validation", "test")
SHARDS_PER_RANK = 4
MIN_SAMPLES_PER_SHARD = 8


@dataclass(frozen=True)
class Assignment:
    """Where every record goes.

    shard: [records] number in `names`; -1: to none, since it is bad or a duplicate.
    names: of the shards, split by split.
    same_as: [records] for a duplicate the record that was kept, else -1.
    """

    shard: np.ndarray
    names: tuple[str, ...]
    same_as: np.ndarray

    def split_of(self, shard: int) -> str:
        return self.names[shard].rsplit("-", 1)[0]


def assign(survey: Survey, settings: ImportSettings) -> Assignment:
    """The same for the same survey and settings, on any machine."""
    is_good = survey.column("is_good").astype(bool)
    same_as = _duplicates(survey.column("content_hash"), is_good) if settings.dedupe else np.full(len(is_good), -1)
    is_kept = is_good & (same_as < 0)
    shard = np.full(len(is_good), -1, np.int32)
    names: list[str] = []
    split = _splits(survey, settings)
    sizes = survey.column("size_bytes") + BLOCK * 2 * (1 + survey.column("num_pictures").astype(np.int64))
    for number, name in enumerate(SPLITS):
        members = np.flatnonzero(is_kept & (split == number))
        if len(members):
            cut = _cut(sizes[members], settings, name)
            shard[members] = len(names) + cut
            names += [f"{name}-{i:06d}.tar" for i in range(int(cut[-1]) + 1)]
    return Assignment(shard, tuple(names), same_as)


def leaks(survey: Survey, assignment: Assignment) -> int:
    """Pictures that are in more than one split: none, unless a split key put them there."""
    of_shard = [SPLITS.index(assignment.split_of(number)) for number in range(len(assignment.names))]
    split = np.array([*of_shard, -1], np.int8)[assignment.shard]
    of_picture = np.repeat(split, survey.column("num_pictures"))
    pairs = np.unique(
        np.stack([survey.column("picture_hash"), of_picture.astype(np.uint64)])[:, of_picture >= 0], axis=1
    )
    return int((np.unique(pairs[0], return_counts=True)[1] > 1).sum())


def _duplicates(content_hash: np.ndarray, is_good: np.ndarray) -> np.ndarray:
    """[records] the first record of the same content, or -1 for that first one and for bad records."""
    records = np.flatnonzero(is_good)
    order = records[np.argsort(content_hash[records], kind="stable")]
    is_first = np.ones(len(order), bool)
    is_first[1:] = content_hash[order[1:]] != content_hash[order[:-1]]
    same_as = np.full(len(is_good), -1, np.int64)
    first = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    same_as[order[~is_first]] = first[~is_first]
    return same_as


def _splits(survey: Survey, settings: ImportSettings) -> np.ndarray:
    """[records] number in SPLITS of each record's split."""
    keys = survey.column("split_hash") if settings.split_key else _groups(survey)
    unique, of_record = np.unique(keys, return_inverse=True)
    share = np.array([xxhash.xxh3_64_intdigest(key.tobytes(), settings.seed) / 2**64 for key in unique])
    split = np.where(share < settings.validation_frac, 1, 0)
    split[(share >= settings.validation_frac) & (share < settings.validation_frac + settings.test_frac)] = 2
    return split[of_record]


def _groups(survey: Survey) -> np.ndarray:
    """[records] the smallest hash among the pictures that a record is connected with; of a text, its own hash."""
    key = survey.column("content_hash")
    num_pictures = survey.column("num_pictures")
    unique, picture = np.unique(survey.column("picture_hash"), return_inverse=True)
    record = np.repeat(np.arange(len(key)), num_pictures)
    of_picture = unique
    while True:  # as often as the longest chain of samples that share pictures has links
        of_record = np.full(len(key), np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(of_record, record, of_picture[picture])
        smaller = of_picture.copy()
        np.minimum.at(smaller, picture, of_record[record])
        if np.array_equal(smaller, of_picture):
            return np.where(num_pictures > 0, of_record, key)
        of_picture = smaller


def _cut(sizes: np.ndarray, settings: ImportSettings, split: str) -> np.ndarray:
    """Sizes in bytes of a split's samples, in order → [samples] the shard of each, counted from 0."""
    ends = np.cumsum(sizes)
    ranks = settings.num_ranks
    wanted = -(-int(ends[-1]) // settings.shard_size_bytes)
    if ranks > 1 and split == "train":
        wanted = -(-max(wanted, SHARDS_PER_RANK * ranks) // ranks) * ranks
    elif ranks > 1:
        wanted = max(wanted, ranks)
    wanted = max(1, min(wanted, len(sizes) // MIN_SAMPLES_PER_SHARD))
    middle = ends - sizes / 2
    return np.unique((middle * wanted / ends[-1]).astype(np.int64), return_inverse=True)[1]
