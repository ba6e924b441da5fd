"""Tar shards and their indexes → where every sample's bytes are.

What comes in: the `data.train` or `data.validation` sources. What goes out: a `ShardTable`, in which a sample is one
integer (`sample_id`, its place in the list of all shards) and its members are byte ranges of a tar. Surprise: tar stays
the only data format. The index (`x.tar.index.safetensors`, columns of numbers) is made in one pass
when it is missing and can be deleted at any time; it depends on the tar alone, not on a tokenizer or a setting.

Index format 2. Columns: `key_start`, `key_bytes` (keys as in the tar, joined), `member_start` (first member of each
sample, plus the end), `member_name` (number in the metadata's `names`), and for each member `offset`, `size_bytes` (in
the tar), `width`, `height` (of a picture, upright, in pixels; 0 for others), `checksum` (xxh3-64).
Metadata: `format`, `tar_size_bytes`, `names`, `bad` (sample number → reason). To upgrade: delete the index files.
"""

import bisect
import glob
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.pictures import IMAGE_SUFFIXES, PICTURE_ERRORS, upright_size
from phi3v_dist.data.sidecar import ENDINGS, Columns, load_sidecar, save_sidecar
from phi3v_dist.errors import DataError
from phi3v_dist.printable import printable

INDEX_FORMAT = "2"
INDEX_SUFFIX = "index.safetensors"
MEMBER_DTYPES = {
    "offset": np.int64, "size_bytes": np.int64, "width": np.int32, "height": np.int32, "checksum": np.uint64,
}  # fmt: skip

_META = re.compile(r"__[^/]*__($|[/.])")  # names that WebDataset keeps for itself


class Member(NamedTuple):
    """One file of a sample; `name` is what follows the first dot of its file name, in lower case."""

    name: str
    offset: int
    size_bytes: int
    width: int
    height: int
    checksum: int


@dataclass(frozen=True)
class ShardIndex:
    """The columns of one shard; see the module for their meaning."""

    tar_size_bytes: int
    names: tuple[str, ...]
    bad: dict[int, str]
    columns: Columns

    def __len__(self) -> int:
        return len(self.columns["member_start"]) - 1

    @cached_property
    def digest(self) -> str:
        """Of all that the index says: another one when the tar's contents are others."""
        parts = [json.dumps(self.names).encode(), *(self.columns[name].tobytes() for name in sorted(self.columns))]
        return xxhash.xxh3_64_hexdigest(b"".join(parts))

    def key(self, number: int) -> str:
        """The sample's key. What is no UTF-8 or does not show is spelled out, so that every message can be printed."""
        start, end = self.columns["key_start"][number : number + 2]
        return printable(self.columns["key_bytes"][start:end].tobytes().decode(errors="backslashreplace"))

    def members(self, number: int) -> list[Member]:
        """The members of sample `number`, in the tar's order."""
        first, end = self.columns["member_start"][number : number + 2]
        names, *numbers = (self.columns[column][first:end].tolist() for column in ("member_name", *MEMBER_DTYPES))
        return [Member(self.names[name], *row) for name, *row in zip(names, *numbers, strict=True)]

    def image_sizes(self, number: int) -> dict[str, tuple[int, int]]:
        """Name → (width, height) of the sample's pictures, in the tar's order."""
        return {member.name: (member.width, member.height) for member in self.members(number) if member.width}


def load_index(tar: Path) -> ShardIndex | None:
    """The stored index of a shard; None when there is none or it belongs to other bytes."""
    size_bytes = tar.stat().st_size
    stored = load_sidecar(tar, INDEX_SUFFIX, {"format": INDEX_FORMAT, "tar_size_bytes": str(size_bytes)})
    if stored is None:
        return None
    columns, metadata = stored
    bad = {int(number): reason for number, reason in json.loads(metadata["bad"]).items()}
    return ShardIndex(size_bytes, tuple(json.loads(metadata["names"])), bad, columns)


def build_index(tar: Path) -> ShardIndex:
    """Read a tar once, from front to back, and store its index. Members of a sample need not stand together.

    Raises:
        DataError: the file is not a plain tar, is damaged or cut off, or holds no samples.
    """
    size_bytes = tar.stat().st_size
    samples: dict[str, list[Member]] = {}
    bad: dict[str, str] = {}
    for key, name, entry, data in _read_members(tar, size_bytes):
        members = samples.setdefault(key, [])
        width, height = 0, 0
        if not entry.isreg():
            bad[key] = f"{name} is a link or a device, not a file; pack with `tar --dereference --hard-dereference`"
        elif name in [member.name for member in members]:
            bad[key] = f"two members are named {name!r}"
        elif name.rsplit(".", 1)[-1] in IMAGE_SUFFIXES:
            try:
                width, height = upright_size(data)
            except PICTURE_ERRORS as error:
                bad[key] = f"{name} is not a readable picture: {error}"
        members.append(Member(name, entry.offset_data, len(data), width, height, xxhash.xxh3_64_intdigest(data)))
    if not samples:
        raise DataError(f"{tar}: the tar holds no samples; a sample is files such as 000.json and 000.jpg")
    flat = [member for members in samples.values() for member in members]
    names = tuple(sorted({member.name for member in flat}))
    number_of_name = {name: number for number, name in enumerate(names)}
    keys = [key.encode(errors="surrogateescape") for key in samples]
    columns: Columns = {
        "key_start": np.cumsum([0, *map(len, keys)]).astype(np.int64),
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
        "member_start": np.cumsum([0, *map(len, samples.values())]).astype(np.int64),
        "member_name": np.array([number_of_name[member.name] for member in flat], np.int32),
    }
    columns |= {column: np.array([getattr(m, column) for m in flat], dtype) for column, dtype in MEMBER_DTYPES.items()}
    index = ShardIndex(size_bytes, names, {i: bad[key] for i, key in enumerate(samples) if key in bad}, columns)
    metadata = {"format": INDEX_FORMAT, "tar_size_bytes": str(size_bytes), "names": json.dumps(names)}
    save_sidecar(tar, INDEX_SUFFIX, columns, metadata | {"bad": json.dumps(index.bad)})
    return index


def _read_members(tar: Path, size_bytes: int) -> Iterator[tuple[str, str, tarfile.TarInfo, bytes]]:
    """(key, name, entry, contents) of each member that belongs to a sample; key and name split as WebDataset does."""
    seen = ""
    try:
        with tarfile.open(tar, "r:") as archive:
            for entry in archive:
                seen = entry.name
                if entry.size < 0 or entry.isreg() and entry.offset_data + entry.size > size_bytes or entry.issparse():
                    raise tarfile.ReadError(f"it should have {entry.size} bytes, which are not there")
                folder, _, file_name = entry.name.rpartition("/")
                stem, _, name = file_name.partition(".")
                if not stem or not name or entry.isdir() or _META.match(entry.name):
                    continue
                file = archive.extractfile(entry) if entry.isreg() else None
                yield f"{folder}/{stem}" if folder else stem, name.lower(), entry, file.read() if file else b""
            _check_end(archive)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:  # damaged headers ask for anything
        if not seen:
            why = f"not a tar file ({error}). Shards must be plain tars; unpack compressed ones"
        else:
            why = f"damaged at or after its member {seen!r} ({error}). Copy or write the shard again"
        raise DataError(f"{tar}: {why}") from error


def _check_end(archive: tarfile.TarFile) -> None:
    """A whole tar ends with zeros; `tarfile` stops without a word at a damaged header as well."""
    file = archive.fileobj
    assert file is not None  # the archive is open
    file.seek(archive.offset)
    if not file.peek(1):  # type: ignore[attr-defined]  # a BufferedReader
        raise tarfile.ReadError("it ends without an end mark, so it may be cut off")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {archive.offset}, but more data from there on")


def expand(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Shard patterns → (files that exist, problems). `{000..007}` names every number, `*` what is there."""
    found: list[Path] = []
    problems: list[str] = []
    for pattern in patterns:
        missing: list[str] = []
        named = list(_expand_braces(pattern))
        for name in named:
            matches = [name] if os.path.isfile(name) else sorted(glob.glob(name))
            matches = [match for match in matches if not match.endswith(ENDINGS) and not os.path.isdir(match)]
            found += [Path(match) for match in matches]
            missing += [] if matches else [name]
        if missing or not named:
            what = "no such shard" if len(named) == len(missing) else f"{len(missing)} of {len(named)} shards missing"
            names = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
            which = f" ({names})" if missing not in ([], [pattern]) else ""
            problems.append(f"data: {pattern}: {what}{which}; correct `shards`, or put the files there")
    repeated = [path for path, count in Counter(found).items() if count > 1]
    problems += [f"data: {path}: named more than once by one source; correct `shards`" for path in repeated]
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
    _load: Callable[[Path], ShardIndex] = field(
        default_factory=lambda: lru_cache(maxsize=256)(_load_again), repr=False, compare=False
    )

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

    @cached_property
    def digest(self) -> str:
        """Of what the sample ids stand for: contents and order of the shards, whatever folder they lie in."""
        parts = [f"{self.source_of_shard[shard]} {self.index(shard).digest}" for shard in range(len(self.shards))]
        return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Sample id → (shard number, sample number in it)."""
        shard = bisect.bisect_right(self.start, sample_id) - 1
        return shard, sample_id - int(self.start[shard])

    def sample_name(self, sample_id: int) -> str:
        """`shard:key`, by which a person finds the sample."""
        shard, number = self.locate(sample_id)
        return f"{self.shards[shard]}:{self.index(shard).key(number)}"

    def source_name(self, shard: int) -> str:
        """The source's name, or the stem of its first shard without the trailing number."""
        number = int(self.source_of_shard[shard])
        first = self.shards[int(np.argmax(self.source_of_shard == number))]
        stem = first.name.removesuffix(".tar")
        return self.sources[number].name or re.sub(r"[-_.]?\d*$", "", stem) or stem

    def index(self, shard: int) -> ShardIndex:
        """The index of shard number `shard`."""
        return self._load(self.shards[shard])


def _load_again(tar: Path) -> ShardIndex:
    try:
        index = load_index(tar)
    except OSError as error:
        raise DataError(f"{tar}: was there when the run began, and is not now ({error})") from error
    if index is None:
        raise DataError(f"{tar}: the shard changed since the run began; its index no longer fits. Start the run again")
    return index
