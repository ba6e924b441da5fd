"""Samples → how long each will be, without decoding a picture.

What comes in: a `ShardTable` and the processor. What goes out: `Lengths`, four numbers per sample, from which the
planner packs rows. Surprise: lengths are no part of the index. They depend on tokenizer, templates, crops and the fit
policy, so they sit in a second small file beside the tar, named after a digest of them all.

Lengths format 3 (`x.tar.lengths-<digest>.safetensors`); the bytes are described in docs/data-formats.md. To upgrade
from 2: nothing, other names are looked for; the old files may be deleted.
"""

import bisect
import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from phi3v_dist.config import SourceSettings
from phi3v_dist.data import manifest
from phi3v_dist.data.cache import ShardCache
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.plan import Lengths
from phi3v_dist.data.processor import ExampleLength, Phi3VProcessor
from phi3v_dist.data.samples import BadSample, read_messages
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.data.sidecar import Columns, load_sidecar, save_sidecar
from phi3v_dist.errors import DataError
from phi3v_dist.progress import show_progress
from phi3v_dist.watch import heartbeat

log = logging.getLogger(__name__)

LENGTHS_FORMAT = "3"
COLUMNS = ExampleLength._fields


def measure(
    table: ShardTable,
    processor: Phi3VProcessor,
    num_threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
    cache: ShardCache | None = None,
) -> Lengths:
    """Lengths of all samples of a table, from the manifest or the sidecar files where those exist.

    The arrays are read-only, and for a large table views of a file.

    Args:
        on_progress: told (shards done, shards in all) before each shard whose tokens are counted; default: progress.py
            shows it.

    Raises:
        DataError: a shard cannot be read. (A damaged sample is only marked: all ranks see it alike.)
    """
    digests = [_digest(source, processor) for source in table.sources]
    name = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:12]
    stored = manifest.load_lengths(table.sources, name)
    if stored is not None and stored[1].get("table") == table.digest:
        columns, _ = stored
        return Lengths(**{column: columns[column] for column in COLUMNS}, bad=_bad_of(columns))
    with show_progress("shards") as report:
        tell = on_progress or partial(report, "counting tokens")
        lengths, damaged = _gather(table, processor, digests, stored, num_threads, tell, cache)
    if not damaged:
        columns = {column: getattr(lengths, column) for column in COLUMNS}
        columns["index"], columns["start"] = table.rows.digest, table.start
        columns["source"] = table.source_of_shard.astype(np.int32)
        columns["bad"] = np.frombuffer(json.dumps(lengths.bad).encode(), np.uint8)  # a header holds 100 MB at most
        manifest.save_lengths(table.sources, name, len(table.shards), columns, {"table": table.digest})
    return lengths


def _gather(
    table: ShardTable,
    processor: Phi3VProcessor,
    digests: list[str],
    stored: tuple[Columns, dict[str, str]] | None,
    num_threads: int,
    on_progress: Callable[[int, int], None],
    cache: ShardCache | None,
) -> tuple[Lengths, bool]:
    """Lengths shard by shard, and whether any sample's bytes were damaged.

    stored: of another state of the table; shards whose contents are the same are taken from it.
    """
    fetcher = Fetcher(table, cache)
    columns = {column: np.zeros(len(table), np.int32) for column in COLUMNS}
    bad: dict[int, str] = {}
    any_damaged = False
    known = _Known(stored[0]) if stored else None
    for shard, address in enumerate(table.shards):
        first, end = table.start[shard : shard + 2].tolist()
        source, contents = int(table.source_of_shard[shard]), int(table.rows.digest[shard])
        found = known.shard(source, contents) if known else None
        if found is None:
            suffix = f"lengths-{digests[source]}.safetensors"
            fits = {"format": LENGTHS_FORMAT, "index": f"{contents:016x}"}
            sidecar = load_sidecar(address, suffix, fits)
            if sidecar is not None:
                found = sidecar[0], {int(number): why for number, why in json.loads(sidecar[1]["bad"]).items()}
            else:
                heartbeat.read_on(table.shard_name(shard))
                log.debug("counting the tokens of %s", table.shard_name(shard))
                on_progress(shard, len(table.shards))
                measured, shard_bad, damaged = _measure_shard(table, shard, processor, fetcher, num_threads)
                any_damaged |= damaged
                if not damaged:  # else the shard may be mended while its index still fits
                    save_sidecar(address, suffix, measured, fits | {"bad": json.dumps(shard_bad)})
                found = measured, shard_bad
        for column in COLUMNS:
            columns[column][first:end] = found[0][column]
        bad |= {first + number: reason for number, reason in found[1].items()}
    return Lengths(**columns, bad=bad), any_damaged


class _Known:
    """Lengths of the shards of a stored manifest, found by the shard's contents."""

    def __init__(self, columns: Columns):
        self.columns, self.start = columns, columns["start"]
        self.place = {
            key: place
            for place, key in enumerate(zip(columns["source"].tolist(), columns["index"].tolist(), strict=True))
        }
        self.bad = _bad_of(columns)
        self.bad_ids = sorted(self.bad)

    def shard(self, source: int, contents: int) -> tuple[Columns, dict[int, str]] | None:
        place = self.place.get((source, contents))
        if place is None:
            return None
        first, end = self.start[place : place + 2].tolist()
        ids = self.bad_ids[bisect.bisect_left(self.bad_ids, first) : bisect.bisect_left(self.bad_ids, end)]
        return {c: self.columns[c][first:end] for c in COLUMNS}, {i - first: self.bad[i] for i in ids}


def _bad_of(columns: Columns) -> dict[int, str]:
    """Sample id → reason, as a manifest holds them."""
    return {int(sample_id): reason for sample_id, reason in json.loads(columns["bad"].tobytes()).items()}


def _measure_shard(
    table: ShardTable, shard: int, processor: Phi3VProcessor, fetcher: Fetcher, num_threads: int
) -> tuple[Columns, dict[int, str], bool]:
    """The columns, the unusable samples, and whether any of them is so because its bytes are damaged."""
    source = table.sources[int(table.source_of_shard[shard])]
    index, first = table.index(shard), int(table.start[shard])
    bad = dict(index.bad)
    damaged = False
    nothing = ExampleLength(0, 0, 0, 0)

    def count(number: int) -> ExampleLength:
        nonlocal damaged
        if number in index.bad:
            return nothing
        try:
            sizes = index.image_sizes(number)
            messages = read_messages(fetcher.fetch(first + number, text_only=True), list(sizes), source)
            length = processor.count(messages, list(sizes.values()))
            if not length.label_tokens:
                raise ValueError("no assistant turn with words, so there is nothing to learn or to compare with")
            return length
        except BadSample as error:
            if isinstance(error.__cause__, OSError):  # may be gone the next time, or on the next node
                raise
            damaged = True
            bad[number] = error.reason
        except (ValueError, DataError) as error:
            bad[number] = str(error)
        return nothing

    with ThreadPoolExecutor(num_threads) as pool, fetcher.whole(shard):
        counts = np.array(list(pool.map(count, range(len(index)))), np.int32).reshape(-1, len(COLUMNS))
    columns = {name: np.ascontiguousarray(counts[:, i]) for i, name in enumerate(COLUMNS)}
    return columns, dict(sorted(bad.items())), damaged


def _digest(source: SourceSettings, processor: Phi3VProcessor) -> str:
    what = [LENGTHS_FORMAT, processor.digest, source.prompt, source.answer, source.system]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
