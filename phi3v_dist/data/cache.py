"""Shards elsewhere → whole copies on the node, shared by its ranks.

What comes in: a shard's address, size and, for a path, time of change. What goes out: an open file with its bytes.
Surprise: there is no process that manages the folder, and nothing to clean up after a kill. A copy in the making is
`NAME.partial`, locked by who writes it; the kernel drops the lock with the process, and whoever wants the shard next
goes on at that byte.

A file that is being read is locked too (shared), so eviction passes it over. Only file locks (flock) and renames are
used, never named shared memory. Shards given as paths push nothing out when they are read: where the limit is below
what an epoch reads, copies would come and go at every sample. staging.py makes room for them, before.
"""

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import FileIO
from pathlib import Path

import xxhash

from phi3v_dist.config import CacheSettings
from phi3v_dist.data import store
from phi3v_dist.watch import heartbeat

PIECE_BYTES = 8 << 20
POLL_S = 0.05
WAIT_S = 900.0  # for another's download of one shard; then samples are read by range

log = logging.getLogger(__name__)


class ShardCache:
    """A folder of whole shards with a limit in bytes; the least recently used go first.

    Args:
        folder: on the node's own disk; made when it is missing.
        limit_bytes: what all copies, whole and in the making, may take together.
        local_shards: whether shards given as paths are copied too.
    """

    def __init__(self, folder: Path, limit_bytes: int, local_shards: bool = False):
        self.folder, self.limit_bytes, self.local_shards = folder, limit_bytes, local_shards
        self._given_up = False

    @classmethod
    def of(cls, settings: CacheSettings) -> "ShardCache | None":
        """The cache that the settings ask for."""
        if settings.path is None:
            return None
        return cls(settings.path, int(settings.limit_gb * 1e9), settings.local_shards)

    def serves(self, address: str) -> bool:
        """Whether a shard is to be read from a copy."""
        return self.local_shards or store.is_remote(address)

    @contextlib.contextmanager
    def open(self, address: str, size_bytes: int, modified_ns: int = 0) -> Iterator[int | None]:
        """A descriptor to `pread` from, for the time of the block; None: no copy can be had, read the original.

        modified_ns: of a path; one that was written anew is another shard.

        Raises:
            FileNotFoundError, StoreError: of the object.
        """
        descriptor = self._open(address, size_bytes, modified_ns)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def path(self, address: str, size_bytes: int, modified_ns: int = 0) -> Path:
        """Where the copy is, or would be."""
        which = store.shown(address) if store.is_remote(address) else f"{_real(address)}\n{modified_ns}"
        digest = xxhash.xxh3_64_hexdigest(which.encode(errors="surrogateescape"))
        return self.folder / f"{digest}-{size_bytes}"

    def has(self, path: Path, size_bytes: int) -> bool:
        """Whether the copy is there, now marked as used; one of another size, cut by a power loss, goes."""
        try:
            descriptor = _open_shared(path)
        except OSError:
            return False
        if descriptor is None:
            return False
        try:
            if os.fstat(descriptor).st_size == size_bytes:
                return True
            path.unlink()
        finally:
            os.close(descriptor)
        return False

    def drop(self, address: str, size_bytes: int, modified_ns: int = 0) -> None:
        """Forget a copy whose bytes are wrong."""
        with contextlib.suppress(OSError):
            self.path(address, size_bytes, modified_ns).unlink()

    def fill(
        self, address: str, size_bytes: int, modified_ns: int, may_go: Callable[[Path], bool],
        on_bytes: Callable[[int], object] = int,
    ) -> bool:  # fmt: skip
        """Make the copy, or wait until another has made it; False: there is no room, the original cannot be read or is
        another by now, or it took too long.

        Args:
            may_go: whether a copy may be removed to make room.
            on_bytes: told how many have come, each time; an InterruptedError from it leaves the rest to the next call.

        Raises:
            FileNotFoundError, StoreError: of the object.
            OSError: the copy cannot be written.
        """
        path = self.path(address, size_bytes, modified_ns)
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + WAIT_S
        while not path.exists():
            with self._locked_folder():  # one at a time, so that all together keep the limit
                if path.exists():
                    return True
                if not _partial(path).exists() and not self._make_room(size_bytes, may_go):
                    return False
                descriptor = os.open(_partial(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                mine = _lock(descriptor, fcntl.LOCK_EX)
            try:
                if mine:
                    return self._make(address, path, size_bytes, modified_ns, on_bytes)
            finally:
                os.close(descriptor)  # with it goes the lock
            if time.monotonic() > deadline:
                return False
            on_bytes(0)
            time.sleep(POLL_S)
        return True

    def _open(self, address: str, size_bytes: int, modified_ns: int) -> int | None:
        path = self.path(address, size_bytes, modified_ns)
        try:
            descriptor = _open_shared(path)
            if descriptor is not None or self._given_up or size_bytes > self.limit_bytes:
                return descriptor
            remote = store.is_remote(address)
            return _open_shared(path) if self.fill(address, size_bytes, modified_ns, lambda _: remote) else None
        except FileNotFoundError as error:
            if error.errno is None:  # the object's, from the store
                raise
            return None  # evicted by another process just now
        except OSError as error:
            if not self._given_up:
                log.warning("%s: no copies of shards from now on (%s); samples are read one by one", path, error)
            self._given_up = True
            return None

    def _make(
        self, address: str, path: Path, size_bytes: int, modified_ns: int, on_bytes: Callable[[int], object]
    ) -> bool:
        """The copy, whose `partial` is locked by us."""
        try:
            if store.is_remote(address):
                store.download(address, _partial(path), size_bytes, on_bytes)
            elif not _copy(address, _partial(path), size_bytes, modified_ns, on_bytes):
                _partial(path).unlink()
                return False
            with self._locked_folder():
                _partial(path).rename(path)
            return True
        except InterruptedError:
            raise
        except OSError:
            with contextlib.suppress(OSError):
                _partial(path).unlink()  # gives others the room
            raise

    def _make_room(self, size_bytes: int, may_go: Callable[[Path], bool]) -> bool:
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
            if may_go(path) and _remove_unless_in_use(path):
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


@lru_cache(maxsize=1 << 16)
def _real(path: str) -> str:
    return os.path.realpath(path)  # a look at each folder above: too much for every sample


def _copy(path: str, to: Path, size_bytes: int, modified_ns: int, on_bytes: Callable[[int], object]) -> bool:
    """A file → `to`, which may hold its beginning already; False: not all of it could be had.

    Raises:
        OSError: `to` cannot be written.
    """
    with to.open("ab") as copy:
        if copy.tell() > size_bytes:
            copy.truncate(0)
            copy.seek(0)
        for data in _pieces(path, copy.tell(), size_bytes, modified_ns):
            copy.write(data)
            heartbeat.read_on()
            on_bytes(len(data))
        return copy.tell() == size_bytes


def _pieces(path: str, begin: int, size_bytes: int, modified_ns: int) -> Iterator[bytes]:
    """A file's bytes from `begin` on; they end early where it cannot be read, or is another by now."""
    with contextlib.suppress(OSError), FileIO(path) as file:
        while data := os.pread(file.fileno(), PIECE_BYTES, begin):
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (size_bytes, modified_ns):
                return
            begin += len(data)
            yield data


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
