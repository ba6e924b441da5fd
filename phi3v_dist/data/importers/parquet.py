"""Parquet files → rows, a few at a time, however large a row group is.

Surprise: files of the Hugging Face hub say in their schema which whole numbers are classes; those columns give the
class's name, since a template wants words.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from phi3v_dist.data.importers.records import Row, damaged

ROWS_AT_ONCE = 16


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of one file. Raises DataError: it is damaged, or no Parquet."""
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = class_names(file.schema_arrow)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
                for row in batch.to_pylist():
                    yield {column: names[column](value) if column in names else value for column, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error) from error


def count_rows(path: Path) -> int:
    """Rows of a file, from its footer. Raises DataError as `read_parquet`."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error) from error


def class_names(schema: pyarrow.Schema) -> dict[str, Callable[[Any], Any]]:
    """Column → (number of a class → its name), of a schema as `datasets` writes it."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import ClassLabel, Features  # heavy, and only files of the hub need it

    labels = {name: kind for name, kind in Features.from_arrow_schema(schema).items() if isinstance(kind, ClassLabel)}
    return {name: partial(_class_name, kind) for name, kind in labels.items()}


def _class_name(kind: Any, number: Any) -> Any:
    return kind.int2str(number) if isinstance(number, int) and 0 <= number < kind.num_classes else number
