"""What a save needs and what the file system has → whether it fits, and how many more will.

In: bytes needed and free, as all ranks see them. Out: a sentence for a person, or none. Surprise: the file system is
asked before the first byte, because a full one answers in the middle of a file, after training has gone on.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FEW = 2  # further checkpoints for which there should be room


@dataclass(frozen=True)
class Room:
    """What one rank needs in a folder, and what it is told is free; bytes. rank: its name and host."""

    rank: str
    folder: Path
    needed_bytes: int
    free_bytes: int


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def shortage(rooms: list[Room]) -> str | None:
    """Why the files of these ranks do not fit into their folder, if so. The rank with least space speaks for all."""
    needed = sum(room.needed_bytes for room in rooms)
    least = min(rooms, key=lambda room: room.free_bytes)
    if needed <= least.free_bytes:
        return None
    return f"{no_space(least.folder, needed, least.free_bytes)} ({least.rank})"


def no_space(folder: Path, needed: int, free: int) -> str:
    return f"no space on {folder}: need {size(needed)}, have {size(free)}"


def num_further(rooms: list[Room], freed_bytes: int) -> int:
    """Checkpoints like this one that fit after it, when old ones of `freed_bytes` are gone."""
    needed = sum(room.needed_bytes for room in rooms)
    left = min(room.free_bytes for room in rooms) - needed + freed_bytes
    return left // needed


def size(num_bytes: int) -> str:
    """As people read it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
