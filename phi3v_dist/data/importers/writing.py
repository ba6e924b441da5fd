"""Samples and their assignment → tar shards, each under its name only once it is whole.

Surprise: a shard that has its name is not written again, so an interrupted import continues at the shards that are
missing, and the result is the same to the last byte.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from phi3v_dist.data.importers.assignment import Assignment


def key_of(record: int) -> str:
    """A sample's key: the number of its record in the source, counted from 1."""
    return f"{record + 1:09d}"


def missing_shards(out: Path, assignment: Assignment) -> set[int]:
    """Numbers of the shards that are still to be written."""
    return {number for number, name in enumerate(assignment.names) if not (out / name).exists()}


def write_shards(out: Path, assignment: Assignment, samples: Iterable[tuple[int, dict[str, bytes]]]) -> None:
    """Write samples, (record number, members) in record order, into one open tar per split."""
    open_shards: dict[str, tuple[int, ExitStack, Any]] = {}
    with ExitStack() as everything:
        for record, members in samples:
            shard = int(assignment.shard[record])
            split = assignment.split_of(shard)
            if split not in open_shards or open_shards[split][0] != shard:
                _finish(out, assignment, open_shards.pop(split, None))
                files = everything.enter_context(ExitStack())
                file = files.enter_context(_partial(out, assignment, shard).open("wb"))
                writer = files.enter_context(
                    TarWriter(file, encoder=False, mtime=0)
                )  # its clock would change every byte
                open_shards[split] = (shard, files, writer)
            writer = open_shards[split][2]
            writer.write({"__key__": key_of(record), **members})
            writer.tarstream.members.clear()  # tarfile would remember every member it wrote
        for finished in open_shards.values():
            _finish(out, assignment, finished)


def _finish(out: Path, assignment: Assignment, opened: tuple[int, ExitStack, Any] | None) -> None:
    if opened:
        shard, files, _ = opened
        files.close()
        _partial(out, assignment, shard).rename(out / assignment.names[shard])


def _partial(out: Path, assignment: Assignment, shard: int) -> Path:
    return out / f"{assignment.names[shard]}.partial"
