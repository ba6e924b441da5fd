"""Shards → what is in them: samples, pictures, tokens, and how they would fill rows.

What comes in: a `ShardTable`, and a model's processor where tokens of text are wanted too. What goes out: `Stats`, as a
table for people or as JSON. Surprise: no picture is read. The index has every picture's size, from which its tokens
follow at any number of crops; texts are read once, and their lengths kept beside the tar for the training to come.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from phi3v_dist.data.crops import num_image_tokens
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import DataError
from phi3v_dist.printable import printable
from phi3v_dist.progress import track

NUM_CROPS = (4, 16)  # what Phi-3.5-vision and Phi-3-vision allow a picture
ROW_LENGTHS = (4096, 8192, 32768, 131072)
MEGAPIXELS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16)  # upper edges of the histogram's classes; the last one is open
BAR_CHARS = 40


@dataclass(frozen=True)
class SourceStats:
    """unusable: by the index, or (with a model) because no conversation is in it. tokens: crops → tokens of all usable
    samples. shard_bytes: smallest, median, largest."""

    name: str
    shards: int
    samples: int
    unusable: int
    pictures: int
    text_only: int
    multi_image: int
    tokens: dict[int, int]
    size_bytes: int
    shard_bytes: tuple[int, int, int]


@dataclass(frozen=True)
class TokenStats:
    """Tokens per usable sample when a picture may have `num_crops` local crops.

    fits: row length → samples that fit in. longest: (sample name, tokens).
    """

    num_crops: int
    total: int
    image_total: int
    mean: float
    median: float
    p99: float
    longest: list[tuple[str, int]]
    fits: dict[int, int]


@dataclass(frozen=True)
class Stats:
    """with_text: whether `tokens` count text, for which a model's tokenizer is needed.

    picture_sizes: (class in megapixels, pictures). bad: a few of the unusable samples, with the reason.
    """

    sources: list[SourceStats]
    picture_sizes: list[tuple[str, int]]
    with_text: bool
    usable: int
    tokens: list[TokenStats]
    bad: list[tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def tables(self) -> Iterator[Table | Text]:
        """What `stats` prints."""
        yield self._shard_table()
        yield self._sample_table()
        yield self._size_table()
        yield self._token_table()
        for tokens in self.tokens[-1:]:
            yield Text(f"longest, at {tokens.num_crops} crops:")
            yield from (Text(f"  {count:>9,}  {name}") for name, count in tokens.longest)
        if self.bad:
            yield Text(f"unusable, the first {len(self.bad)} (`lint` names all):")
            yield from (Text(f"  {name}: {reason}") for name, reason in self.bad)

    def _shard_table(self) -> Table:
        table = _table("shards", ("source", "shards", "GB", "smallest MB", "median MB", "largest MB"))
        for source in self.sources:
            sizes = (f"{size / 1e6:,.1f}" for size in source.shard_bytes)
            table.add_row(Text(source.name), f"{source.shards:,}", f"{source.size_bytes / 1e9:,.2f}", *sizes)
        return table

    def _sample_table(self) -> Table:
        kind = "tokens" if self.with_text else "image tokens"
        columns = [f"{num_crops} crops" for num_crops in NUM_CROPS]
        names = ("source", "samples", "unusable", "pictures", "none", "multi", *columns)
        table = _table(f"samples, those with no and with several pictures, {kind} by crops allowed", names)
        for source in self.sources:
            counts = (source.samples, source.unusable, source.pictures, source.text_only, source.multi_image)
            table.add_row(Text(source.name), *(f"{count:,}" for count in (*counts, *source.tokens.values())))
        return table

    def _size_table(self) -> Table:
        table = _table("pictures by size", ("megapixels", "pictures", ""))
        table.columns[-1].justify = "left"
        largest = max((count for _, count in self.picture_sizes), default=0)
        for name, count in self.picture_sizes:
            table.add_row(name, f"{count:,}", "█" * round(BAR_CHARS * count / max(1, largest)))
        return table

    def _token_table(self) -> Table:
        what = "tokens a sample" if self.with_text else "image tokens a sample (for text, name a model folder)"
        table = _table(what, ("", *(f"{tokens.num_crops} crops" for tokens in self.tokens)))
        for name in ("mean", "median", "p99", "total"):
            table.add_row(name, *(f"{getattr(tokens, name):,.0f}" for tokens in self.tokens))
        table.add_row("of pictures", *(f"{100 * t.image_total / max(1, t.total):.0f} %" for t in self.tokens))
        for row in ROW_LENGTHS:
            shares = (f"{100 * tokens.fits[row] / max(1, self.usable):.1f} %" for tokens in self.tokens)
            table.add_row(f"fit into {row // 1024}k", *shares)
        return table


def collect(
    table: ShardTable,
    processor: Phi3VProcessor | None,
    num_threads: int = 2,
    num_named: int = 5,
) -> Stats:
    """Count everything.

    Args:
        processor: with NUM_CROPS[0] crops; None: image tokens only.
        num_named: how many of the longest and of the unusable samples are named.
    """
    images = {num_crops: np.zeros(len(table), np.int64) for num_crops in NUM_CROPS}
    num_pictures, usable = np.zeros(len(table), np.int32), np.ones(len(table), bool)
    classes = np.zeros(len(MEGAPIXELS) + 1, np.int64)
    bad: dict[int, str] = {}
    for shard in track(range(len(table.shards)), "reading indexes", "shards"):
        index, first = table.index(shard), int(table.start[shard])
        bad |= {first + number: reason for number, reason in index.bad.items()}
        width, height = index.columns["width"], index.columns["height"]
        sample_of_member = np.repeat(np.arange(len(index)), np.diff(index.columns["member_start"]))
        is_picture = width > 0
        here = slice(first, first + len(index))
        num_pictures[here] = np.bincount(sample_of_member[is_picture], minlength=len(index))
        pixels = width[is_picture].astype(np.int64) * height[is_picture]
        classes += np.bincount(np.searchsorted(MEGAPIXELS, pixels / 1e6, side="right"), minlength=len(classes))
        sizes = list(zip(width[is_picture].tolist(), height[is_picture].tolist(), strict=True))
        for num_crops, totals in images.items():
            tokens = np.array([_image_tokens(*size_wh, num_crops) for size_wh in sizes], np.int64)
            np.add.at(totals[here], sample_of_member[is_picture], tokens)
    text = np.zeros(len(table), np.int64)
    if processor is not None:
        lengths = measure(table, processor, num_threads)
        bad |= lengths.bad
        text = lengths.full_tokens - images[processor.num_crops]
    usable[list(bad)] = False
    return Stats(
        sources=[_source(number, table, usable, num_pictures, images, text) for number in range(len(table.sources))],
        picture_sizes=list(zip(_class_names(), classes.tolist(), strict=True)),
        with_text=processor is not None,
        usable=int(usable.sum()),
        tokens=[_tokens(num_crops, totals, text, usable, table, num_named) for num_crops, totals in images.items()],
        bad=[(table.sample_name(i), printable(bad[i])) for i in sorted(bad)[:num_named]],
    )


@lru_cache(maxsize=1 << 16)  # pictures of one data set have few sizes
def _image_tokens(width: int, height: int, num_crops: int) -> int:
    try:
        return num_image_tokens(width, height, num_crops)
    except DataError:  # too long and thin; with a model the sample counts as unusable
        return 0


def _tokens(
    num_crops: int, images: np.ndarray, text: np.ndarray, usable: np.ndarray, table: ShardTable, num_named: int
) -> TokenStats:
    tokens = (images + text)[usable]
    sample_ids = np.flatnonzero(usable)
    longest = sample_ids[np.argsort(-tokens, kind="stable")[:num_named]].tolist()
    some = tokens if len(tokens) else np.zeros(1)
    return TokenStats(
        num_crops=num_crops, total=int(tokens.sum()), image_total=int(images[usable].sum()),
        mean=float(some.mean()), median=float(np.median(some)), p99=float(np.percentile(some, 99)),
        longest=[(table.sample_name(i), int(images[i] + text[i])) for i in longest],
        fits={row: int((tokens <= row).sum()) for row in ROW_LENGTHS},
    )  # fmt: skip


def _source(
    number: int, table: ShardTable, usable: np.ndarray, num_pictures: np.ndarray, images: dict[int, np.ndarray],
    text: np.ndarray,
) -> SourceStats:  # fmt: skip
    shards = np.flatnonzero(table.source_of_shard == number).tolist()
    sizes = table.rows.tar_size_bytes[shards]
    mine = np.concatenate([np.arange(table.start[shard], table.start[shard + 1]) for shard in shards])
    pictures, used = num_pictures[mine], mine[usable[mine]]
    tokens = {num_crops: int((totals + text)[used].sum()) for num_crops, totals in images.items()}
    return SourceStats(
        name=printable(table.source_name(shards[0])), shards=len(shards), samples=len(mine),
        unusable=int((~usable[mine]).sum()), pictures=int(pictures.sum()), text_only=int((pictures == 0).sum()),
        multi_image=int((pictures > 1).sum()), tokens=tokens, size_bytes=int(sizes.sum()),
        shard_bytes=(int(sizes.min()), int(np.median(sizes)), int(sizes.max())),
    )  # fmt: skip


def _class_names() -> list[str]:
    edges = [f"{edge:g}" for edge in MEGAPIXELS]
    return [f"under {edges[0]}", *(f"{low} – {high}" for low, high in zip(edges, edges[1:], strict=False)),
            f"{edges[-1]} and more"]  # fmt: skip


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for number, column in enumerate(columns):
        kind: dict[str, Any] = {"justify": "right", "no_wrap": True} if number else {"min_width": 10}
        table.add_column(column, overflow="fold", **kind)
    return table
