"""Sample id → the bytes of its members, read by range from a local tar.

What comes in: a `ShardTable` and a sample id. What goes out: {"json": b"…", "0.jpg": b"…"}. Surprise: the checksum of
the index is compared on every read, so a shard that was changed or damaged under a run is noticed, and named.
"""

import os
import threading
from collections import OrderedDict
from io import FileIO
from pathlib import Path

import xxhash

from phi3v_dist.data.samples import TEXT_MEMBERS, BadSample
from phi3v_dist.data.shards import INDEX_SUFFIX, ShardTable

MAX_OPEN_FILES = 128


class Fetcher:
    """Reads members by `pread`, so that any number of threads share one file descriptor per shard."""

    def __init__(self, table: ShardTable):
        self.table = table
        self._files: OrderedDict[Path, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def fetch(self, sample_id: int, text_only: bool = False) -> dict[str, bytes]:
        """All members of a sample by name; `text_only` leaves the others than .json and .txt empty, unread.

        Raises:
            BadSample: the index marks it bad, a range cannot be read, or its bytes are not those that were indexed.
        """
        shard, number = self.table.locate(sample_id)
        index, path = self.table.index(shard), self.table.shards[shard]
        if number in index.bad:
            raise BadSample(str(path), index.key(number), index.bad[number])
        parts: dict[str, bytes] = {}
        for member in index.members(number):
            if text_only and member.name not in TEXT_MEMBERS:
                parts[member.name] = b""
                continue
            try:
                file = self._open(path)  # held here, so that another thread's eviction cannot close it before the read
                parts[member.name] = os.pread(file.fileno(), member.size_bytes, member.offset)
            except OSError as error:
                raise BadSample(str(path), index.key(number), f"{member.name} cannot be read: {error}") from error
            if xxhash.xxh3_64_intdigest(parts[member.name]) != member.checksum:
                raise BadSample(
                    str(path), index.key(number), f"the bytes of {member.name} are not those that were indexed "
                    f"(checksum); copy the shard again, or delete {path}.{INDEX_SUFFIX} if it was written anew",
                )  # fmt: skip
        return parts

    def _open(self, path: Path) -> FileIO:
        with self._lock:
            file = self._files.pop(path, None) or FileIO(path)
            self._files[path] = file
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last reader lets go of it
            return file
