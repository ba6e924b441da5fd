"""Tar shards and their indexes → where every sample's bytes are.

What comes in: the `data.train` or `data.validation` sources. What goes out: a `ShardTable`, in which a sample is one
integer (`sample_id`, its place in the list of all shards) and its members are byte ranges of a tar. Surprise: tar stays
the only data format. The index (`x.tar.index.safetensors`, columns of numbers, mapped into memory) is made in one pass
when it is missing and can be deleted at any time; it depends on the tar alone, not on a tokenizer or a setting.

Index format 1. Columns: `key_start`, `key_bytes` (UTF-8 keys, joined), `member_start` (first member of each sample,
plus the end), `member_offset`, `member_size` (bytes in the tar), `member_name` (number in the metadata's `names`),
`image_width`, `image_height` (upright, in pixels; 0 for other members), `checksum` (xxh3-64 of each sample's
members).
Metadata: `format`, `tar_size_bytes`, `names`, `bad` (sample number → reason). To upgrade: delete the index files.
"""

import bisect
import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import xxhash
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from phi3v_dist.config import SourceSettings
from phi3v_dist.errors import DataError

INDEX_FORMAT = "1"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ShardIndex:
    """The columns of one shard; see the module for their meaning."""

    tar_size_bytes: int
    names: tuple[str, ...]
    bad: dict[int, str]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["checksum"])

    def key(self, number: int) -> str:
        start, end = self.columns["key_start"][number : number + 2]
        return self.columns["key_bytes"][start:end].tobytes().decode()

    def members(self, number: int) -> list[tuple[str, int, int]]:
        """(name, offset, size) of each member of sample `number`."""
        first, end = self.columns["member_start"][number : number + 2]
        names, offsets, sizes = (
            self.columns[c][first:end].tolist() for c in ("member_name", "member_offset", "member_size")
        )
        return [(self.names[n], o, s) for n, o, s in zip(names, offsets, sizes, strict=True)]

    def image_sizes(self, number: int) -> dict[str, tuple[int, int]]:
        """Name → (width, height) of the sample's pictures, in the tar's order."""
        first, end = self.columns["member_start"][number : number + 2]
        names, widths, heights = (
            self.columns[c][first:end].tolist() for c in ("member_name", "image_width", "image_height")
        )
        return {self.names[n]: (w, h) for n, w, h in zip(names, widths, heights, strict=True) if w}


def index_path(tar: Path) -> Path:
    """Where the index of a shard lives: beside it, or in the user's cache when that folder cannot be written."""
    return sidecar(tar, "index.safetensors")


def sidecar(tar: Path, suffix: str) -> Path:
    """`x.tar` → `x.tar.<suffix>`, in the cache folder when the tar's own is read-only and has no such file."""
    beside = tar.with_name(f"{tar.name}.{suffix}")
    if beside.exists() or os.access(tar.parent, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "phi3v_dist"
    return cache / f"{xxhash.xxh3_64_hexdigest(str(tar.resolve()).encode())}-{tar.name}.{suffix}"


def save_sidecar(path: Path, columns: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write columns so that a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(columns, partial, metadata=metadata)
    partial.rename(path)


def load_sidecar(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Columns and metadata of a sidecar file."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def load_index(tar: Path) -> ShardIndex | None:
    """The stored index of a shard; None when there is none or it belongs to other bytes."""
    path = index_path(tar)
    if not path.exists():
        return None
    columns, metadata = load_sidecar(path)
    if metadata.get("format") != INDEX_FORMAT or int(metadata["tar_size_bytes"]) != tar.stat().st_size:
        return None
    bad = {int(number): reason for number, reason in json.loads(metadata["bad"]).items()}
    return ShardIndex(int(metadata["tar_size_bytes"]), tuple(json.loads(metadata["names"])), bad, columns)


def build_index(tar: Path) -> ShardIndex:
    """Read a tar once, from front to back, and write its index beside it.

    Raises:
        DataError: the file is not a plain tar, or is cut off before its first whole sample.
    """
    samples: list[tuple[str, list[tuple[str, int, int, int, int]], int]] = []
    bad: dict[int, str] = {}
    for key, members in _read_samples(tar):
        rows: list[tuple[str, int, int, int, int]] = []
        digest, reason = xxhash.xxh3_64(), ""
        for name, offset, data in members:
            digest.update(data)
            width, height = 0, 0
            if name.rsplit(".", 1)[-1] in IMAGE_SUFFIXES:
                try:
                    width, height = upright_size(data)
                except (OSError, ValueError, Image.DecompressionBombError) as error:
                    reason = f"{name} is not a readable picture: {error}"
            if name in [row[0] for row in rows]:
                reason = f"two members are named {key}.{name}"
            rows.append((name, offset, len(data), width, height))
        if reason:
            bad[len(samples)] = reason
        samples.append((key, rows, digest.intdigest()))
    if not samples:
        raise DataError(f"{tar}: the tar holds no samples; a sample is files such as 000.json and 000.jpg")
    names = sorted({row[0] for _, rows, _ in samples for row in rows})
    number = {name: i for i, name in enumerate(names)}
    keys = [key.encode() for key, _, _ in samples]
    flat = [row for _, rows, _ in samples for row in rows]
    columns: dict[str, np.ndarray] = {
        "key_start": np.cumsum([0, *map(len, keys)]).astype(np.int64),
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
        "member_start": np.cumsum([0, *(len(rows) for _, rows, _ in samples)]).astype(np.int64),
        "member_name": np.array([number[row[0]] for row in flat], np.int32),
        "member_offset": np.array([row[1] for row in flat], np.int64),
        "member_size": np.array([row[2] for row in flat], np.int64),
        "image_width": np.array([row[3] for row in flat], np.int32),
        "image_height": np.array([row[4] for row in flat], np.int32),
        "checksum": np.array([digest for _, _, digest in samples], np.uint64),
    }
    size_bytes = tar.stat().st_size
    metadata = {"format": INDEX_FORMAT, "tar_size_bytes": str(size_bytes), "names": json.dumps(names)}
    save_sidecar(index_path(tar), columns, metadata | {"bad": json.dumps(bad)})
    return ShardIndex(size_bytes, tuple(names), bad, columns)


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) from a picture's header, after the EXIF turn that `samples.py` will make."""
    with Image.open(io.BytesIO(data)) as picture:
        width, height = picture.size
        return (height, width) if picture.getexif().get(EXIF_ORIENTATION, 1) >= 5 else (width, height)


def _read_samples(tar: Path) -> Iterator[tuple[str, list[tuple[str, int, bytes]]]]:
    """(key, [(name, offset, bytes)]) of each run of members that share a key, as WebDataset groups them."""
    key: str | None = None
    members: list[tuple[str, int, bytes]] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for entry in archive:
                folder, _, file_name = entry.name.rpartition("/")
                stem, dot, name = file_name.partition(".")
                if not entry.isfile() or not dot or file_name.startswith("__"):
                    continue
                entry_key = f"{folder}/{stem}" if folder else stem
                if entry_key != key:
                    if key is not None:
                        yield key, members
                    key, members = entry_key, []
                file: IO[bytes] | None = archive.extractfile(entry)
                assert file is not None  # isfile() above
                members.append((name.lower(), entry.offset_data, file.read()))
    except tarfile.ReadError as error:
        if key is None:
            raise DataError(
                f"{tar}: not a tar file ({error}). Shards must be plain tars; unpack compressed ones"
            ) from error
        raise DataError(f"{tar}: damaged after sample {key!r} ({error}). Copy or write the shard again") from error
    if key is not None:
        yield key, members


def expand(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Shard patterns → (files that exist, problems). `{000..007}` names every number, `*` what is there."""
    found: list[Path] = []
    problems: list[str] = []
    for pattern in patterns:
        missing: list[str] = []
        named = list(_expand_braces(pattern))
        for name in named:
            matches = sorted(glob.glob(name)) if any(c in name for c in "*?[") else [name] * os.path.isfile(name)
            found += [Path(match) for match in matches]
            missing += [] if matches else [name]
        if missing:
            what = "no such shard" if len(named) == len(missing) else f"{len(missing)} of {len(named)} shards missing"
            problems.append(f"data: {pattern}: {what} ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''})")
    return found, problems


def _expand_braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    low, high, words = match.groups()
    options = words.split(",") if words else [f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)]
    for option in options:
        yield from _expand_braces(pattern[: match.start()] + option + pattern[match.end() :])


@dataclass(frozen=True)
class ShardTable:
    """All shards of a list of sources, in order; sample ids count through them.

    start: [shards + 1] first sample id of each shard, and the end.
    source_of_shard: [shards] number of the source each shard belongs to.
    """

    sources: tuple[SourceSettings, ...]
    shards: tuple[Path, ...]
    start: np.ndarray
    source_of_shard: np.ndarray

    @classmethod
    def open(cls, sources: Sequence[SourceSettings], on_index: Callable[[Path], None] | None = None) -> "ShardTable":
        """Find the shards and their indexes, making those that are missing.

        Raises:
            DataError: one message for each shard that is missing or cannot be read.
        """
        shards: list[Path] = []
        source_of_shard: list[int] = []
        problems: list[str] = []
        for number, source in enumerate(sources):
            files, missing = expand(source.shards)
            problems += missing
            shards += files
            source_of_shard += [number] * len(files)
        sizes = []
        for shard in shards:
            try:
                index = load_index(shard)
                if index is None:
                    if on_index:
                        on_index(shard)
                    index = build_index(shard)
                sizes.append(len(index))
            except DataError as error:
                problems += error.problems
            except OSError as error:
                problems.append(f"{shard}: cannot be read: {error}")
        if problems:
            raise DataError(problems)
        start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(tuple(sources), tuple(shards), start, np.array(source_of_shard, np.int64))

    def __len__(self) -> int:
        return int(self.start[-1])

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Sample id → (shard number, sample number in it)."""
        shard = bisect.bisect_right(self.start, sample_id) - 1
        return shard, sample_id - int(self.start[shard])

    def source_name(self, shard: int) -> str:
        """The source's name, or the stem of its first shard without the trailing number."""
        number = int(self.source_of_shard[shard])
        first = self.shards[int(np.argmax(self.source_of_shard == number))]
        return self.sources[number].name or re.sub(r"[-_.]?\d*$", "", first.name.removesuffix(".tar"))

    def index(self, shard: int) -> ShardIndex:
        """The index of shard number `shard`."""
        return _cached_index(self.shards[shard])


@lru_cache(maxsize=256)
def _cached_index(tar: Path) -> ShardIndex:
    index = load_index(tar)
    if index is None:
        raise DataError(f"{tar}: the shard changed since the run began; its index no longer fits. Start the run again")
    return index
