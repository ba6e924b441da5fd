"""Bytes of a checkpoint: one rank's pieces → a safetensors file, and the files of all ranks → whole tensors.

In: this rank's pieces, or the path of a committed checkpoint. Out: a file that was read back from the disk before it
counts as written, or any part of any tensor, assembled from the pieces of all ranks.

Surprise: nothing here knows DeepSpeed or a process group, so that export and evaluation read a checkpoint of any world
size in one process.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phi3v_dist.errors import CheckpointError
from phi3v_dist.parallel.partitions import TensorSpec
from phi3v_dist.survive.durable import fsync_folder, no_links
from phi3v_dist.survive.manifest import (
    DamagedError,
    files_that_matter,
    hash_file,
    rank_file_name,
    read_manifest,
    wrong_sizes,
)
from phi3v_dist.survive.tensor_file import Specs, blocks, header
from phi3v_dist.watch import heartbeat

FLUSH_BYTES = 64 * 2**20  # written between two flushes: what is not yet on the disk then never takes long to get there


def require_finite(key: str, tensor: Tensor) -> None:
    """Raises CheckpointError. A sum is not finite if a value is not, and costs a fraction of looking at each."""
    if tensor.is_floating_point() and not math.isfinite(tensor.sum()):
        num_bad = tensor.numel() - int(tensor.isfinite().sum())
        if num_bad:
            raise CheckpointError(f"{num_bad} of {tensor.numel()} values of {key} are not finite")


def write_rank_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    on_tensor: Callable[[str, Tensor], None] = lambda key, tensor: None,
    on_block: Callable[[int], None] = lambda num_bytes: None,
    on_flush: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write, flush to the disk, read back; returns the manifest's entry.

    on_tensor: sees each tensor before it is written, and may refuse it.
    on_block: told after each block, written or read back, how many bytes it had, and after each flush between (0).
    on_flush: called once all is written, before the last flush: nothing is heard while the disk works.

    Raises:
        OSError: the disk is full or broken.
    """

    def seen(key: str) -> Tensor:
        on_tensor(key, tensors[key])
        return tensors[key]

    digest, num_unflushed = xxhash.xxh3_128(), 0
    with open(path, "xb", opener=no_links) as file:
        for block in blocks(_specs(tensors), seen, metadata):
            file.write(block)
            digest.update(block)
            on_block(len(block))
            num_unflushed += len(block)
            if num_unflushed >= FLUSH_BYTES:
                file.flush()
                os.fdatasync(file.fileno())
                num_unflushed = 0
                on_block(0)
        on_flush()
        file.flush()
        os.fsync(file.fileno())
        # Forget the cached pages: what is read back then comes from the disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    entry = {"size_bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}
    if hash_file(path, on_block) != entry["xxh3_128"]:
        raise OSError(errno.EIO, "the disk returned other bytes than were written", str(path))
    fsync_folder(path.parent)
    return entry


def rank_file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """How large `write_rank_file` will make it."""
    return len(header(_specs(tensors), metadata)) + sum(tensor.nbytes for tensor in tensors.values())


def _specs(tensors: Mapping[str, Tensor]) -> Specs:
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


class TensorReader:
    """The tensors of a committed checkpoint, read when asked for: of every rank, in any process, without an engine.

    names: files to read, where others are not here; None: all.
    """

    def __init__(self, path: Path, names: Collection[str] | None = None):
        self.path = path
        self.manifest = read_manifest(path)
        self._names = files_that_matter(self.manifest, names)
        sizes = wrong_sizes(path, self._names)
        if sizes:
            raise DamagedError([f"{path / problem}" for problem in sizes])
        self.specs = {
            name: TensorSpec(**spec | {"shape": tuple(spec["shape"])})
            for name, spec in self.manifest["tensors"].items()
        }
        self.aliases: dict[str, str] = self.manifest["aliases"]

    @property
    def names(self) -> list[str]:
        """Official names, in the model's order; a tied tensor comes once, its other names are in `aliases`."""
        return list(self.specs)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """As stored, float32 for masters; the type of computation for frozen tensors, which are not stored."""
        return {name: spec.dtypes["weight"] for name, spec in self.specs.items()}

    def get(self, name: str, state: str = "weight") -> Tensor:
        """A whole tensor on the CPU, fp32 if it is a floating one; `state` may name an optimizer state."""
        tensor = self.stored(name, state)
        return tensor.float() if tensor.is_floating_point() else tensor

    def stored(self, name: str, state: str = "weight") -> Tensor:
        """As `get`, in the type in which it is stored."""
        name = self.aliases.get(name, name)
        return self.read(name, state, 0, self.specs[name].numel).view(self.specs[name].shape)

    def read(self, name: str, state: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened tensor, from however many ranks wrote them."""
        heartbeat.beat(name)
        elements = torch.empty(length, dtype=getattr(torch, self.specs[name].dtypes[state]))
        num_found = 0
        for file, piece_start, piece_length in self._pieces.get(name, []):
            begin, end = max(start, piece_start), min(start + length, piece_start + piece_length)
            if begin < end:
                stored = self._open(file).get_slice(f"{state}/{name}")
                elements[begin - start : end - start] = stored[begin - piece_start : end - piece_start]
                num_found += end - begin
        if num_found != length:
            where = f"elements {start} to {start + length} of {state}/{name}"
            raise DamagedError(f"{self.path}: {num_found} of {length} found for {where}: use another checkpoint")
        return elements

    def random_state(self, rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `random_state.capture` returned on that rank."""
        file = self._open(rank_file_name(rank))
        keys, prefix = file.keys(), "random/"
        tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}
        return tensors, json.loads(file.metadata()["random"])

    @cached_property
    def _pieces(self) -> dict[str, list[tuple[str, int, int]]]:
        """Tensor name → (file, start, length) of every piece that is not empty."""
        pieces: dict[str, list[tuple[str, int, int]]] = {name: [] for name in self.specs}
        for file in self._names:
            for name, (start, length) in json.loads(self._open(file).metadata()["pieces"]).items():
                if length:
                    pieces[name].append((file, start, length))
        return pieces

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    def _open(self, name: str) -> Any:
        """Mapped into memory on first use and kept: a page is read when one of its elements is."""
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.path / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise DamagedError(f"{self.path / name} cannot be read: {error}") from error
        return self._files[name]
