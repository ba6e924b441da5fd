"""The number of an attempt → the only folder in which it may prepare or remove checkpoints.

    checkpoints/.attempt-0004/step-00000050/    being written by attempt 4
    checkpoints/.attempt-0004/removed-…         being removed by it
    checkpoints/.attempt-0004/held-…            being renamed by it

In: the run's checkpoint folder and an attempt's number. Out: a folder of its own, from which a rename commits. A newer
attempt takes the folders of older ones away when it starts.

Surprise: no lock is asked. A rank that wakes up after its job was replaced finds that the folder it writes in is gone,
so its rename, the one thing that could commit or remove a checkpoint, fails by itself, on any file system.
"""

import contextlib
import getpass
import logging
import os
import re
import secrets
import shutil
from pathlib import Path

from phi3v_dist.errors import CheckpointError
from phi3v_dist.survive.durable import fsync_folder, write_durably

log = logging.getLogger(__name__)

ATTEMPT_FOLDER = re.compile(r"\.attempt-(\d{4,})")
HELD = "held-"  # begins the name of a checkpoint on its way to another name
TEMPORARY = ".tmp-"  # begins the name of what older releases left


class FencedError(CheckpointError):
    """A newer attempt of this run has started: this one must stop."""


def newest(checkpoints: Path) -> int:
    """Number of the newest attempt that has claimed a folder of checkpoints, 0 without one."""
    found = map(ATTEMPT_FOLDER.fullmatch, (path.name for path in checkpoints.glob(".attempt-*")))
    return max((int(match[1]) for match in found if match), default=0)


class Fence:
    """The checkpoint folder as one attempt sees it."""

    def __init__(self, checkpoints: Path, attempt: int, setting: str = "run.root"):
        """setting: where a person says which folder it is."""
        self.checkpoints = checkpoints
        self.setting = setting
        self.attempt = attempt
        self.folder = checkpoints / f".attempt-{attempt:04d}"

    def claim(self) -> None:
        """Rank 0, once, at the start: make our folder, take away those of older attempts, and what they left.

        Raises:
            FencedError: a newer attempt is there.
            CheckpointError: nothing can be written here.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            linked = [path for path in (self.checkpoints, self.folder) if path.is_symlink()]
            if linked:
                raise CheckpointError(f"{linked[0]} is a link, and links are not followed: put the folder itself there")
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(self._cannot_write(error)) from error
        self.require_newest()
        for path in self.checkpoints.iterdir():
            older = ATTEMPT_FOLDER.fullmatch(path.name) and path != self.folder
            if older or path.name.startswith(TEMPORARY):
                self.remove(path)
            if older and os.path.lexists(path):
                raise CheckpointError(f"{path} cannot be taken away, so an earlier job could still commit: remove it")
        self._bring_back(self.folder)
        for leftover in self.folder.iterdir():
            shutil.rmtree(leftover, ignore_errors=True)

    def try_writing(self, rank: int) -> None:
        """A byte now, rather than a failed save after hours. Raises CheckpointError."""
        probe = self.folder / f"probe-{rank}"
        try:
            with probe.open("xb") as file:
                file.write(b"0")
                file.flush()
                os.fsync(file.fileno())
            probe.unlink()
        except OSError as error:
            raise CheckpointError(self._cannot_write(error)) from error

    def leave(self, mark: Path) -> None:
        """An empty folder beside the checkpoints, for other ranks to see; `claim` sweeps it. Raises CheckpointError."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            mark.mkdir()
        except OSError as error:
            raise CheckpointError(self._cannot_write(error)) from error

    def publish(self, name: str, text: str) -> None:
        """A small file beside the checkpoints, whole or not at all, by way of our own folder. Raises OSError, also when
        a newer attempt has taken that away."""
        ours = self.folder / name
        write_durably(ours, text)
        os.replace(ours, self.checkpoints / name)
        fsync_folder(self.checkpoints)

    def withdraw(self, name: str) -> None:
        """Take such a file away again. Raises OSError, as `publish`."""
        ours = self.folder / name
        os.replace(self.checkpoints / name, ours)
        ours.unlink()

    def newer(self) -> int | None:
        """The newest attempt, if that is not this one."""
        number = newest(self.checkpoints)
        return number if number > self.attempt else None

    def require_newest(self) -> None:
        newest = self.newer()
        if newest is not None:
            raise FencedError(self.stopped_by(newest))

    def stopped_by(self, newest: int) -> str:
        return (
            f"attempt {newest} of this run has taken over {self.checkpoints}, so attempt {self.attempt} may not write "
            "there any more: stop this job; nothing of the newer one was touched"
        )

    def remove(self, path: Path) -> None:
        """Take the name away first, so that half a checkpoint never passes for a whole one. Failing costs only space,
        and fails when a newer attempt has started."""
        if not os.path.lexists(path):
            return
        try:
            doomed = self.folder / f"removed-{path.name.lstrip('.')}-{secrets.token_hex(4)}"
            os.rename(path, doomed)
            if ATTEMPT_FOLDER.fullmatch(path.name):
                self._bring_back(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("%s could not be removed: %s", path, error)

    def rename(self, path: Path, target: Path) -> None:
        """Give a checkpoint another name, by way of our own folder: an attempt that was replaced while it slept cannot
        take it from the newer one. Raises OSError."""
        held = self.folder / f"{HELD}{target.name}"
        os.rename(path, held)
        try:
            os.rename(held, target)
        except OSError:
            with contextlib.suppress(OSError):
                os.rename(held, path)
            raise

    def _bring_back(self, folder: Path) -> None:
        """What an attempt held when it died goes where it was on its way to."""
        for held in list(folder.rglob(f"{HELD}*")):
            target = self.checkpoints / held.name.removeprefix(HELD)
            if not os.path.lexists(target):
                os.rename(held, target)

    def _cannot_write(self, error: OSError) -> str:
        user = getpass.getuser() if os.geteuid() else "root"
        where = f"user {user} cannot write to {self.checkpoints}"
        return f"{where}: {error}. Mend that, or set `{self.setting}` to another place"
