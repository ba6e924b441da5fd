"""URLs → files in a folder, in the order of the URLs, each fetched once however often this is interrupted.

What comes in: any number of URLs, taken up only a little ahead of what is given out. What goes out: one `Fetched` for
each, with the file or the reason why there is none. Surprise: the file system is the only memory, so it does not matter
when a process dies, or how many URLs there are.

    FOLDER/ab/ab12….         the bytes of the URL whose SHA-256 is ab12…; has this name only once it is whole
    FOLDER/ab/ab12….failed   why there are none: {"url", "reason", "attempts", "permanent", "call"}; delete it to have
                             the URL asked for again
    FOLDER/failures.jsonl    all of these, {"url", "reason", "attempts"} a line, written when a call ends
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio.from_thread import start_blocking_portal

from phi3v_dist.data.importers.transfer import DownloadSettings, Transfers, Verify, partial_path
from phi3v_dist.data.store import shown
from phi3v_dist.errors import DataError

__all__ = ["DownloadSettings", "Downloads", "Fetched"]

_OUR_FOLDER = re.compile("[0-9a-f]{2}")
_NOT_WHOLE = re.compile(r"[0-9a-f]{64}(\.failed|\.partial|\.failed\.partial)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetched:
    """One URL as it was given, and the file with its bytes or the reason why there is none.

    Print `shown(url)`: a URL can hold a password or an escape code. `reason` can be printed as it is.
    """

    url: str
    path: Path | None
    reason: str | None


class Downloads:
    """A folder of downloaded files. `failures` is the list of what could not be had."""

    def __init__(self, folder: Path, settings: DownloadSettings, verify: Verify | None = None):
        """
        Args:
            verify: bytes → what is wrong with them, or None. Runs once for each file, in a few threads; what it
                refuses is not kept and never asked for again.
        """
        self.folder = folder
        self.settings = settings
        self.verify = verify
        self.failures = folder / "failures.jsonl"

    def stream(self, urls: Iterable[str]) -> Iterator[Fetched]:
        """Each URL's file, in the order of `urls`. Ending early ends all transfers.

        Raises:
            DataError: the folder cannot be written to, or another process is downloading into it.
        """
        logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs every URL, passwords included
        with self._alone():
            try:
                yield from self._transfer(urls)
            finally:
                self._tidy()

    def _transfer(self, urls: Iterable[str]) -> Iterator[Fetched]:
        call = uuid.uuid4().hex
        running: dict[str, Future[Fetched]] = {}
        waiting: deque[Fetched | Future[Fetched]] = deque()
        context = Transfers(self.settings, self.verify)
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(context) as transfers:
            try:
                for url in urls:
                    result = running.get(url) or self._known(url, call)
                    if result is None:
                        result = running[url] = portal.start_task_soon(self._fetch, transfers, url, call)
                    waiting.append(result)
                    if len(waiting) >= self.settings.look_ahead:
                        yield _next(waiting, running)
                while waiting:
                    yield _next(waiting, running)
            finally:
                for future in running.values():
                    future.cancel()

    def _known(self, url: str, call: str) -> Fetched | None:
        """What is there already; None: it has to be fetched."""
        path = self._path(url)
        with _storing(self.folder):
            if _has_bytes(path):
                return Fetched(url, path, None)
            failure = _read_failure(_failure_path(path))
        if failure is None:
            return None
        if self.settings.retry_failed and not failure["permanent"] and failure["call"] != call:
            return None
        return Fetched(url, None, failure["reason"])

    async def _fetch(self, transfers: Transfers, url: str, call: str) -> Fetched:
        """Transfer one URL, and store what came of it."""
        path = self._path(url)
        stored = _failure_path(path)
        with _storing(self.folder):
            path.parent.mkdir(exist_ok=True)
            before = _read_failure(stored)
            attempts, failure = await transfers.fetch(url, path)
            if failure is None:
                stored.unlink(missing_ok=True)
                return Fetched(url, path, None)
            attempts += before["attempts"] if before else 0
            record = {"url": shown(url), "reason": failure.reason, "attempts": attempts}
            partial = partial_path(stored)
            partial.write_text(json.dumps(record | {"permanent": failure.permanent, "call": call}))
            partial.replace(stored)
            return Fetched(url, None, failure.reason)

    def _path(self, url: str) -> Path:
        name = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()
        return self.folder / name[:2] / name

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else downloads into the folder meanwhile: two could write to one file."""
        with _storing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{self.folder}: in use by another download; wait for it, or name another") from error
            except OSError as error:
                log.warning("%s: this file system has no locks (%s); let one process at a time in", self.folder, error)
            yield

    def _tidy(self) -> None:
        """Remove what was cut off, and write the list of failures."""
        partial = partial_path(self.failures)
        with _storing(self.folder):
            with partial.open("w") as file:
                for folder in sorted(path for path in self.folder.iterdir() if _OUR_FOLDER.fullmatch(path.name)):
                    for path in sorted(Path(entry) for entry in os.scandir(folder) if _NOT_WHOLE.fullmatch(entry.name)):
                        failure = _read_failure(path)
                        if failure is None or _has_bytes(path.with_suffix("")):
                            path.unlink()
                        else:
                            line = {name: failure[name] for name in ("url", "reason", "attempts")}
                            file.write(json.dumps(line) + "\n")
            partial.replace(self.failures)


@contextmanager
def _storing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder}: cannot keep downloads here: {error}; make room, or name another folder") from error


def _next(waiting: deque[Fetched | Future[Fetched]], running: dict[str, Future[Fetched]]) -> Fetched:
    """The first of those that wait, when it is done."""
    first = waiting.popleft()
    if isinstance(first, Fetched):
        return first
    fetched = first.result()
    running.pop(fetched.url, None)
    return fetched


def _failure_path(path: Path) -> Path:
    return path.with_suffix(".failed")


def _has_bytes(path: Path) -> bool:
    """Whether the file is there; one without bytes is what a power cut can leave."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _read_failure(path: Path) -> dict[str, Any] | None:
    """A stored failure; None when there is none, or nothing that can be read."""
    try:
        return json.loads(path.read_text()) if path.suffix == ".failed" else None
    except (FileNotFoundError, ValueError):
        return None
