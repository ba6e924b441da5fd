"""The checkpoints in a folder → which of them stay.

In: a folder, and which checkpoint was just verified. Out: those to remove, oldest first. Surprise: a damaged one does
not count as kept, so the number kept is of checkpoints that can be used.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from phi3v_dist.errors import CheckpointError
from phi3v_dist.survive.best_file import best_checkpoint
from phi3v_dist.survive.rank_files import TensorReader

SET_ASIDE = "damaged-"  # begins the name of a checkpoint that a run passed over; kept for a person to look at
STEP_FOLDER = re.compile(r"step-(\d{8,})(\.replaced)?")


def committed(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first; one that was being replaced comes after the one that replaces it."""
    return _newest_first(folder, "")


def set_aside(folder: Path) -> list[Path]:
    """Checkpoints that were passed over and renamed, newest first."""
    return _newest_first(folder, SET_ASIDE)


def newest_first(name: str) -> tuple[int, bool]:
    """What to sort names of checkpoints by."""
    match = STEP_FOLDER.fullmatch(name)
    assert match, name
    return -int(match[1]), bool(match[2])


def _newest_first(folder: Path, prefix: str) -> list[Path]:
    folders = [path for path in folder.iterdir() if path.name.startswith(prefix)] if folder.is_dir() else []
    found = [path for path in folders if STEP_FOLDER.fullmatch(path.name.removeprefix(prefix))]
    return sorted(found, key=lambda path: newest_first(path.name.removeprefix(prefix)))


def step_of(path: Path) -> int | None:
    """The step a checkpoint's name says; None if it has another name."""
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def superfluous(saved: Path, keep: int, keep_also: Collection[Path], sound: Mapping[Path, bool]) -> list[Path]:
    """What may go now that `saved` has been read back: all but it, the newest others up to `keep`, `keep_also`, the
    best one and the newest that was set aside.

    sound: what is known of some after a look at every byte; of the others only sizes are looked at.
    """
    best = best_checkpoint(saved.parent)
    pinned = {path.resolve() for path in [*keep_also, *([best] if best else [])]}
    num_kept, found = 1, []
    for path in committed(saved.parent):
        if path == saved or path.resolve() in pinned:
            continue
        if num_kept >= keep:
            found.append(path)
        elif sound.get(path, True) and _is_whole(path):
            num_kept += 1
    return [*set_aside(saved.parent)[1:], *found][::-1]


def size_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.iterdir())


def _is_whole(path: Path) -> bool:
    try:
        TensorReader(path)
    except CheckpointError:
        return False
    return True
