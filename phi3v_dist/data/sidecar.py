"""Columns of numbers stored beside a tar: what is known about a shard, so that nobody has to read it again.

What comes in: a tar's path and a suffix; what goes out: the columns of `x.tar.<suffix>` and its metadata. Surprise:
nothing here is ever wrong for long. A file that is damaged or belongs to another tar counts as missing, so whoever
asked makes it again; where the tar's folder is read-only it lies in the user's cache.
"""

import contextlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from phi3v_dist.errors import DataError

ENDINGS = (".safetensors", ".partial")  # of every file written here: `*` in a shard pattern does not mean them

Columns = dict[str, np.ndarray]


def load_sidecar(tar: Path, suffix: str, fits: Mapping[str, str]) -> tuple[Columns, dict[str, str]] | None:
    """The stored columns and metadata whose metadata has all of `fits`; None when there is no such file."""
    for place in (_beside, _cached):
        try:
            with safe_open(place(tar, suffix), framework="numpy") as file:
                metadata = file.metadata() or {}
                if fits.items() <= metadata.items():
                    return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # not there, not ours to read, or damaged
    return None


def save_sidecar(tar: Path, suffix: str, columns: Columns, metadata: dict[str, str]) -> None:
    """Write the columns so that a reader, on any node, sees the whole file or none.

    Raises:
        DataError: neither the tar's folder nor the cache takes it.
    """
    path = (_beside if os.access(tar.parent, os.W_OK) else _cached)(tar, suffix)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(columns, metadata))
        partial.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DataError(f"{path}: cannot be written ({error}). Make room there, or set XDG_CACHE_HOME") from error


def _beside(tar: Path, suffix: str) -> Path:
    return tar.with_name(f"{tar.name}.{suffix}")


def _cached(tar: Path, suffix: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3v_dist"
    return cache / f"{xxhash.xxh3_64_hexdigest(os.fsencode(tar.resolve()))}-{tar.name}.{suffix}"
