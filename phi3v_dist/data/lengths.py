"""Samples → how long each will be, without decoding a picture.

What comes in: a `ShardTable` and the processor. What goes out: `Lengths`, four numbers per sample, from which the
planner packs rows. Surprise: lengths are no part of the index. They depend on tokenizer, templates, crops and the fit
policy, so they sit in a second small file beside the tar, named after a digest of them all.

Lengths format 3 (`x.tar.lengths-<digest>.safetensors`). Columns: `tokens`, `label_tokens`, `crops`, `full_tokens` (the
length before the fit policy cut anything), int32, one entry per sample of the shard; tokens is 0 for a sample that
cannot be used, and the metadata's `bad` says why (number → reason). `index` is the digest of the index it was made
with. To upgrade from 2: nothing, other names are looked for; the old files may be deleted.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.plan import Lengths
from phi3v_dist.data.processor import ExampleLength, Phi3VProcessor
from phi3v_dist.data.samples import BadSample, read_messages
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.data.sidecar import Columns, load_sidecar, save_sidecar
from phi3v_dist.errors import DataError

LENGTHS_FORMAT = "3"
COLUMNS = ExampleLength._fields


def measure(
    table: ShardTable, processor: Phi3VProcessor, num_threads: int = 2, on_shard: Callable[[Path], None] | None = None
) -> Lengths:
    """Lengths of all samples of a table, from their sidecar files where those exist.

    Raises:
        DataError: a shard cannot be read. (A damaged sample is only marked: all ranks see it alike.)
    """
    fetcher = Fetcher(table)
    columns: list[Columns] = []
    bad: dict[int, str] = {}
    for shard, tar in enumerate(table.shards):
        suffix = f"lengths-{_digest(table, shard, processor)}.safetensors"
        fits = {"format": LENGTHS_FORMAT, "index": table.index(shard).digest}
        stored = load_sidecar(tar, suffix, fits)
        if stored is None:
            if on_shard:
                on_shard(tar)
            measured, shard_bad, damaged = _measure_shard(table, shard, processor, fetcher, num_threads)
            stored = measured, fits | {"bad": json.dumps(shard_bad)}
            if not damaged:  # else the shard may be mended while its index still fits
                save_sidecar(tar, suffix, *stored)
        columns.append(stored[0])
        first = int(table.start[shard])
        bad |= {first + int(number): reason for number, reason in json.loads(stored[1]["bad"]).items()}
    return Lengths(**{name: np.concatenate([c[name] for c in columns]) for name in COLUMNS}, bad=bad)


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

    with ThreadPoolExecutor(num_threads) as pool:
        counts = np.array(list(pool.map(count, range(len(index)))), np.int32)
    columns = {name: np.ascontiguousarray(counts[:, i]) for i, name in enumerate(COLUMNS)}
    return columns, dict(sorted(bad.items())), damaged


def _digest(table: ShardTable, shard: int, processor: Phi3VProcessor) -> str:
    source = table.sources[int(table.source_of_shard[shard])]
    what = [LENGTHS_FORMAT, processor.digest, source.prompt, source.answer, source.system]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
