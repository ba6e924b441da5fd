"""The shards of a run → copies on this node, before the first sample is read.

What comes in: the `data` settings. What goes out: a full cache (cache.py) and a `Staged` that says what is in it.
Surprise: nothing here has to succeed. What is missing in the end is copied or read where it is by the ranks, so this
may be interrupted anywhere, and several processes of a node may do it at once.

Which shards fit is decided first, train before validation, so every start chooses the same. Only copies of others, of
earlier runs and of shards before they were written anew, are removed to make room.
"""

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from phi3v_dist.config import DataSettings
from phi3v_dist.data import shards, store
from phi3v_dist.data.cache import ShardCache
from phi3v_dist.errors import ConfigError
from phi3v_dist.progress import BYTES, show_progress

COPIES_AT_ONCE = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Original:
    """A shard to copy. modified_ns: 0 for a remote one."""

    address: str
    size_bytes: int
    modified_ns: int


@dataclass
class Staged:
    """What became of the shards.

    others: paths that the settings do not ask to copy. there: copied earlier. copied: by this call or beside it.
    missed: were to be copied and could not. copied_bytes: by this call, those of a copy that is not whole yet too.
    """

    others: list[Original] = field(default_factory=list)
    too_large: list[Original] = field(default_factory=list)
    there: list[Original] = field(default_factory=list)
    copied: list[Original] = field(default_factory=list)
    missed: list[Original] = field(default_factory=list)
    copied_bytes: int = 0
    seconds: float = 0.0

    def lines(self, folder: Path) -> list[str]:
        """For people."""
        whole = [*self.there, *self.copied]
        lines = [f"{_count(whole)} in {folder}"]
        if self.copied or self.missed:
            rate = self.copied_bytes / 1e6 / max(self.seconds, 1e-3)
            lines[0] += f": {self.copied_bytes / 1e9:,.2f} GB copied in {self.seconds:.1f} s ({rate:,.0f} MB/s)"
        elif whole:
            lines[0] += " already: nothing to do"
        if self.too_large:
            lines.append(f"{_count(self.too_large)} did not fit: they are read where they are (data.cache.limit_gb)")
        if self.missed:
            lines.append(f"{_count(self.missed)} not copied: they are read where they are, and another call goes on")
        if self.others:
            lines.append(f"{_count(self.others)} given as paths are read where they are (data.cache.local_shards)")
        return lines


def stage(settings: DataSettings, stop: threading.Event) -> Staged:
    """Copy the shards of all sources to this node's own disk, as far as they fit.

    stop: when it is set, copies in the making are left as they are, for the next call to go on.

    Raises:
        ConfigError: the settings name no folder, or nothing to copy.
        DataError: a shard is missing, or a store refuses access.
    """
    cache = ShardCache.of(settings.cache)
    if cache is None:
        raise ConfigError("`data.cache.path` is not set: set it to a folder on this node's own disk")
    begin, staged = time.monotonic(), Staged()
    chosen = _choose(settings, cache, staged)
    if not chosen and not staged.too_large:
        raise ConfigError(
            "all shards are given as paths, and those are not copied: set data.cache.local_shards=true if their file "
            "system is slower than this node's disk"
        )
    to_copy = {path: original for path, original in chosen.items() if not cache.has(path, original.size_bytes)}
    staged.there += [original for path, original in chosen.items() if path not in to_copy]
    if to_copy:
        wanted = list(to_copy.values())
        log.info("%s: %s to copy, %d are there already", cache.folder, _count(wanted), len(staged.there))
        _Copying(cache, chosen, stop).run(wanted, staged)
    staged.seconds = time.monotonic() - begin
    return staged


def _choose(settings: DataSettings, cache: ShardCache, staged: Staged) -> dict[Path, Original]:
    """By their copies' paths, the shards that fit; the others go to `staged`."""
    chosen: dict[Path, Original] = {}
    used_bytes = 0
    for sources in filter(None, (settings.train, settings.validation)):
        addresses, sizes, times = shards.find(sources)
        for original in map(Original, addresses, sizes.tolist(), times.tolist()):
            address = original.address
            path = cache.path(address, original.size_bytes, original.modified_ns)
            if not cache.serves(address):
                staged.others.append(original)
            elif path in chosen:
                continue  # named twice
            elif used_bytes + original.size_bytes > cache.limit_bytes:
                staged.too_large.append(original)
            else:
                chosen[path] = original
                used_bytes += original.size_bytes
    return chosen


class _Copying:
    """Some copies at once."""

    def __init__(self, cache: ShardCache, chosen: dict[Path, Original], stop: threading.Event):
        self.cache, self.chosen, self.stop = cache, chosen, stop
        self._bytes = 0
        self._lock = threading.Lock()
        self._full = threading.Event()

    def run(self, originals: list[Original], staged: Staged) -> None:
        """Raises DataError when a store refuses access, after the copies that have begun."""
        with ThreadPoolExecutor(COPIES_AT_ONCE, "stage") as pool:
            futures = {pool.submit(self._copy, original): original for original in originals}
            try:
                self._show_until_done(set(futures), _size_of(originals))
            except BaseException:
                self.stop.set()
                raise
        for future, original in futures.items():
            (staged.copied if future.result() else staged.missed).append(original)
        staged.copied_bytes = self._bytes

    def _show_until_done(self, waiting: set[Future[bool]], size_bytes: int) -> None:
        with show_progress(BYTES) as report:
            while waiting:
                report("copying shards", self._bytes, size_bytes)
                done, waiting = wait(waiting, timeout=0.5)  # signals are handled in between
                for future in done:
                    future.result()

    def _copy(self, original: Original) -> bool:
        if self.stop.is_set() or self._full.is_set():
            return False
        which = original.address, original.size_bytes, original.modified_ns
        try:
            made = self.cache.fill(*which, lambda path: _whole(path) not in self.chosen, self._on_bytes)
        except InterruptedError:
            return False
        except OSError as error:
            if isinstance(error, FileNotFoundError) and error.errno is None:  # the object's, from the store
                log.warning("not copied: %s", error)
            elif not self._full.is_set():
                self._full.set()
                log.warning("%s: no more copies of shards (%s)", self.cache.folder, error)
            return False
        if not made:
            why = "it was changed just now, cannot be read, or other jobs use the room"
            log.warning("%s: not copied: %s", store.shown(original.address), why)
        return made

    def _on_bytes(self, num: int) -> None:
        if self.stop.is_set():
            raise InterruptedError
        with self._lock:
            self._bytes += num


def _whole(path: Path) -> Path:
    """The copy that a `.partial` will be."""
    return path.with_suffix("")


def _count(originals: list[Original]) -> str:
    return f"{len(originals):,} shards ({_size_of(originals) / 1e9:,.2f} GB)"


def _size_of(originals: list[Original]) -> int:
    return sum(original.size_bytes for original in originals)
