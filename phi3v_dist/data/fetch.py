"""Sample id → the bytes of its members, as the index promised them.

What comes in: a sample id. What goes out: name → bytes. Surprise: every member is compared with the checksum of the
index, so a silent change of a shard (a bad disk, a file rewritten under the run) is one named bad sample and not a
strange loss.

Local shards are read by `pread`, so that any number of threads share one descriptor per shard. Remote ones are read
from the node's copies (cache.py) where there is room for any, else one range of bytes per sample; so are local ones,
where the settings ask for copies.
"""

import contextlib
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path

import xxhash

from phi3v_dist.data import store
from phi3v_dist.data.cache import ShardCache
from phi3v_dist.data.index import INDEX_SUFFIX, Member
from phi3v_dist.data.samples import TEXT_MEMBERS, BadSample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import DataError

MAX_OPEN_FILES = 128
MAX_GAP_BYTES = 1 << 20  # between members of a sample that one request still spans

Pread = Callable[[int, int], bytes]  # (size, offset) → bytes


class Fetcher:
    """Reads members; any number of threads may share one."""

    def __init__(self, table: ShardTable, cache: ShardCache | None = None):
        self.table, self.cache = table, cache
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        self._copies: dict[str, FileIO] = {}
        self._lock = threading.Lock()

    def fetch(self, sample_id: int, text_only: bool = False) -> dict[str, bytes]:
        """All members of a sample by name; `text_only` leaves the others than .json and .txt empty, unread.

        Raises:
            BadSample: the index marks it bad, its shard has changed or is gone, or its bytes are not those indexed.
            StoreError: a remote store refuses access or stays silent.
        """
        shard, number = self.table.locate(sample_id)
        name = self.table.shard_name(shard)
        try:
            index = self.table.index(shard)
        except store.StoreError:
            raise
        except DataError as error:
            raise BadSample(name, f"number {number}", str(error)) from error.__cause__
        key = index.key(number)
        if number in index.bad:
            raise BadSample(name, key, index.bad[number])
        members = index.members(number)
        wanted = [member for member in members if not text_only or member.name in TEXT_MEMBERS]
        try:
            parts, wrong = self._read(shard, wanted)
        except OSError as error:
            names = ", ".join(member.name for member in wanted)
            raise BadSample(name, key, f"{names} cannot be read: {error}") from error
        if wrong:
            raise BadSample(
                name, key, f"the bytes of {wrong} are not those that were indexed (checksum); copy the shard again, or "
                f"delete {name}.{INDEX_SUFFIX} if it was written anew",
            )  # fmt: skip
        return {member.name: parts.get(member.name, b"") for member in members}

    @contextlib.contextmanager
    def whole(self, shard: int) -> Iterator[None]:
        """While it lasts, a remote shard of which every sample is wanted is read from a copy, not range by range."""
        address, size_bytes = self.table.shards[shard], int(self.table.rows.tar_size_bytes[shard])
        if self.cache or not store.is_remote(address):
            yield
            return
        with tempfile.TemporaryDirectory(prefix="phi3v_dist-") as folder:
            copy = Path(folder) / "tar"
            store.download(address, copy, size_bytes)
            self._copies[address] = FileIO(copy)
            try:
                yield
            finally:
                self._copies.pop(address).close()

    def _read(self, shard: int, members: Sequence[Member]) -> tuple[dict[str, bytes], str]:
        """(name → bytes, name of a member whose checksum is wrong, or "")."""
        address, rows = self.table.shards[shard], self.table.rows
        if not (self.cache and self.cache.serves(address)):
            return self._read_original(address, members)
        which = address, int(rows.tar_size_bytes[shard]), int(rows.modified_ns[shard])
        with self.cache.open(*which) as descriptor:
            if descriptor is None:
                return self._read_original(address, members)
            with contextlib.suppress(OSError):  # of the node's disk
                parts, wrong = _check(members, lambda size, offset: os.pread(descriptor, size, offset))
                if not wrong:
                    return parts, wrong
        parts, wrong = self._read_original(address, members)
        if not wrong:  # else the original is at fault, and another copy would be no better
            self.cache.drop(*which)
        return parts, wrong

    def _read_original(self, address: str, members: Sequence[Member]) -> tuple[dict[str, bytes], str]:
        if copy := self._copies.get(address):
            return _check(members, lambda size, offset: os.pread(copy.fileno(), size, offset))
        if store.is_remote(address):
            return _check(members, _ranges(address, members))
        file = self._open(address)  # held here, so that another thread's eviction cannot close it before the read
        return _check(members, lambda size, offset: os.pread(file.fileno(), size, offset))

    def _open(self, path: str) -> FileIO:
        with self._lock:
            file = self._files.pop(path, None) or FileIO(path)
            self._files[path] = file
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last reader lets go of it
            return file


def _check(members: Sequence[Member], pread: Pread) -> tuple[dict[str, bytes], str]:
    parts: dict[str, bytes] = {}
    for member in members:
        parts[member.name] = pread(member.size_bytes, member.offset)
        if xxhash.xxh3_64_intdigest(parts[member.name]) != member.checksum:
            return parts, member.name
    return parts, ""


def _ranges(address: str, members: Sequence[Member]) -> Pread:
    """Reads from an object with one request for all members that lie close together."""
    spans: list[tuple[int, bytes]] = []
    begin = end = None
    for member in sorted(members, key=lambda member: member.offset):
        if begin is None or end is None or member.offset - end > MAX_GAP_BYTES:
            if begin is not None and end is not None:
                spans.append((begin, store.read(address, begin, end)))
            begin = member.offset
        end = member.offset + member.size_bytes
    if begin is not None and end is not None:
        spans.append((begin, store.read(address, begin, end)))

    def pread(size: int, offset: int) -> bytes:
        begin, data = max((span for span in spans if span[0] <= offset), key=lambda span: span[0])
        return data[offset - begin : offset - begin + size]

    return pread
