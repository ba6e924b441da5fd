"""Records → columns of numbers on disk: which are good, how large they are, and what they are equal to.

What comes in: the source. What goes out: `Survey`, files of 1,000 records each, from which splits and shards are
planned. Surprise: the pictures are looked at here and read again when shards are written. Nothing of a record stays in
memory, so an import is as large as the disk allows; an interrupted one goes on at the first file that is missing.

Survey format 1 (`survey-000000.safetensors`): one entry per record in `is_good`, `file`, `content_hash`, `split_hash`
(0 without a split key), `size_bytes` (of its members), `num_pictures`, `tokens_4`, `tokens_16`; one per picture in
`picture_hash`, `width`, `height`. The metadata's `bad` is a list of [record number, kind, reason].
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """What was found about one record, without its pictures: a thousand of these wait to be written.

    record, pictures: values of the columns, the latter one tuple a picture.
    bad: why it is no sample.
    """

    number: int
    record: tuple[int, ...]
    pictures: tuple[tuple[int, int, int], ...]
    bad: BadRecord | None

    @classmethod
    def of(cls, number: int, file: int, split_hash: int, packed: Packed | BadRecord) -> "Verdict":
        """file: number of the source's file that the record is in."""
        if isinstance(packed, BadRecord):
            return cls(number, (0, file, 0, split_hash, 0, 0, 0, 0), (), packed)
        pictures = tuple((hash_, *size) for hash_, size in zip(packed.picture_hashes, packed.sizes_wh, strict=True))
        size_bytes = sum(map(len, packed.members.values()))
        record = (1, file, packed.content_hash, split_hash, size_bytes, len(pictures), *packed.tokens)
        return cls(number, record, pictures, None)


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
        bad = [[verdict.number, verdict.bad.kind, verdict.bad.reason] for verdict in verdicts if verdict.bad]
        columns = _columns(RECORD_DTYPES, [verdict.record for verdict in verdicts])
        columns |= _columns(PICTURE_DTYPES, [picture for verdict in verdicts for picture in verdict.pictures])
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


def _columns(dtypes: Mapping[str, type], rows: Sequence[tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[i] for row in rows], dtype) for i, (name, dtype) in enumerate(dtypes.items())}


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
