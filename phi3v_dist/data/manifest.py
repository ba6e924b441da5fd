"""All shards of a table → one file that says what their indexes say, so that 100,000 shards open in a second.

What comes in: the sources' patterns. What goes out: `Rows`, a few numbers per shard, and columns of lengths that stay
on the disk. Surprise: it is only a cache of the sidecars. Every open compares each shard's size and time, and looks
whether its index is there; what differs is read again, the rest is not. (Rank 0 does so. Other ranks take the manifest
whose digest it tells them, and touch no shard.)

Manifest format 1; the bytes are described in docs/data-formats.md. To upgrade: nothing to do, it is made anew.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import xxhash

from phi3v_dist.config import SourceSettings
from phi3v_dist.data import store
from phi3v_dist.data.index import ShardIndex
from phi3v_dist.data.sidecar import Columns, map_sidecar, save_sidecar

MANIFEST_FORMAT = "1"
MIN_SHARDS = 256  # fewer are opened one by one as fast, and leave the folder as it is


@dataclass(frozen=True)
class Rows:
    """What a table keeps of each shard in memory; every field is [shards].

    modified_ns: of a local tar; 0 for a remote one.
    digest: of the index's contents.
    num_damaged: places of the tar that could not be read.
    """

    tar_size_bytes: np.ndarray
    modified_ns: np.ndarray
    digest: np.ndarray
    num_samples: np.ndarray
    num_bad: np.ndarray
    num_notes: np.ndarray
    num_damaged: np.ndarray

    @classmethod
    def empty(cls, num_shards: int) -> "Rows":
        return cls(*(np.zeros(num_shards, _dtype(field.name)) for field in fields(cls)))

    def fill(self, shard: int, index: ShardIndex) -> None:
        """Note what an index says."""
        self.digest[shard] = int(index.digest, 16)
        self.num_samples[shard], self.num_bad[shard] = len(index), len(index.bad)
        self.num_notes[shard], self.num_damaged[shard] = len(index.notes), len(index.damage)

    def copy_from(self, other: "Rows", here: np.ndarray, there: np.ndarray) -> None:
        """Take rows `there` of another table's for rows `here`."""
        for field in fields(self):
            getattr(self, field.name)[here] = getattr(other, field.name)[there]


def load_rows(
    sources: Sequence[SourceSettings], digest: str | None = None
) -> tuple[list[str], np.ndarray, Rows] | None:
    """(shards, source of each, rows) as last stored; None when they are not. digest: take only the table with this."""
    stored = map_sidecar(*_place(sources, ""))
    if stored is None or stored[1].get("format") != MANIFEST_FORMAT or digest not in (None, stored[1].get("digest")):
        return None
    columns = stored[0]
    try:
        shards = columns["names"].tobytes().decode(errors="surrogateescape").split("\n")
        rows = Rows(*(columns[field.name].copy() for field in fields(Rows)))
        source_of_shard = columns["source_of_shard"].astype(np.int64)
    except KeyError:
        return None
    if {len(shards)} != {len(source_of_shard), *(len(getattr(rows, field.name)) for field in fields(Rows))}:
        return None
    return shards, source_of_shard, rows


def save_rows(
    sources: Sequence[SourceSettings], shards: Sequence[str], source_of_shard: np.ndarray, rows: Rows, digest: str
) -> None:
    """Store what `load_rows` gives. Small tables are not stored. Raises DataError."""
    if len(shards) < MIN_SHARDS or any("\n" in name for name in shards):
        return
    columns = {field.name: getattr(rows, field.name) for field in fields(rows)}
    columns["source_of_shard"] = source_of_shard.astype(np.int32)
    columns["names"] = np.frombuffer("\n".join(shards).encode(errors="surrogateescape"), np.uint8)
    save_sidecar(*_place(sources, ""), columns, {"format": MANIFEST_FORMAT, "digest": digest})


def load_lengths(sources: Sequence[SourceSettings], name: str) -> tuple[Columns, dict[str, str]] | None:
    """The stored columns of lengths, as views of the file; `name` tells tokenizers and templates apart."""
    stored = map_sidecar(*_place(sources, f"-lengths-{name}"))
    return stored if stored and stored[1].get("format") == MANIFEST_FORMAT else None


def save_lengths(
    sources: Sequence[SourceSettings], name: str, num_shards: int, columns: Columns, metadata: dict[str, str]
) -> None:
    """Store what `load_lengths` gives. Small tables are not stored. Raises DataError."""
    if num_shards >= MIN_SHARDS:
        save_sidecar(*_place(sources, f"-lengths-{name}"), columns, {"format": MANIFEST_FORMAT} | metadata)


def _place(sources: Sequence[SourceSettings], ending: str) -> tuple[str, str]:
    """(address, suffix) of a manifest as if it were a sidecar, in the folder of the first pattern."""
    whole = [[p if store.is_remote(p) else os.path.abspath(p) for p in source.shards] for source in sources]
    folder = os.path.dirname(sources[0].shards[0])
    while re.search(r"[*?\[{]", folder):
        folder = os.path.dirname(folder)
    name = xxhash.xxh3_64_hexdigest(json.dumps(whole).encode())
    return os.path.join(folder, "manifest"), f"{name[:12]}{ending}.safetensors"


def _dtype(name: str) -> type:
    return {"digest": np.uint64, "tar_size_bytes": np.int64, "modified_ns": np.int64}.get(name, np.int32)
