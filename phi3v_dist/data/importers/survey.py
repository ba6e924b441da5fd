"""Records → columns of numbers on disk: which are good, how large they are, and what they are equal to.

What comes in: the source. What goes out: `Survey`, files of 1,000 records each, from which splits and shards are
planned. Surprise: the pictures are looked at here and read again when shards are written. Nothing of a record stays in
memory, so an import is as large as the disk allows; an interrupted one goes on at the first file that is missing.

Survey format 1 (`survey-000000.safetensors`): one entry per record in `is_good`, `file`, `content_hash`, `split_hash`
(0 without a split key), `size_bytes` (of its members), `num_pictures`, `tokens_4`, `tokens_16`; one per picture in
`picture_hash`, `width`, `height`. The metadata's `bad` is a list of [record number, kind, reason].
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from phi3v_dist.data.importers.packing import Packed
from phi3v_dist.data.importers.records import BadRecord

RECORDS_PER_FILE = 1000
RECORD_DTYPES = {
    "is_good": np.uint8, "file": np.int32, "content_hash": np.uint64, "split_hash": np.uint64, "size_bytes": np.int64,
    "num_pictures": np.int32, "tokens_4": np.int32, "tokens_16": np.int32,
}  # fmt: skip
PICTURE_DTYPES = {"picture_hash": np.uint64, "width": np.int32, "height": np.int32}


@dataclass(frozen=True)
class Verdict:
    """What was found about one record. file: number of the source's file it is in."""

    number: int
    file: int
    split_hash: int
    packed: Packed | BadRecord


class Survey:
    """The stored verdicts of an import, in record order. Records are numbered from 0."""

    def __init__(self, folder: Path):
        self.folder = folder

    def num_done(self) -> int:
        """Records that are looked at already: whole files only."""
        count = 0
        while self._path(count).exists():
            count += 1
        return int(sum(len(self.column("is_good", number)) for number in range(count)))

    def write(self, verdicts: list[Verdict]) -> None:
        """The next file, whole or not at all."""
        rows: dict[str, list[int]] = {name: [] for name in (*RECORD_DTYPES, *PICTURE_DTYPES)}
        bad = []
        for verdict in verdicts:
            packed = verdict.packed
            is_good = isinstance(packed, Packed)
            sizes = [len(data) for data in packed.members.values()] if isinstance(packed, Packed) else []
            values = (
                is_good,
                verdict.file,
                packed.content_hash if isinstance(packed, Packed) else 0,
                verdict.split_hash,
            )
            if isinstance(packed, Packed):
                numbers = (sum(sizes), len(packed.sizes_wh), *packed.tokens)
                rows["picture_hash"] += packed.picture_hashes
                rows["width"] += [width for width, _ in packed.sizes_wh]
                rows["height"] += [height for _, height in packed.sizes_wh]
            else:
                numbers = (0, 0, 0, 0)
                bad.append([verdict.number, packed.kind, packed.reason])
            for name, value in zip(RECORD_DTYPES, (*values, *numbers), strict=True):
                rows[name].append(value)
        dtypes = RECORD_DTYPES | PICTURE_DTYPES
        columns = {name: np.array(values, dtypes[name]) for name, values in rows.items()}
        path = self._path(verdicts[0].number // RECORDS_PER_FILE)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(save(columns, {"bad": json.dumps(bad)}))
        partial.rename(path)

    def delete(self) -> None:
        """Forget every verdict."""
        for path in self.folder.glob("survey-*.safetensors"):
            path.unlink()

    def column(self, name: str, file: int | None = None) -> np.ndarray:
        """One column, of one survey file or of all records."""
        if file is not None:
            with safe_open(self._path(file), framework="numpy") as stored:
                return stored.get_tensor(name)
        dtype = (RECORD_DTYPES | PICTURE_DTYPES)[name]
        return np.concatenate([np.empty(0, dtype), *(self.column(name, number) for number in range(self._num_files()))])

    def bad(self) -> Iterator[tuple[int, str, str]]:
        """(record number, kind, reason) of every bad record."""
        for number in range(self._num_files()):
            with safe_open(self._path(number), framework="numpy") as stored:
                yield from (tuple(entry) for entry in json.loads(stored.metadata()["bad"]))

    def _num_files(self) -> int:
        return sum(1 for _ in self.folder.glob("survey-*.safetensors"))

    def _path(self, number: int) -> Path:
        return self.folder / f"survey-{number:06d}.safetensors"


def store(verdicts: Iterator[Verdict], survey: Survey, progress: Callable[[int], None]) -> None:
    """Write verdicts file by file. progress: told the number of the last record looked at, plus one."""
    waiting: list[Verdict] = []
    for verdict in verdicts:
        waiting.append(verdict)
        progress(verdict.number + 1)
        if len(waiting) == RECORDS_PER_FILE:
            survey.write(waiting)
            waiting = []
    if waiting:
        survey.write(waiting)
