"""What every source gives: its records, one after another, as plain fields.

What comes in: nothing until somebody iterates. What goes out: rows, each a dict of columns, or a `BadRecord` that says
what is wrong with it. Surprise: a source is read twice, once to look at every record and once to write the good ones,
so it must give the same rows in the same order each time; its digest says whether it still would.
"""

import codecs
import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from phi3v_dist.errors import DataError

PIECE_BYTES = 1 << 20
FIRST_BYTES = 64  # in which UTF-16 shows


class BadRecord(ValueError):
    """One record that cannot be a sample. kind: two or three words, by which the report counts it."""

    def __init__(self, kind: str, reason: str):
        self.kind, self.reason = kind, reason
        super().__init__(reason)


Row = dict[str, Any] | BadRecord


@dataclass(frozen=True)
class Source:
    """Where records come from.

    files: what it is made of, for people; a row's file is a number in this list.
    folder: that relative paths of pictures begin in.
    digest: of the contents; another one when the rows may be others.
    num_records: where it is known without reading them all.
    read: (file number, row) of every record.
    """

    files: tuple[str, ...]
    folder: Path
    digest: str
    num_records: int | None
    read: Callable[[], Iterator[tuple[int, Row]]]

    @classmethod
    def of_files(
        cls, files: list[Path], read_file: Callable[[Path], Iterator[Row]], num_records: int | None = None
    ) -> "Source":
        """Files of one kind, one after another; pictures are looked for beside the first."""

        def read() -> Iterator[tuple[int, Row]]:
            for number, file in enumerate(files):
                for row in read_file(file):
                    yield number, row

        return cls(tuple(map(str, files)), files[0].parent, digest_of(files), num_records, read)


def digest_of(files: Iterable[Path]) -> str:
    """Of the names and all bytes of some files: any edit is noticed, what was copied is the same."""
    digest = xxhash.xxh3_64()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size} ".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()


def open_text(path: Path) -> io.TextIOWrapper:
    """A text file, gzipped or not. Bytes that are no UTF-8 come as lone surrogates, so that one line stays one.

    Raises:
        DataError: it cannot be unpacked, or is UTF-16.
    """
    binary: Any = (gzip.open if path.suffix == ".gz" else open)(path, "rb")
    try:
        first = binary.peek(FIRST_BYTES)[:FIRST_BYTES]
    except (OSError, EOFError) as error:
        binary.close()
        raise damaged(path, error) from error
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in first:
        binary.close()
        raise DataError(f"{path}: is UTF-16, or no text at all; save it as UTF-8")
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")


def refuse_surrogates(text: str) -> None:
    """Raises BadRecord when a text of `open_text` was no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("not UTF-8", f"byte {ord(text[error.start]) & 0xFF:#04x} is no UTF-8") from error


def damaged(path: Path, error: Exception, where: str = "") -> DataError:
    """For a file that cannot be read to its end."""
    return DataError(f"{path}: cannot be read{where} ({type(error).__name__}: {error})")
