"""Samples → how long each will be, without decoding a picture.

What comes in: a `ShardTable` and the processor. What goes out: `Lengths`, three numbers per sample, from which the
planner packs rows. Surprise: lengths are no part of the index. They depend on tokenizer, templates and crops, so they
sit in a second small file beside the tar, named after a digest of all three.

Lengths format 1 (`x.tar.lengths-<digest>.safetensors`). Columns: `tokens`, `label_tokens`, `crops`, int32, one entry
per sample of the shard; tokens is 0 for a sample that cannot be used, and the metadata's `bad` says why (number →
reason). To upgrade: delete the files.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.plan import Lengths
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import BadSample, read_messages
from phi3v_dist.data.shards import ShardTable, load_sidecar, save_sidecar, sidecar
from phi3v_dist.errors import DataError

LENGTHS_FORMAT = "1"


def measure(
    table: ShardTable, processor: Phi3VProcessor, num_threads: int = 2, on_shard: Callable[[Path], None] | None = None
) -> Lengths:
    """Lengths of all samples of a table, from their sidecar files where those exist."""
    fetcher = Fetcher(table)
    columns: list[dict[str, np.ndarray]] = []
    bad: dict[int, str] = {}
    for shard, tar in enumerate(table.shards):
        digest = _digest(table, shard, processor)
        path = sidecar(tar, f"lengths-{digest}.safetensors")
        first, end = int(table.start[shard]), int(table.start[shard + 1])
        stored = load_sidecar(path) if path.exists() else None
        if stored is None or stored[1]["tar_size_bytes"] != str(table.index(shard).tar_size_bytes):
            if on_shard:
                on_shard(tar)
            stored = _measure_shard(table, shard, processor, fetcher, num_threads)
            save_sidecar(path, *stored)
        if len(stored[0]["tokens"]) != end - first:
            raise DataError(f"{path}: holds {len(stored[0]['tokens'])} samples, its shard {end - first}; delete it")
        columns.append(stored[0])
        bad |= {first + int(number): reason for number, reason in json.loads(stored[1]["bad"]).items()}
    tokens, label_tokens, crops = (
        np.concatenate([c[name] for c in columns]) for name in ("tokens", "label_tokens", "crops")
    )
    return Lengths(tokens, label_tokens, crops, bad)


def _measure_shard(
    table: ShardTable, shard: int, processor: Phi3VProcessor, fetcher: Fetcher, num_threads: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    source = table.sources[int(table.source_of_shard[shard])]
    index, first = table.index(shard), int(table.start[shard])
    bad: dict[int, str] = {}

    def count(number: int) -> tuple[int, int, int]:
        try:
            sizes = index.image_sizes(number)
            messages = read_messages(fetcher.fetch(first + number), list(sizes), source)
            length = processor.count(messages, list(sizes.values()))
            if not length.label_tokens:
                raise ValueError("no assistant turn with words, so there is nothing to learn or to compare with")
            return length
        except BadSample as error:
            bad[number] = error.reason
        except (ValueError, DataError) as error:
            bad[number] = str(error)
        return 0, 0, 0

    with ThreadPoolExecutor(num_threads) as pool:
        counts = np.array(list(pool.map(count, range(len(index)))), np.int32)
    columns = {name: np.ascontiguousarray(counts[:, i]) for i, name in enumerate(("tokens", "label_tokens", "crops"))}
    metadata = {"format": LENGTHS_FORMAT, "tar_size_bytes": str(index.tar_size_bytes), "bad": json.dumps(bad)}
    return columns, metadata


def _digest(table: ShardTable, shard: int, processor: Phi3VProcessor) -> str:
    source = table.sources[int(table.source_of_shard[shard])]
    what = [LENGTHS_FORMAT, processor.digest, source.prompt, source.answer, source.system]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
