"""JSON and JSON Lines → rows. Each record is an object; its keys are the columns.

Surprise: a `.json` file is one list that may be larger than memory, so it is decoded record by record from a window of
text that moves along. Damage inside it ends the import, since nobody can say where the next record begins; a damaged
line of a `.jsonl` is one bad record.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3v_dist.data.importers.records import BadRecord, Row, damaged, open_text, refuse_surrogates
from phi3v_dist.errors import DataError

WINDOW_CHARACTERS = 1 << 20
MAX_RECORD_CHARACTERS = 1 << 26  # more is taken for damage, lest all that follows it be read into memory
_BETWEEN = re.compile(r"[\s,]*")


def read_json_lines(path: Path) -> Iterator[Row]:
    """One object a line; empty lines are skipped."""
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    refuse_surrogates(line)
                    yield _object(json.loads(line), f"line {number}")
                except BadRecord as bad:
                    yield BadRecord(bad.kind, f"line {number}: {bad.reason}" if bad.kind == "not UTF-8" else bad.reason)
                except (ValueError, RecursionError) as error:
                    yield BadRecord("broken JSON", f"line {number}: {error}")
        except (OSError, EOFError) as error:
            raise damaged(path, error) from error


def read_json_list(path: Path) -> Iterator[Row]:
    """The objects of one list. Raises DataError: it is something else, or damaged."""
    decoder = json.JSONDecoder()
    with open_text(path) as file:
        try:
            text = file.read(WINDOW_CHARACTERS).lstrip()
            if not text.startswith("["):
                raise DataError(f"{path}: {_not_a_list(text)}")
            position, number = 1, 0
            while not text.startswith("]", position := _BETWEEN.match(text, position).end()):  # type: ignore[union-attr]
                is_whole, problem = False, "it ends before its list is closed by `]`, so it may be cut off"
                if position < len(text):
                    try:
                        value, end = decoder.raw_decode(text, position)
                        is_whole = end < len(text) or not isinstance(value, int | float)  # else digits may follow
                    except (json.JSONDecodeError, RecursionError) as error:
                        problem = getattr(error, "msg", str(error))
                if not is_whole:
                    rest = text[position:]
                    more = file.read(max(WINDOW_CHARACTERS, len(rest))) if len(rest) < MAX_RECORD_CHARACTERS else ""
                    if not more:
                        raise DataError(f"{path}: damaged after its record {number}: {problem}")
                    text, position = rest + more, 0
                    continue
                position, number = end, number + 1
                yield _checked(value, number)
        except (OSError, EOFError) as error:
            raise damaged(path, error) from error


def _checked(value: Any, number: int) -> Row:
    try:
        refuse_surrogates(json.dumps(value, ensure_ascii=False))
        return _object(value, f"record {number}")
    except BadRecord as bad:
        return bad


def _not_a_list(text: str) -> str:
    if not text:
        return "is empty; a .json file holds a list of records"
    if text.startswith("{"):
        return "holds an object, not a list of records. One object a line? Then name it .jsonl"
    return f"begins with {text[:20]!r}; a .json file holds a list of records, [{{…}}, …]"


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord("not an object", f"{where} is a {type(value).__name__}, not an object with fields")
    return value
