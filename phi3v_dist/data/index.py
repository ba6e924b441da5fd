"""One tar → its index: where the bytes of every sample are, and which samples cannot be used.

What comes in: a plain tar, whole or damaged. What goes out: a `ShardIndex`, stored beside it. Surprise: one pass, and
no damage ends it. Samples before and after a damaged place are used, those that it hit are bad by name; a tar that was
cut after it was indexed keeps its old index, so that no sample changes its number.

The index depends on the tar alone, not on a tokenizer or a setting, and may be deleted at any time. Format 3; the bytes
are described in docs/data-formats.md. To upgrade from 2: nothing to do, indexes are made anew.
"""

import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from phi3v_dist.data import store
from phi3v_dist.data.pictures import IMAGE_SUFFIXES, PICTURE_ERRORS, upright_size
from phi3v_dist.data.samples import TEXT_MEMBERS
from phi3v_dist.data.sidecar import Columns, fetch_sidecar, load_sidecar, save_sidecar
from phi3v_dist.data.tar import Damage, walk
from phi3v_dist.errors import DataError
from phi3v_dist.printable import printable

INDEX_FORMAT = "3"
INDEX_SUFFIX = "index.safetensors"
MAX_MEMBER_BYTES = 256 << 20
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "dill")  # reading one may run a program
UNREAD_PICTURES = ("avif", "heic", "heif", "jp2", "jxl", "svg", "svgz", "eps", "ico", "psd", "tga", "dng")
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
    """The columns of one shard (see docs/data-formats.md), and what was wrong with it.

    bad: sample number → why it cannot be used.
    notes: sample number → what was odd about it, though it can be used.
    damage: places of the tar that could not be read.
    """

    tar_size_bytes: int
    names: tuple[str, ...]
    columns: Columns
    bad: dict[int, str] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    damage: tuple[Damage, ...] = ()

    def __len__(self) -> int:
        return len(self.columns["member_start"]) - 1

    @cached_property
    def digest(self) -> str:
        """Of all members of all samples: another one when the tar's contents are others."""
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


def load_index(address: str, tar_size_bytes: int) -> ShardIndex | None:
    """The stored index of a tar of this size; None when there is none, or it is damaged or belongs to another tar."""
    return _load(address, {"format": INDEX_FORMAT, "tar_size_bytes": str(tar_size_bytes)})


def _load(address: str, fits: dict[str, str]) -> ShardIndex | None:
    stored = load_sidecar(address, INDEX_SUFFIX, fits)
    if stored is None:
        return None
    columns, metadata = stored
    try:
        bad, notes = ({int(n): why for n, why in json.loads(metadata[name]).items()} for name in ("bad", "notes"))
        damage = tuple(Damage(*entry) for entry in json.loads(metadata["damage"]))
        names = tuple(json.loads(metadata["names"]))
        index = ShardIndex(int(metadata["tar_size_bytes"]), names, columns, bad, notes, damage)
        return index if index.digest == metadata["digest"] else None
    except (ValueError, LookupError, TypeError):
        return None


def build_index(address: str, tar_size_bytes: int) -> ShardIndex:
    """Read a tar once, from front to back, and store its index. Members of a sample need not stand together.

    Raises:
        DataError: the tar cannot be read at all, or its index not be written.
        FileNotFoundError: it is not there.
    """
    if not store.is_remote(address):
        return _build(address, Path(address), tar_size_bytes)
    fetch_sidecar(address, INDEX_SUFFIX)
    if (index := load_index(address, tar_size_bytes)) is not None:
        return index
    with tempfile.TemporaryDirectory(prefix="phi3v_dist-") as folder:
        copy = Path(folder) / "tar"
        try:
            store.download(address, copy, tar_size_bytes)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise DataError(f"{folder}: no room for a copy of {store.shown(address)} ({error}); set TMPDIR") from error
        return _build(address, copy, tar_size_bytes)


def _build(address: str, tar: Path, size_bytes: int) -> ShardIndex:
    index = _keep_if_cut(address, tar, size_bytes) or read_index(tar, size_bytes)
    damage = json.dumps([list(entry) for entry in index.damage])
    metadata = {
        "format": INDEX_FORMAT, "tar_size_bytes": str(size_bytes), "digest": index.digest, "damage": damage,
        "names": json.dumps(index.names), "bad": json.dumps(index.bad), "notes": json.dumps(index.notes),
    }  # fmt: skip
    save_sidecar(address, INDEX_SUFFIX, index.columns, metadata)
    return index


def _keep_if_cut(address: str, tar: Path, size_bytes: int) -> ShardIndex | None:
    """The index from before a tar was cut, with the samples that are gone marked; None when it is another tar."""
    old = _load(address, {"format": INDEX_FORMAT})
    if old is None or old.tar_size_bytes <= size_bytes or not len(old):
        return None
    columns = old.columns
    inside = columns["offset"] + columns["size_bytes"] <= size_bytes
    with tar.open("rb") as file:
        for place in np.flatnonzero(inside & (columns["checksum"] != 0)).tolist():
            data = os.pread(file.fileno(), int(columns["size_bytes"][place]), int(columns["offset"][place]))
            if xxhash.xxh3_64_intdigest(data) != columns["checksum"][place]:
                return None
    if size_bytes and not inside.any():
        return None
    reason = f"the tar was cut off: it has {size_bytes:,} of {old.tar_size_bytes:,} bytes"
    sample_of_member = np.repeat(np.arange(len(old)), np.diff(columns["member_start"]))
    gone = {number: reason for number in np.unique(sample_of_member[~inside]).tolist()}
    damage = (*old.damage, Damage(size_bytes, old.tar_size_bytes, reason))
    return replace(old, tar_size_bytes=size_bytes, bad=dict(sorted((gone | old.bad).items())), damage=damage)


def read_index(tar: Path, size_bytes: int) -> ShardIndex:
    """Read a tar once; nothing is stored. Raises OSError."""
    found = _Samples()
    with tar.open("rb") as file:
        for entry in walk(file, size_bytes):
            if isinstance(entry, Damage):
                found.add_damage(entry)
            elif (split := split_name(entry.name)) and not entry.isdir():
                found.add(*split, entry, file.fileno())
    found.judge()
    if not found.members and not found.damage:
        reason = "the tar holds no samples; a sample is files such as 000.json and 000.jpg"
        found.damage.append(Damage(0, size_bytes, reason))
    return found.index(size_bytes)


def split_name(path: str) -> tuple[str, str] | None:
    """A member's path → (key, name), at the first dot of the file name as WebDataset does; None: of no sample."""
    folder, _, file_name = path.rpartition("/")
    stem, _, name = file_name.partition(".")
    if not stem or not name or _META.match(path):
        return None
    return f"{folder}/{stem}" if folder else stem, name.lower()


class _Samples:
    """What is known so far of a tar that is being read."""

    def __init__(self) -> None:
        self.members: dict[str, list[Member]] = {}
        self.bad: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.damage: list[Damage] = []
        self._last_key: str | None = None
        self._around: list[
            tuple[str | None, str | None, Damage]
        ] = []  # keys before and after what lost unknown members
        self._open_damage: list[tuple[str | None, Damage]] = []

    def add(self, key: str, name: str, entry: tarfile.TarInfo, file: int) -> None:
        self._around += [(before, key, damage) for before, damage in self._open_damage]
        self._open_damage.clear()
        self._last_key = key
        members = self.members.setdefault(key, [])
        if any(member.name == name for member in members):
            self.notes[key] = f"more than one member is named {name!r}; the first is used"
            return
        size_bytes, width, height, checksum = entry.size, 0, 0, 0
        suffix = name.rsplit(".", 1)[-1]
        if not entry.isreg():
            size_bytes = 0
            self._spoil(key, f"{name} is a link or a device, no file; pack with `tar --dereference --hard-dereference`")
        elif entry.issparse():
            size_bytes = 0
            self._spoil(key, f"{name} is stored without its holes; pack without `--sparse`")
        elif suffix in PICKLES:
            self._spoil(key, f"{name} is a pickle, which may run a program when it is read; it was not opened")
        elif size_bytes > MAX_MEMBER_BYTES:
            self._spoil(
                key, f"{name} has {size_bytes:,} bytes, over the limit of {MAX_MEMBER_BYTES:,}; it was not read"
            )
        else:
            data = os.pread(file, size_bytes, entry.offset_data)
            checksum = xxhash.xxh3_64_intdigest(data)
            if suffix in IMAGE_SUFFIXES:
                try:
                    width, height = upright_size(data)
                except PICTURE_ERRORS as error:
                    self._spoil(key, f"{name} is not a readable picture: {error}")
        members.append(Member(name, entry.offset_data, size_bytes, width, height, checksum))

    def add_damage(self, damage: Damage) -> None:
        self.damage.append(damage)
        self._open_damage.append((self._last_key, damage))
        if split := split_name(damage.name):
            self.members.setdefault(split[0], [])

    def judge(self) -> None:
        """Mark samples that may have lost a member, pictures without text, and those with none but unread pictures."""
        self._around += [(before, None, damage) for before, damage in self._open_damage]
        self._around = [place for place in self._around if not self._is_known(place[2])]
        near = {key for before, after, _ in self._around for key in (before, after)}
        kinds = Counter(_kind(members) for key, members in self.members.items() if key not in near | self.bad.keys())
        for before, after, damage in self._around:
            reason = f"it may have lost a member at byte {damage.begin:,} of the tar: {damage.reason}"
            for key in dict.fromkeys(key for key in (before, after) if key is not None):
                # Whole for certain only where all other samples are of one kind, and this one is too.
                if before == after or len(kinds) != 1 or _kind(self.members[key]) not in kinds:
                    self._spoil(key, reason)
        for key, members in self.members.items():
            names = [member.name for member in members]
            unread = [name for name in names if name.rsplit(".", 1)[-1] in UNREAD_PICTURES]
            if unread and not any(member.width for member in members):
                self._spoil(
                    key, f"{unread[0]} is a picture of a kind that is not read: {', '.join(IMAGE_SUFFIXES)} are"
                )
            if any(member.width for member in members) and not any(name in TEXT_MEMBERS for name in names):
                dotted = any(name.endswith(tuple(f".{text}" for text in TEXT_MEMBERS)) for name in names)
                rule = "; a key ends at the first dot of the file name: rename without other dots" if dotted else ""
                self._spoil(key, f"it has no .json and no .txt beside its pictures (members: {', '.join(names)}){rule}")

    def _is_known(self, damage: Damage) -> bool:
        """Whether it is certain which member a damaged place held; that sample is then marked."""
        key, name = split_name(damage.name) or ("", "")
        if not name or any(member.name == name for member in self.members[key]):  # then the name itself is damaged
            return False
        self._spoil(key, f"{name} is lost, at byte {damage.begin:,} of the tar: {damage.reason}")
        return damage.alone

    def index(self, size_bytes: int) -> ShardIndex:
        flat = [member for members in self.members.values() for member in members]
        names = tuple(sorted({member.name for member in flat}))
        number_of_name = {name: number for number, name in enumerate(names)}
        keys = [key.encode(errors="surrogateescape") for key in self.members]
        columns: Columns = {
            "key_start": np.cumsum([0, *map(len, keys)]).astype(np.int64),
            "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
            "member_start": np.cumsum([0, *map(len, self.members.values())]).astype(np.int64),
            "member_name": np.array([number_of_name[member.name] for member in flat], np.int32),
        }
        columns |= {name: np.array([getattr(m, name) for m in flat], dtype) for name, dtype in MEMBER_DTYPES.items()}
        bad, notes = (
            {number: of[key] for number, key in enumerate(self.members) if key in of} for of in (self.bad, self.notes)
        )
        return ShardIndex(size_bytes, names, columns, bad, notes, tuple(self.damage))

    def _spoil(self, key: str, reason: str) -> None:
        self.bad.setdefault(key, reason)


def _kind(members: list[Member]) -> tuple[str, ...]:
    return tuple(sorted(member.name for member in members))
