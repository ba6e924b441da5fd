"""Columns of numbers stored beside a tar: what is known about a shard, so that nobody has to read it again.

What comes in: a tar's address and a suffix; what goes out: the columns of `x.tar.<suffix>` and its metadata. Surprise:
nothing here is ever wrong for long. A file that is damaged or belongs to another tar counts as missing, so whoever
asked makes it again. Where the tar's folder is read-only or remote it lies in the user's cache, in one folder per
folder of shards.
"""

import contextlib
import json
import mmap
import os
import uuid
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from phi3v_dist.data import store
from phi3v_dist.errors import DataError

ENDINGS = (".safetensors", ".partial")  # of every file written here: `*` in a shard pattern does not mean them
DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64}  # of safetensors; those written here
MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit

Columns = dict[str, np.ndarray]


def load_sidecar(address: str, suffix: str, fits: Mapping[str, str]) -> tuple[Columns, dict[str, str]] | None:
    """The stored columns and metadata whose metadata has all of `fits`; None when there is no such file."""
    for folder in folders(os.path.dirname(address)):
        try:
            with safe_open(f"{folder}/{store.name_of(address)}.{suffix}", framework="numpy") as file:
                metadata = file.metadata() or {}
                if fits.items() <= metadata.items():
                    return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # not there, not ours to read, or damaged
    return None


def save_sidecar(address: str, suffix: str, columns: Columns, metadata: dict[str, str]) -> Path:
    """Write the columns so that a reader, on any node, sees the whole file or none. Returns where.

    Raises:
        DataError: neither the tar's folder nor the cache takes it.
    """
    path = _to_write(address, suffix)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(columns, metadata))
        if os.path.isfile(address) and os.path.dirname(address) == os.path.dirname(path):
            # Whoever may read the tar may read its index.
            partial.chmod(os.stat(address).st_mode & 0o666)
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DataError(f"{path}: cannot be written ({error}). Make room there, or set XDG_CACHE_HOME") from error
    return path


def fetch_sidecar(address: str, suffix: str) -> None:
    """Copy the sidecar that lies beside a remote tar, if there is one, to where `load_sidecar` looks."""
    stem, query, words = address.partition("?")
    beside = f"{stem}.{suffix}{query}{words}" if address.startswith("http") else f"{address}.{suffix}"
    path = _to_write(address, suffix)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        store.download(beside, partial, store.size(beside))
        partial.rename(path)
    except (FileNotFoundError, store.StoreError):
        return  # an address signed for the tar alone is refused here
    finally:
        partial.unlink(missing_ok=True)


def map_sidecar(address: str, suffix: str) -> tuple[Columns, dict[str, str]] | None:
    """As `load_sidecar`, but the columns stay on the disk: read-only views, which processes of a node share."""
    for folder in folders(os.path.dirname(address)):
        try:
            with open(f"{folder}/{store.name_of(address)}.{suffix}", "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            begin = 8 + int.from_bytes(data[:8], "little")
            if begin > min(MAX_HEADER_BYTES, len(data)):
                continue
            header = json.loads(data[8:begin])
            metadata = header.pop("__metadata__", {})
            columns = {}
            for name, about in header.items():
                first, end = about["data_offsets"]
                dtype = np.dtype(DTYPES[about["dtype"]])
                columns[name] = np.frombuffer(data, dtype, (end - first) // dtype.itemsize, begin + first)
            return columns, metadata
        except (OSError, ValueError, LookupError, TypeError):
            continue  # not there, not ours to read, or damaged
    return None


def folders(folder: str) -> list[str]:
    """Where the sidecars of a folder's tars may lie, the nearest first."""
    return [*([] if store.is_remote(folder) else [folder or "."]), _cache_folder(folder)]


def _to_write(address: str, suffix: str) -> Path:
    folder = os.path.dirname(address)
    beside = not store.is_remote(address) and os.access(folder or ".", os.W_OK)
    return Path(folder if beside else _cache_folder(folder)) / f"{store.name_of(address)}.{suffix}"


def _cache_folder(folder: str) -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return f"{home}/phi3v_dist/{_folder_name(folder)}"


@lru_cache(maxsize=64)
def _folder_name(folder: str) -> str:
    whole = store.shown(folder) if store.is_remote(folder) else os.path.realpath(folder)
    return xxhash.xxh3_64_hexdigest(os.fsencode(whole))
