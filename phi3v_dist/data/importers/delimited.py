"""CSV and TSV → rows. The first line names the columns; every value is text, as it stands.

Surprise: a row with more or fewer fields than the header is bad, not filled up: the fields after the slip would all be
in the wrong columns. Rows without a single word, which spreadsheets leave below the last one, are empty lines.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from phi3v_dist.data.importers.records import BadRecord, Row, damaged, open_text, refuse_surrogates
from phi3v_dist.errors import DataError

MAX_FIELD_CHARACTERS = 1 << 24
DELIMITERS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
OF_ITS_QUOTES = ("unexpected end of data", "field larger than")  # how `csv.Error` begins when a quote is never closed


def read_delimited(path: Path) -> Iterator[Row]:
    """Rows of a comma-, semicolon- or (`.tsv`) tab-separated file.

    Raises:
        DataError: it has no usable header, or opens a quote and never closes it, so that all the rest is one field.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with open_text(path) as file:
        try:
            first = file.readline()
            file.seek(0)
            semicolons = "," not in first and ";" in first
            delimiter = "\t" if ".tsv" in path.suffixes else ";" if semicolons else ","
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            header = _header(path, next(lines, []), delimiter)
        except (csv.Error, OSError, EOFError) as error:
            raise damaged(path, error, ", not even its header") from error
        while True:
            begin = lines.line_num + 1
            try:
                values = next(lines)
                if any(value.strip() for value in values):  # else an empty line
                    yield _row(header, values, lines.line_num)
            except StopIteration:
                return
            except csv.Error as error:
                if str(error).startswith(OF_ITS_QUOTES):
                    raise _unclosed(path, begin, lines.line_num) from error
                yield BadRecord("broken row", f"line {lines.line_num}: {error}")
            except BadRecord as bad:
                yield bad
            except (OSError, EOFError) as error:
                raise damaged(path, error, f" after line {lines.line_num}") from error


def _unclosed(path: Path, begin: int, end: int) -> DataError:
    return DataError(
        f"{path}: line {begin} opens a quote that is never closed, up to line {end}, where reading "
        'stopped; correct it (a quote inside a quoted field is written "")'
    )


def _header(path: Path, names: list[str], delimiter: str) -> list[str]:
    if not any(name.strip() for name in names):
        raise DataError(f"{path}: is empty; its first line should name the columns")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: its first line names {', '.join(map(repr, twice))} more than once")
    if len(names) == 1 and (others := [kind for mark, kind in DELIMITERS.items() if mark in names[0]]):
        raise DataError(
            f"{path}: its first line is one column, {names[0][:80]!r}, when cut at {DELIMITERS[delimiter]}; it "
            f"seems to use {' and '.join(others)}. Columns are cut at commas or semicolons, and in .tsv files at tabs"
        )
    return names


def _row(header: list[str], values: list[str], line: int) -> Row:
    if len(values) != len(header):
        raise BadRecord("broken row", f"line {line} has {len(values)} fields, the header has {len(header)}")
    for value in values:
        refuse_surrogates(value)
    return dict(zip(header, values, strict=True))
