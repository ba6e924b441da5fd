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

from phi3v_dist.data.samples import BadSample
from phi3v_dist.data.shards import ShardTable

MAX_OPEN_FILES = 128


class Fetcher:
    """Reads members by `pread`, so that any number of threads share one file descriptor per shard."""

    def __init__(self, table: ShardTable):
        self.table = table
        self._files: OrderedDict[Path, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def fetch(self, sample_id: int) -> dict[str, bytes]:
        """All members of a sample by name.

        Raises:
            BadSample: the index marks it bad, the range cannot be read, or its bytes are not those that were indexed.
        """
        shard, number = self.table.locate(sample_id)
        index, path = self.table.index(shard), self.table.shards[shard]
        if number in index.bad:
            raise BadSample(str(path), index.key(number), index.bad[number])
        members = index.members(number)
        begin = members[0][1]
        size = members[-1][1] + members[-1][2] - begin
        try:
            file = self._open(path)  # held here, so that another thread's eviction cannot close it before the read
            data = os.pread(file.fileno(), size, begin)
        except OSError as error:
            raise BadSample(str(path), index.key(number), f"cannot be read: {error}") from error
        parts = {name: data[offset - begin : offset - begin + length] for name, offset, length in members}
        digest = xxhash.xxh3_64()
        for name, _, _ in members:
            digest.update(parts[name])
        if digest.intdigest() != int(index.columns["checksum"][number]):
            raise BadSample(str(path), index.key(number), "its bytes are not those that were indexed (checksum)")
        return parts

    def _open(self, path: Path) -> FileIO:
        with self._lock:
            file = self._files.pop(path, None) or FileIO(path)
            self._files[path] = file
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last reader lets go of it
            return file
