"""Shard patterns → addresses: `{000..127}` names every number, `*` what is there.

What comes in: the `shards` of a source. What goes out: addresses in a fixed order, and a message for each pattern that
names nothing. Surprise: each local folder is listed once, whatever is asked about it. With 100,000 shards a look at
every file by itself, and again at its index, is what would take the time.
"""

import contextlib
import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # missing in its stub

from phi3v_dist.data import store
from phi3v_dist.data.index import INDEX_SUFFIX
from phi3v_dist.data.sidecar import ENDINGS, folders
from phi3v_dist.errors import DataError

INDEX_ENDING = f".{INDEX_SUFFIX}"
MAX_NAMED = 50  # missing shards that one message lists


class Listings:
    """Names in local folders, each folder read once."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[list[str], set[str]]] = {}
        self._known: dict[str, set[str]] = {}

    def files(self, folder: str) -> list[str]:
        """Files that may be shards, sorted; empty when the folder cannot be listed."""
        return self._list(folder)[0]

    def has(self, folder: str, name: str) -> bool:
        if folder not in self._known:
            self._known[folder] = set(self.files(folder))
        return name in self._known[folder]

    def indexed(self, folder: str) -> set[str]:
        """Names of the tars that have an index, beside them or in the user's cache."""
        return set().union(*(self._list(place)[1] for place in folders(folder)))

    def all_indexed(self) -> bool:
        """Whether every file listed so far that may be a shard has an index."""
        return all(set(files) <= self.indexed(folder) for folder, (files, _) in list(self._read.items()))

    def _list(self, folder: str) -> tuple[list[str], set[str]]:
        if folder not in self._read:
            files: list[str] = []
            indexed: set[str] = set()
            with _scan(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.endswith(".safetensors"):
                        if name.endswith(INDEX_ENDING):
                            indexed.add(name[: -len(INDEX_ENDING)])
                    elif not name.endswith(ENDINGS) and not entry.is_dir():
                        files.append(name)
            self._read[folder] = sorted(files), indexed
        return self._read[folder]


def expand(patterns: Sequence[str], listings: Listings | None = None) -> tuple[list[str], list[str]]:
    """Patterns → (addresses, problems). Local ones exist; whether remote ones do, only their store can say."""
    listings = listings or Listings()
    found: list[str] = []
    problems: list[str] = []
    for pattern in patterns:
        if problem := store.problem(pattern):
            problems.append(f"data: {problem}")
            continue
        missing: list[str] = []
        num_names = 0
        for name in expand_braces(pattern):
            num_names += 1
            try:
                matches = _remote(name) if store.is_remote(name) else _local(name, listings)
            except DataError as error:
                problems += [f"data: {problem}" for problem in error.problems]
                num_names = 0
                break
            found += matches
            missing += [] if matches else [name]
        else:
            if missing or not num_names:
                problems.append(missing_message(pattern, missing, num_names))
    repeated = [name for name, count in Counter(found).items() if count > 1] if len(set(found)) < len(found) else []
    problems += [
        f"data: {store.shown(name)}: named more than once by one source; correct `shards`" for name in repeated
    ]
    return found, problems


def missing_message(pattern: str, missing: Sequence[str], num_names: int) -> str:
    """What to say about shards that a pattern names and that are not there."""
    what = "no such shard" if num_names == len(missing) else f"{len(missing)} of {num_names} shards missing"
    names = ", ".join(map(store.shown, missing[:MAX_NAMED])) + ", …" * (len(missing) > MAX_NAMED)
    which = f" ({names})" if list(missing) not in ([], [pattern]) else ""
    return f"data: {store.shown(pattern)}: {what}{which}; correct `shards`, or put the files there"


def _local(name: str, listings: Listings) -> list[str]:
    folder, base = os.path.split(name)
    if not glob.has_magic(name) or listings.has(folder, base):
        return [name] if listings.has(folder, base) or not base.endswith(ENDINGS) and os.path.isfile(name) else []
    matches = re.compile(fnmatch.translate(base)).match
    hidden = base.startswith(".")
    found: list[str] = []
    for place in sorted(glob.glob(folder)) if glob.has_magic(folder) else [folder]:
        begin = os.path.join(place, "")
        names = (file for file in listings.files(place) if matches(file))
        found += [begin + file for file in names if hidden or not file.startswith(".")]
    return found


def _remote(name: str) -> list[str]:
    is_pattern = "*" in name if name.startswith("http") else glob.has_magic(name)
    if not is_pattern:
        return [name]
    return [match for match in store.glob(name) if not match.endswith(ENDINGS)]


def expand_braces(pattern: str) -> list[str]:
    """Expand braces as bash and webdataset do: `{000..127}`, `{9..1..2}`, `{a..d}`, `{a,b{1..2}}`.

    A name with unbalanced braces stays as it is, and a backslash has no special meaning: both may be part of a file's
    name.
    """
    try:
        return list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError:
        return [pattern]


@contextlib.contextmanager
def _scan(folder: str) -> Iterator[Iterable[os.DirEntry[str]]]:
    """`os.scandir`; a folder that cannot be listed counts as empty."""
    try:
        entries = os.scandir(folder or ".")
    except OSError:
        yield ()
        return
    with entries:
        yield entries
