"""Data sets of Hugging Face → rows: folders of `save_to_disk`, and names of the hub.

Surprise: pictures are never decoded by `datasets`; Image columns give the stored bytes. A data set of the hub is
streamed into Parquet parts under the import's own folder, and read from there. An interrupted copy keeps its whole
parts; the stream itself is read again from its beginning, since it can only skip rows: the network carries those twice.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from phi3v_dist.data.importers.parquet import class_names, count_rows, read_parquet
from phi3v_dist.data.importers.records import Row, Source, digest_of
from phi3v_dist.errors import DataError

ROWS_PER_PART = 512
BYTES_PER_PART = 64 << 20  # of stored pictures and text; whichever comes first, as a part is in memory
SAVED_MARKS = ("dataset_dict.json", "state.json")
REACHING = (OSError, ValueError, RuntimeError, LookupError, ImportError, NotImplementedError)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / mark).is_file() for mark in SAVED_MARKS)


def open_saved(folder: Path, split: str) -> Source:
    """A folder of `save_to_disk`. Raises DataError: it is damaged, or has no such split."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (*REACHING, pyarrow.ArrowException) as error:
        raise DataError(f"{folder}: is no data set of `save_to_disk` that can be read ({error})") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{folder}: has no split {split!r} but {', '.join(saved)}; choose one by dataset_split=…")
        saved = saved[split]
    rows = _stored_pictures(saved)
    names = class_names(rows.features.arrow_schema)

    def read() -> Iterator[tuple[int, Row]]:
        for row in rows:
            yield 0, {name: names[name](value) if name in names else value for name, value in row.items()}

    digest = f"{saved._fingerprint}-{digest_of(Path(file['filename']) for file in saved.cache_files)}"
    return Source((str(folder),), folder, digest, len(rows), read)


def open_hub(
    name: str, config: str | None, split: str, revision: str | None, parts: Path, progress: Callable[[int], None]
) -> Source:
    """A data set of the hub, copied into `parts` as it streams.

    Args:
        progress: told how many records are copied.

    Raises:
        DataError: the hub cannot be reached, or has no such data set or split.
    """
    parts.mkdir(parents=True, exist_ok=True)
    finished = parts / "complete"
    if not finished.exists():
        stored = sorted(parts.glob("part-*.parquet"))
        done = sum(map(count_rows, stored))
        try:
            _copy(name, config, split, revision, parts, len(stored), done, progress)
        except (*REACHING, pyarrow.ArrowException) as error:
            raise DataError(
                f"{name}: no such file or folder here, and as a data set of the Hugging Face hub it cannot be read "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            ) from error
        finished.touch()
    files = sorted(parts.glob("part-*.parquet"))
    if not files:
        raise DataError(f"{name}: its split {split!r} is empty")
    source = Source.of_files(files, read_parquet, sum(map(count_rows, files)))
    return Source((name,), parts, source.digest, source.num_records, lambda: ((0, row) for _, row in source.read()))


def _copy(
    name: str, config: str | None, split: str, revision: str | None, parts: Path, number: int, done: int,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    import datasets

    stream = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    rows = iter(_stored_pictures(stream).skip(done))
    schema = stream.features.arrow_schema if stream.features else None
    while chunk := _next_part(rows):
        path = parts / f"part-{number:06d}.parquet"
        partial = path.with_name(f"{path.name}.partial")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chunk, schema=schema), partial)
        partial.rename(path)
        number, done = number + 1, done + len(chunk)
        progress(done)


def _next_part(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    chunk, num_bytes = [], 0
    for row in itertools.islice(rows, ROWS_PER_PART):
        chunk.append(row)
        num_bytes += _num_bytes(row)
        if num_bytes >= BYTES_PER_PART:
            break
    return chunk


def _num_bytes(value: Any) -> int:
    """Of what can be large."""
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_num_bytes, value))
    return len(value) if isinstance(value, str | bytes) else 0


def _stored_pictures(rows: Any) -> Any:
    """The same rows, Image columns as {"bytes", "path"}."""
    import datasets

    for name, kind in (rows.features or {}).items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(kind, datasets.List) and isinstance(kind.feature, datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows
