"""Drafts → the bytes of their pictures, many at a time, in order.

What comes in: drafts, and `Downloads` for those of their pictures that are URLs. What goes out: each draft's stored
pictures, or a `BadRecord`. Surprise: one stream of downloads runs through all drafts, so a slow server holds back only
what comes after it; drafts without URLs never wait in memory for it, since the stream is begun again after so many.
"""

import itertools
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from phi3v_dist.data.importers.conversation import Draft, Reference
from phi3v_dist.data.importers.download import Downloads, Fetched
from phi3v_dist.data.importers.records import BadRecord
from phi3v_dist.data.store import shown

WITHOUT_URLS_AT_ONCE = 64
MAX_PICTURE_BYTES = 1 << 28
URL = re.compile(r"https?://", re.IGNORECASE)
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Candidate(NamedTuple):
    """A record on its way. number: in the source, from 0; file: of the source's files."""

    number: int
    file: int
    draft: Draft | BadRecord

    def urls(self) -> list[str]:
        """Of its pictures, those that have to be downloaded."""
        references = self.draft.pictures if isinstance(self.draft, Draft) else ()
        return [reference for reference in references if isinstance(reference, str) and URL.match(reference)]


def with_downloads(
    candidates: Iterable[Candidate], downloads: Downloads
) -> Iterator[tuple[Candidate, tuple[Fetched, ...]]]:
    """Each candidate with what its URLs gave, in order."""
    source = iter(candidates)
    waiting: deque[Candidate] = deque()
    limit = 2 * downloads.settings.look_ahead

    def urls() -> Iterator[str]:
        for candidate in tuple(waiting):
            yield from candidate.urls()
        while len(waiting) < limit and (following := next(source, None)):
            waiting.append(following)
            yield from following.urls()

    while first := tuple(itertools.islice(source, WITHOUT_URLS_AT_ONCE)):
        waiting.extend(first)
        fetched: tuple[Fetched, ...] = ()
        for answer in downloads.stream(urls()) if any(candidate.urls() for candidate in waiting) else ():
            while not waiting[0].urls():
                yield waiting.popleft(), ()
            fetched += (answer,)
            if len(fetched) == len(waiting[0].urls()):
                yield waiting.popleft(), fetched
                fetched = ()
        while waiting:
            yield waiting.popleft(), ()


def read_pictures(references: Iterable[Reference], fetched: Iterable[Fetched], folder: Path) -> list[bytes]:
    """The pictures as stored, wherever they are. Raises BadRecord: one is not there, or was not to be had."""
    answers = iter(fetched)
    pictures = []
    for reference in references:
        if isinstance(reference, bytes):
            pictures.append(reference)
        elif URL.match(reference):
            answer = next(answers)
            if answer.path is None:
                raise BadRecord("download", f"{shown(reference)}: {answer.reason}")
            pictures.append(answer.path.read_bytes())
        else:
            pictures.append(_read_file(reference, folder))
    return pictures


def _read_file(reference: str, folder: Path) -> bytes:
    if SCHEME.match(reference):
        raise BadRecord("no such picture", f"{shown(reference)}: pictures are fetched by http and https only")
    try:
        path = _found(folder, reference)
        if not path.is_file():
            raise BadRecord("no such picture", f"{path}: no such file; relative paths begin in image_root")
        if path.stat().st_size > MAX_PICTURE_BYTES:
            raise BadRecord("picture unreadable", f"{path}: {path.stat().st_size:,} bytes are too large for a picture")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord("no such picture", f"{str(folder / reference)!r}: {error}") from error


def _found(folder: Path, reference: str) -> Path:
    """The file of that name, also when the table was typed on another system: `\\` for `/`, accents in one piece."""
    spellings = dict.fromkeys((reference, reference.replace("\\", "/")))
    names = [*spellings, *(unicodedata.normalize(form, name) for name in spellings for form in ("NFC", "NFD"))]
    return next((folder / name for name in names if (folder / name).is_file()), folder / reference)


def ordered_map(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], look_ahead: int
) -> Iterator[Result]:
    """`pool.map` that takes only so many items ahead (Python's own does from 3.14 on)."""
    running: deque = deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) > look_ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
