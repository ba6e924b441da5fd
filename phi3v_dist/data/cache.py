"""Remote shards → whole copies on the node, shared by its ranks.

What comes in: an address and the object's size. What goes out: an open file with its bytes. Surprise: there is no
process that manages the folder, and nothing to clean up after a kill. A copy in the making is `NAME.partial`, locked by
who writes it; the kernel drops the lock with the process, and whoever wants the shard next goes on at that byte.

A file that is being read is locked too (shared), so eviction passes it over. Only file locks (flock) and renames are
used, never named shared memory.
"""

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from phi3v_dist.config import CacheSettings
from phi3v_dist.data import store

POLL_S = 0.05
WAIT_S = 900.0  # for another's download of one shard; then samples are read by range

log = logging.getLogger(__name__)


class ShardCache:
    """A folder of whole shards with a limit in bytes; the least recently used go first.

    Args:
        folder: on the node's own disk; made when it is missing.
        limit_bytes: what all copies, whole and in the making, may take together.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self._given_up = False

    @classmethod
    def of(cls, settings: CacheSettings) -> "ShardCache | None":
        """The cache that the settings ask for."""
        return cls(settings.path, int(settings.limit_gb * 1e9)) if settings.path else None

    @contextlib.contextmanager
    def open(self, address: str, size_bytes: int) -> Iterator[int | None]:
        """A descriptor to `pread` from, for the time of the block; None: no copy can be had, read by range.

        Raises:
            FileNotFoundError, StoreError: of the object.
        """
        descriptor = self._open(address, size_bytes)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def drop(self, address: str, size_bytes: int) -> None:
        """Forget a copy whose bytes are wrong."""
        with contextlib.suppress(OSError):
            self._path(address, size_bytes).unlink()

    def _open(self, address: str, size_bytes: int) -> int | None:
        path = self._path(address, size_bytes)
        descriptor = _open_shared(path)
        if descriptor is not None or self._given_up or size_bytes > self.limit_bytes:
            return descriptor
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._fill(address, path, size_bytes):
                return None
        except FileNotFoundError as error:
            if error.errno is None:  # the object's, from the store
                raise
            return None  # evicted by another process just now
        except OSError as error:
            if not self._given_up:
                log.warning("%s: no copies of shards from now on (%s); samples are read one by one", path, error)
            self._given_up = True
            with contextlib.suppress(OSError):
                _partial(path).unlink()
            return None
        return _open_shared(path)

    def _fill(self, address: str, path: Path, size_bytes: int) -> bool:
        """Make the copy, or wait until another has made it; False: there is no room, or it took too long."""
        deadline = time.monotonic() + WAIT_S
        while not path.exists():
            with self._locked_folder():  # one at a time, so that all together keep the limit
                if path.exists():
                    return True
                if not _partial(path).exists() and not self._make_room(size_bytes):
                    return False
                descriptor = os.open(_partial(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                mine = _lock(descriptor, fcntl.LOCK_EX)
            try:
                if mine:
                    store.download(address, _partial(path), size_bytes)
                    with self._locked_folder():
                        _partial(path).rename(path)
                    return True
            finally:
                os.close(descriptor)  # with it goes the lock
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _make_room(self, size_bytes: int) -> bool:
        """Remove what was not used for longest until so many more bytes fit."""
        files = []
        for path in self.folder.iterdir():
            if match := re.fullmatch(r"[0-9a-f]{16}-(\d+)(\.partial)?", path.name):
                with contextlib.suppress(FileNotFoundError):
                    files.append((path.stat().st_atime_ns, path, int(match[1])))
        used_bytes = sum(size for _, _, size in files)
        for _, path, size in sorted(files):
            if used_bytes + size_bytes <= self.limit_bytes:
                break
            if _remove_unless_in_use(path):
                used_bytes -= size
        return used_bytes + size_bytes <= self.limit_bytes

    @contextlib.contextmanager
    def _locked_folder(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for the time of a listing
            yield
        finally:
            os.close(descriptor)

    def _path(self, address: str, size_bytes: int) -> Path:
        return self.folder / f"{xxhash.xxh3_64_hexdigest(store.shown(address).encode())}-{size_bytes}"


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_shared(path: Path) -> int | None:
    """The file, locked against eviction and marked as used; None when it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    _lock(descriptor, fcntl.LOCK_SH)  # refused while its maker holds it: then it is the newest, and stays anyway
    with contextlib.suppress(PermissionError):  # another user's copy: read it, but its owner marks the use
        os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
    return descriptor


def _remove_unless_in_use(path: Path) -> bool:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _lock(descriptor, fcntl.LOCK_EX):
                path.unlink()
                return True
        finally:
            os.close(descriptor)
    return False
