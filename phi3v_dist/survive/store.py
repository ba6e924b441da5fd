"""Where checkpoints are kept: in one folder that all ranks see, or in one on each node's own disk.

In: a folder and an attempt's number. Out: a `Store`: who makes and commits folders there, which of a checkpoint's files
a rank must find there, and whether a checkpoint found there can be used. Surprise: which ranks share a folder is found
by looking for each other's marks in it, not by host names. No rank ever asks about a folder that another one sees.
"""

import itertools
import logging
import secrets
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from phi3v_dist.errors import CheckpointError
from phi3v_dist.survive.agreement import Ranks
from phi3v_dist.survive.fence import TEMPORARY, Fence
from phi3v_dist.survive.manifest import checksum, damage, rank_file_name, read_manifest
from phi3v_dist.survive.retention import committed, superfluous
from phi3v_dist.survive.started import Started

log = logging.getLogger(__name__)

KEPT_ON_NODES = 1  # a node's disk may be small, or memory; older ones are in the run folder


class Store:
    """A folder that all ranks of the job see.

    keep, keep_also: which checkpoints remain. sound: what the last look at every byte of one found.
    groups: the ranks, by the folder that they see; the first of each makes, commits and removes what is in it.
    """

    is_shared = True
    unusable = "is damaged"
    advice = "Free some, or lower `checkpoint.keep`"

    def __init__(self, fence: Fence, ranks: Ranks, keep: int, keep_also: Callable[[], Collection[Path]] = tuple):
        self.fence = fence
        self.keep = keep
        self.keep_also = keep_also
        self.sound: dict[Path, bool] = {}
        self.groups: list[list[int]] = []
        self._ranks = ranks

    @property
    def folder(self) -> Path:
        return self.fence.checkpoints

    @property
    def is_main(self) -> bool:
        return any(group[0] == self._ranks.rank for group in self.groups)

    def claim(self) -> None:
        """Shut older attempts out, and see that every rank can write. Collective.

        Raises:
            FencedError: a newer attempt than this one has started.
            CheckpointError: the folder cannot be written to.
        """
        self.groups = self._meet()
        self._ranks.agreed(lambda: self.fence.claim() if self.is_main else None)
        self._ranks.agreed(lambda: self.fence.try_writing(self._ranks.rank))

    def found(self) -> list[str]:
        """Names of what may be a checkpoint, the same on all ranks. Collective."""
        return self._ranks.first([path.name for path in committed(self.folder)] if self._ranks.is_main else [])

    def required(self) -> list[str] | None:
        """Files of a checkpoint that this rank must find; None: all of them."""
        return None

    def problems(self, path: Path, started: Started | None) -> list[str]:
        """Why a checkpoint cannot be used, the same on all ranks; empty if it can. Every byte is looked at."""
        shares = self._ranks.everyone(damage(path, self._ranks.rank, self._ranks.world_size))
        problems = list(dict.fromkeys(itertools.chain(*shares)))
        self.sound[path] = not problems
        return problems

    def superfluous(self, saved: Path) -> list[Path]:
        """What may go now that this one is committed, oldest first."""
        return superfluous(saved, self.keep, self.keep_also(), self.sound)

    def tidy(self) -> None:
        """Remove what was kept for a save that did not come, such as the best one before the last."""
        try:
            newest = committed(self.folder)[:1] if self.is_main else []
            for path in [path for saved in newest for path in self.superfluous(saved)]:
                self.fence.remove(path)
        except OSError as error:
            log.warning("older checkpoints than the newest in %s are not removed: %s", self.folder, error)

    def _meet(self) -> list[list[int]]:
        return [list(range(self._ranks.world_size))]


class NodeStore(Store):
    """A folder on each node's own disk: in it, files of the ranks that run there, and a manifest that names all files.

    What lies there counts only for ranks that run where they ran when it was saved, and on the line of the last start.
    """

    is_shared = False
    unusable = "does not count"
    advice = "The next save goes to the run folder"

    def __init__(self, folder: Path, attempt: int, ranks: Ranks):
        super().__init__(Fence(folder, attempt, setting="checkpoint.local"), ranks, KEPT_ON_NODES)

    def found(self) -> list[str]:
        here = [path.name for path in committed(self.folder)]
        return list(dict.fromkeys(itertools.chain(*self._ranks.everyone(here))))

    def required(self) -> list[str] | None:
        return [rank_file_name(self._ranks.rank)]

    def problems(self, path: Path, started: Started | None) -> list[str]:
        manifest, ours = self._look(path, started)
        everyones = self._ranks.everyone((manifest and checksum(manifest), ours))
        problems = list(dict.fromkeys(itertools.chain(*(theirs for _, theirs in everyones))))
        if not problems and len({their_checksum for their_checksum, _ in everyones}) > 1:
            problems = ["nodes have different ones of this step"]
        self.sound[path] = not problems
        return problems

    def remove(self, but: Path | None) -> None:
        """All copies on this node but one: that which training goes on from, say."""
        if self.is_main:
            for path in committed(self.folder):
                if path != but:
                    self.fence.remove(path)

    def clear(self) -> None:
        """All copies and folders on this node. What cannot be removed costs only space."""
        self.remove(but=None)
        if self.is_main:
            for folder in (self.fence.folder, self.folder, self.folder.parent):
                try:
                    folder.rmdir()
                except OSError as error:
                    log.warning("%s is left on %s: %s", folder, self._ranks.name, error)
                    return

    def _look(self, path: Path, started: Started | None) -> tuple[dict[str, Any] | None, list[str]]:
        """What this rank has of a checkpoint, and what is wrong with that."""
        if not path.exists():
            return None, [f"{self._ranks.name} has none where it runs now"]
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            return None, [f"{self._ranks.name}: {problem}" for problem in error.problems]
        world_size = self._ranks.world_size
        if manifest["world_size"] != world_size:
            return manifest, [f"{manifest['world_size']} ranks saved it on their nodes, and now there are {world_size}"]
        if started is None or not started.goes_through(manifest):
            return manifest, [f"attempt {manifest['attempt']} made it, but {started or 'nothing says what came then'}"]
        return manifest, [f"{self._ranks.name}: {problem}" for problem in damage(path, names=self.required())]

    def _meet(self) -> list[list[int]]:
        """Each rank leaves a mark, and looks whose marks it sees."""
        prefix = f"{TEMPORARY}{self._ranks.first(secrets.token_hex(4))}-"
        mark = self.folder / f"{prefix}{self._ranks.rank}"
        self._ranks.agreed(lambda: self.fence.leave(mark))
        marks = self.folder.glob(f"{prefix}*")
        seen = self._ranks.everyone(sorted(int(path.name.removeprefix(prefix)) for path in marks))
        groups = sorted(set(map(tuple, seen)))
        if sorted(itertools.chain(*groups)) != list(range(self._ranks.world_size)):
            raise CheckpointError(
                f"{self.folder} is no folder on each node's own disk: ranks see {groups} of each other"
            )
        return [list(group) for group in groups]
