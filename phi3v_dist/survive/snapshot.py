"""An engine between two steps → one rank's share of a checkpoint, cut loose from everything that the next step changes.

In: the engine's partitions and the run's position. Out: a `Snapshot` in host memory, which a thread can write while
training goes on. Surprise: nearly all the time of a first copy goes into page faults of new memory, so the memory is
taken and touched once, before the first save, and used again by every one.
"""

import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from phi3v_dist.errors import CheckpointError
from phi3v_dist.memory import lock_pages, unlock_pages
from phi3v_dist.parallel.partitions import Partitions, Piece
from phi3v_dist.survive import random_state
from phi3v_dist.survive.manifest import FORMAT, FORMAT_VERSION, UPGRADE

ADAM = ("exp_avg", "exp_avg_sq")  # which there will be, one value for each weight, from the first step on
ALIGNED_BYTES = 64


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
    """What one rank writes; it needs nothing else.

    tensors: key in the rank's file → flat tensor in host memory, valid until the next snapshot is taken.
    metadata: of the rank's file. manifest: a call, so that its making does not hold up training; all but `files`.
    """

    step: int
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    manifest: Callable[[], dict[str, Any]]


class HostMemory:
    """One block of host memory, taken once, with a place for every tensor of a rank's share."""

    def __init__(self) -> None:
        self._places: dict[str, Tensor] = {}
        self._memory: Tensor | None = None
        self._pinned = False

    def reserve(self, tensors: dict[str, Tensor]) -> None:
        """Have a place for each of these. Does nothing when there is; touches every page when there is not."""
        if all(_alike(self._places.get(key), tensor) for key, tensor in tensors.items()):
            return
        sizes = {key: -(-tensor.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES for key, tensor in tensors.items()}
        self._release()
        self._memory = torch.empty(sum(sizes.values()), dtype=torch.uint8).zero_()
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._pinned = lock_pages(self._memory)
        begin = 0
        for key, tensor in tensors.items():
            self._places[key] = self._memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            begin += sizes[key]

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same values in this memory; complete when it returns."""
        self.reserve(tensors)
        with torch.no_grad():
            for key, tensor in tensors.items():
                self._places[key].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {key: self._places[key] for key in tensors}

    def _release(self) -> None:
        if self._memory is not None and self._pinned:
            unlock_pages(self._memory)
        self._places, self._memory, self._pinned = {}, None, False


def take(partitions: Partitions, position: Position, memory: HostMemory, rank: int, world_size: int) -> Snapshot:
    """Copy this rank's share. Raises CheckpointError when the position or the schedule is not JSON."""
    random_tensors, random_numbers = random_state.capture()
    pieces = list(partitions.pieces())
    tensors = {f"random/{device}": state for device, state in random_tensors.items()} | _states(pieces)
    now = {"position": asdict(position), "engine": partitions.settings()}
    try:
        now = json.loads(json.dumps(now, allow_nan=False))  # also a copy, which no later step changes
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot save step {position.step}: position or schedule is not JSON: {error}") from error
    specs, aliases = partitions.specs(), partitions.aliases()
    metadata = {
        "format": f"{FORMAT}, version {FORMAT_VERSION}",
        "step": str(position.step),
        "rank": str(rank),
        "pieces": json.dumps({piece.name: [piece.start, piece.length] for piece in pieces}),
        "random": json.dumps(random_numbers),
    }

    def manifest() -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "upgrade": UPGRADE,
            "step": position.step,
            "attempt": position.attempt,
            "world_size": world_size,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "deepspeed")},
            "aliases": aliases,
            "tensors": {name: asdict(spec) for name, spec in specs.items()},
        } | now

    return Snapshot(position.step, memory.copy(tensors), metadata, manifest)


def prepare(partitions: Partitions, memory: HostMemory) -> None:
    """Take the memory that snapshots of this engine will need, those after the first step included."""
    pieces = list(partitions.pieces())
    states = _states(pieces)
    trained = {name for name, spec in partitions.specs().items() if spec.role == "trained"}
    for piece in pieces:
        if partitions.has_optimizer and piece.name in trained and set(piece.states) == {"weight"}:
            states |= {f"{state}/{piece.name}": piece.states["weight"] for state in ADAM}
    random_tensors, _ = random_state.capture()
    memory.reserve({f"random/{device}": state for device, state in random_tensors.items()} | states)


def _states(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    return {f"{state}/{piece.name}": elements for piece in pieces for state, elements in piece.states.items()}


def _alike(place: Tensor | None, tensor: Tensor) -> bool:
    return place is not None and (place.shape, place.dtype) == (tensor.shape, tensor.dtype)
