"""A path, a pattern or a name of the hub → a `Source`, by what is found there.

Surprise: a folder is looked at before anything is guessed. One that `save_to_disk` wrote, one of Parquet files and one
of pictures are three kinds of source; shards are none, since they train as they are.
"""

import glob
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from phi3v_dist.data.importers import hugging_face
from phi3v_dist.data.importers.delimited import read_delimited
from phi3v_dist.data.importers.json_records import read_json_lines, read_json_list
from phi3v_dist.data.importers.parquet import count_rows, read_parquet
from phi3v_dist.data.importers.picture_folder import open_picture_folder
from phi3v_dist.data.importers.records import Row, Source
from phi3v_dist.data.importers.settings import ImportSettings
from phi3v_dist.errors import DataError
from phi3v_dist.invocation import as_typed

READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": read_delimited, ".tsv": read_delimited, ".json": read_json_list, ".jsonl": read_json_lines,
    ".ndjson": read_json_lines, ".parquet": read_parquet,
}  # fmt: skip
PACKED = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")  # may be gzipped
SPLIT_IN_NAME = re.compile(r"(train|validation|valid|val|dev|test)[-_.]")
HUB_NAME = re.compile(r"(hf:)?([\w.-]+/[\w.-]+)")


def open_source(
    name: str, settings: ImportSettings, parts: Path, progress: Callable[[int], None] = lambda done: None
) -> Source:
    """The source of that name.

    Args:
        parts: folder for what has to be copied before it can be read twice (data sets of the hub).
        progress: told how many records are copied.

    Raises:
        DataError: nothing is there, it is empty or damaged, or it is of no known kind.
    """
    path = Path(name)
    if path.is_dir():
        return _open_folder(path, settings)
    files = [path] if path.is_file() else [Path(found) for found in sorted(glob.glob(name))]
    if files:
        return _open_files(files)
    if match := HUB_NAME.fullmatch(name):
        config, split, revision = settings.dataset_config, settings.dataset_split, settings.dataset_revision
        return hugging_face.open_hub(match.group(2), config, split, revision, parts, progress)
    raise DataError(f"{name}: no such file or folder")


def _open_folder(folder: Path, settings: ImportSettings) -> Source:
    if hugging_face.is_saved(folder):
        return hugging_face.open_saved(folder, settings.dataset_split)
    if files := sorted(folder.rglob("*.parquet")):
        return _open_files(_of_split(folder, files, settings.dataset_split))
    if source := open_picture_folder(folder):
        return source
    if any(folder.glob("*.tar")):
        raise DataError(
            f"{folder}: holds tar shards, which need no import: they train as they are. Index and look at them with "
            f"`{as_typed('python launch/prepare.py')} index '{folder}/*.tar'`"
        )
    if tables := sorted(path.name for path in folder.iterdir() if _kind(path) in READERS):
        raise DataError(
            f"{folder}: name the file to import, or a pattern such as '{folder}/*.jsonl' (it has {tables[0]})"
        )
    raise DataError(f"{folder}: holds no pictures, no Parquet files and no saved data set")


def _open_files(files: list[Path]) -> Source:
    kinds = {_kind(path) for path in files}
    if len(kinds) > 1:
        raise DataError(f"{files[0]} and {len(files) - 1} more: files of several kinds ({', '.join(sorted(kinds))})")
    kind = kinds.pop()
    if kind not in READERS:
        raise DataError(
            f"{files[0]}: unknown kind of file {kind!r}; known are {', '.join(READERS)} (text may be gzipped), folders "
            "of pictures, and data sets of Hugging Face"
        )
    if empty := [path for path in files if not path.stat().st_size]:
        raise DataError(f"{empty[0]}: is an empty file")
    return Source.of_files(files, READERS[kind], sum(map(count_rows, files)) if kind == ".parquet" else None)


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Files of one split, where their names tell; all of them where they do not."""
    named = {path: match.group(1) for path in files if (match := SPLIT_IN_NAME.match(path.name))}
    if len(named) < len(files):
        return files
    chosen = [path for path in files if named[path] == split]
    if not chosen:
        found = ", ".join(sorted(set(named.values())))
        raise DataError(f"{folder}: has no split {split!r} but {found}; choose one by dataset_split=…")
    return chosen


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and len(suffixes) > 1 and suffixes[-2] in PACKED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""
