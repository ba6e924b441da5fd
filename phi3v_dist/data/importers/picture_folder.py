"""A folder of pictures → rows `file_name`, `text` (of x.txt beside x.jpg) and `label` (the name of the subfolder).

With a `metadata.csv` or `metadata.jsonl` in it, its rows are the records instead, and `file_name` is their picture.
Surprise: names are sorted folder by folder, so the order is the same everywhere, and only one folder's names are in
memory. A picture or caption with another time counts as edited: folders are too large to hash whole.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import xxhash

from phi3v_dist.data.importers.delimited import read_delimited
from phi3v_dist.data.importers.json_records import read_json_lines
from phi3v_dist.data.importers.records import Row, Source
from phi3v_dist.data.pictures import IMAGE_SUFFIXES

METADATA = {"metadata.csv": read_delimited, "metadata.jsonl": read_json_lines}


def open_picture_folder(folder: Path) -> Source | None:
    """The folder as a source; None when there is no picture in it."""
    for name, read_file in METADATA.items():
        if (folder / name).is_file():
            table = Source.of_files([folder / name], read_file)
            return replace(table, digest=f"{table.digest}-{_state(folder)[0]}")
    digest, num_pictures = _state(folder)
    if not num_pictures:
        return None

    def read() -> Iterator[tuple[int, Row]]:
        for path in _pictures(folder):
            row = {"file_name": str(path.relative_to(folder)), "label": path.parent.name}
            caption = _caption(path)
            yield 0, row | ({"text": _words(caption)} if caption.is_file() else {})

    return Source((str(folder),), folder, digest, num_pictures, read)


def _pictures(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.rsplit(".", 1)[-1].lower() in IMAGE_SUFFIXES:
                yield Path(parent, name)


def _caption(picture: Path) -> Path:
    return picture.with_suffix(".txt")


def _state(folder: Path) -> tuple[str, int]:
    """(digest of the names, sizes and times of the pictures and of their captions, number of pictures)."""
    digest, num_pictures = xxhash.xxh3_64(), 0
    for picture in _pictures(folder):
        num_pictures += 1
        for path in (picture, _caption(picture)):
            if path.is_file():
                found = path.stat()
                name = os.fsencode(path.relative_to(folder))
                digest.update(name + f"\0{found.st_size} {found.st_mtime_ns} ".encode())
    return digest.hexdigest(), num_pictures


def _words(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig", errors="surrogateescape").strip()
