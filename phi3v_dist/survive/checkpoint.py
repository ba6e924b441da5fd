"""A run between two steps ↔ a folder: save, commit, verify, prune, resume at any world size.

In: an engine and the run's position. Out: `step-00000050/` with one file of tensors per rank and a manifest that was
written last. A folder counts once it has that name, and all its files were read back from the disk before it got it.

Surprise: ranks never decide alone. Which step is saved, whether all shares were written and which checkpoint is resumed
is exchanged first, so that one rank's full disk fails the save on every rank and not the job in a collective.
"""

import json
import logging
import platform
import re
import secrets
import shutil
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from phi3v_dist.errors import CheckpointError
from phi3v_dist.parallel.partitions import Partitions
from phi3v_dist.survive import random_state
from phi3v_dist.survive.manifest import (
    FORMAT,
    FORMAT_VERSION,
    TEMPORARY,
    UPGRADE,
    DamagedError,
    commit,
    damage,
    rank_file_name,
    remove,
)
from phi3v_dist.survive.rank_files import TensorReader, write_rank_file

log = logging.getLogger(__name__)

STEP_FOLDER = re.compile(r"step-(\d{8,})(\.replaced)?")
SLOWEST_RANK_TIMEOUT_S = 3600  # how long ranks that have written their share wait for the last one
T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """Everything of a run that is not a tensor.

    step: optimizer steps done.
    loader: state of the data loader, JSON.
    attempt: how often the run was started; config_digest: of the resolved settings.
    seed: of the run; used only to reseed when a checkpoint continues at another world size.
    extra: whatever else has to survive, JSON.
    """

    step: int
    run_id: str
    loader: dict[str, Any]
    attempt: int
    config_digest: str
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of a save, cut loose from the engine: what is written needs nothing else.

    The tensors are views that the next step changes; whoever writes in the background must copy them first.
    """

    step: int
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    manifest: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, in `runs/<name>/checkpoints`. Every method is collective over all ranks."""

    def __init__(self, folder: Path, keep: int):
        """keep: how many checkpoints remain, the newest; at least 1."""
        assert keep >= 1, keep
        self.folder = folder
        self.keep = keep
        self._sound: dict[Path, bool] = {}  # what the last look at every byte found
        self._swept = False
        self._group: Any = None

    def save(self, engine: Any, position: Position) -> Path:
        """Write a checkpoint right after an optimizer step. A CheckpointError leaves the older ones untouched."""
        partitions = Partitions(engine)
        partitions.require_between_steps()
        return self._write_and_commit(_snapshot(partitions, position))

    def newest(self) -> Path | None:
        """The newest checkpoint whose every byte is as it was written. Damaged ones are named and passed over."""
        found = self._everyone(committed(self.folder) if _rank() == 0 else [])[0]
        for path in found:
            problems = self._damage(path)
            if not problems:
                return path
            if _rank() == 0:
                log.warning("checkpoint %s is damaged and passed over: %s", path, "; ".join(problems))
        if found and _rank() == 0:
            log.warning("none of the %d checkpoints in %s can be used", len(found), self.folder)
        return None

    def load(self, engine: Any, path: Path) -> Position:
        """Make the engine continue where `path` was saved, at any world size.

        Call it after data loaders and their iterators exist: the last thing it sets are the random generators.
        """
        problems = [] if self._sound.get(path) else self._damage(path)
        if problems:
            raise DamagedError([f"cannot load {path}: {problem}" for problem in problems])
        reader = TensorReader(path)
        partitions = Partitions(engine)
        settings = reader.manifest["engine"]
        differences = partitions.differences(reader.specs, settings)
        if differences:
            head = f"cannot load {path}: it is of another model. Start from its export instead, or restore the settings"
            raise CheckpointError([head, *differences])
        partitions.restore(reader.specs, settings, reader.read)
        position = Position(**reader.manifest["position"])
        saved_world_size = reader.manifest["world_size"]
        if saved_world_size == _world_size():
            random_state.restore(*reader.random_state(_rank()))
        else:
            random_state.reseed(position.seed, position.step, _rank())
            if _rank() == 0:
                log.info(
                    "%s was saved by %d ranks and continues on %d: random generators reseeded from seed %d and step %d",
                    path,
                    saved_world_size,
                    _world_size(),
                    position.seed,
                    position.step,
                )
        return position

    def _write_and_commit(self, snapshot: Snapshot) -> Path:
        """All write, all learn how it went, rank 0 commits. Needs no engine, so that a thread could do it."""
        plans = self._everyone((snapshot.step, secrets.token_hex(4)))
        assert len({step for step, _ in plans}) == 1, f"ranks save different steps: {[step for step, _ in plans]}"
        final = self.folder / f"step-{snapshot.step:08d}"
        temporary = self.folder / f"{TEMPORARY}{final.name}-{plans[0][1]}"
        if _rank() == 0:
            self._sweep(temporary)
        outcomes = self._everyone(_write_share(temporary, snapshot))
        failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if _rank() == 0:
            if not failures:
                files = {rank_file_name(rank): outcome for rank, outcome in enumerate(outcomes)}
                failures = commit(temporary, final, snapshot.manifest | {"files": files})
            if failures:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                self._prune(final)
        failures = self._everyone(failures)[0]
        if failures:
            head = f"cannot save step {snapshot.step} to {final}; older checkpoints are untouched"
            raise CheckpointError([head, *failures])
        self._sound[final] = True
        return final

    def _damage(self, path: Path) -> list[str]:
        """Every rank hashes its share of the files; all get the same answer."""
        shares = self._everyone(damage(path, _rank(), _world_size()))
        problems = list(dict.fromkeys(problem for share in shares for problem in share))
        self._sound[path] = not problems
        return problems

    def _sweep(self, keep: Path) -> None:
        """Remove what killed saves left. Only who writes does this: export looks for checkpoints beside a live run."""
        if not self._swept and self.folder.is_dir():
            for leftover in self.folder.glob(f"{TEMPORARY}*"):
                if leftover != keep:
                    shutil.rmtree(leftover, ignore_errors=True)
        self._swept = True

    def _prune(self, saved: Path) -> None:
        """Keep the one just saved and the newest others up to `keep`; a damaged one does not count as kept."""
        num_kept = 1
        for path in committed(self.folder):
            if path == saved:
                continue
            if num_kept >= self.keep:
                remove(path)
            elif self._sound.get(path, True) and _is_whole(path):
                num_kept += 1

    def _everyone(self, value: T) -> list[T]:
        """Every rank's value, on every rank. Over gloo, apart from training's own collectives."""
        if _world_size() == 1:
            return [value]
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SLOWEST_RANK_TIMEOUT_S))
        values: list[Any] = [None] * _world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def committed(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first; one that was being replaced comes after the one that replaces it."""
    folders = folder.iterdir() if folder.is_dir() else []
    found = [(match, path) for path in folders if (match := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda item: (-int(item[0][1]), bool(item[0][2])))]


def read_tensors(path: Path) -> TensorReader:
    """Open a checkpoint for export or evaluation: one process, no engine. Every byte is checked first."""
    problems = damage(path)
    if problems:
        raise DamagedError([f"cannot read {path}: {problem}" for problem in problems])
    return TensorReader(path)


def _snapshot(partitions: Partitions, position: Position) -> Snapshot:
    random_tensors, random_numbers = random_state.capture()
    tensors = {f"random/{device}": state for device, state in random_tensors.items()}
    pieces = list(partitions.pieces())
    for piece in pieces:
        tensors |= {f"{state}/{piece.name}": elements for state, elements in piece.states.items()}
    metadata = {
        "format": f"{FORMAT}, version {FORMAT_VERSION}",
        "step": str(position.step),
        "rank": str(_rank()),
        "pieces": json.dumps({piece.name: [piece.start, piece.length] for piece in pieces}),
        "random": json.dumps(random_numbers),
    }
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "upgrade": UPGRADE,
        "step": position.step,
        "attempt": position.attempt,
        "world_size": _world_size(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "deepspeed")},
        "position": asdict(position),
        "engine": partitions.settings(),
        "aliases": partitions.aliases(),
        "tensors": {name: asdict(spec) for name, spec in partitions.specs().items()},
    }
    try:
        json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot save step {position.step}: position or schedule is not JSON: {error}") from error
    return Snapshot(position.step, tensors, metadata, manifest)


def _write_share(temporary: Path, snapshot: Snapshot) -> dict[str, Any] | str:
    """The manifest's entry of this rank's file, or why there is none."""
    path = temporary / rank_file_name(_rank())
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        return write_rank_file(path, snapshot.tensors, snapshot.metadata)
    except OSError as error:
        return f"rank {_rank()} on {platform.node()}, writing {path}: {error}"


def _is_whole(path: Path) -> bool:
    """Sizes only: a quick look before older checkpoints are removed."""
    try:
        TensorReader(path)
    except CheckpointError:
        return False
    return True


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
