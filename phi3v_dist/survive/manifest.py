"""What makes a folder a checkpoint: a manifest that names and hashes every file, and the rename that commits it.

In: a folder of rank files and what rank 0 knows about them. Out: a committed checkpoint, or the list of what is wrong
with one. The format is described in docs/checkpoint-format.md.

Surprise: nothing is unpickled anywhere, so a file from elsewhere may hold wrong numbers but never code; the hash finds
accidents, it is no defence against a forger.
"""

import errno
import json
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import xxhash

from phi3v_dist.errors import CheckpointError
from phi3v_dist.progress import BYTES, show_progress, summed
from phi3v_dist.survive.durable import fsync_folder, no_links, write_durably
from phi3v_dist.survive.fence import Fence
from phi3v_dist.survive.tensor_file import BLOCK_BYTES
from phi3v_dist.watch import heartbeat

FORMAT = "phi3v-dist checkpoint"
FORMAT_VERSION = 2
UPGRADE = (
    "Version 1 also held frozen weights; there is no program that converts one: export it with the release that wrote "
    "it and begin from the export (`model.init_from`). A reader that finds a version it does not know must refuse."
)
MANIFEST = "manifest.json"
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")


LOOKS, BETWEEN_LOOKS_S = 3, 1.0  # a file system that answers once with an error may only be busy
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # answers that another look does not change


class DamagedError(CheckpointError):
    """This checkpoint cannot be trusted; an older one may be."""


def rank_file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def commit(fence: Fence, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Manifest, then the name. One of the same step (a rerun) stays readable until that moment. Raises OSError."""
    write_manifest(temporary, manifest)
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        fence.require_newest()
        fence.remove(replaced)
        fence.rename(final, replaced)
    temporary.rename(final)
    fsync_folder(final.parent)
    fence.remove(replaced)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Appears whole or not at all, also after a power cut."""
    write_durably(folder / MANIFEST, json.dumps(manifest | {"checksum": checksum(manifest)}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        with open(path, encoding="utf-8", opener=no_links) as file:
            manifest = json.load(file)
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing: the checkpoint was never committed, or files were deleted") from error
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != checksum(manifest):
        raise DamagedError(f"{path} was changed after it was written, or is no manifest: its checksum does not fit")
    if manifest["version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest['version']}, this program reads version {FORMAT_VERSION}. Use the "
            f"release that wrote it; its note on upgrading: {manifest.get('upgrade')}"
        )
    strangers = [name for name in manifest["files"] if not RANK_FILE.fullmatch(name)]
    if strangers:
        raise DamagedError(f"{path} names files that no rank writes: {', '.join(strangers)}")
    return manifest


def damage(folder: Path, share: int = 0, num_shares: int = 1, names: Collection[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint, empty if nothing; hashes every `num_shares`-th file, beginning at `share`. What
    the file system refuses is asked for again.

    names: the files that matter; None: all that the manifest names.
    """
    cause: BaseException | None
    for look in range(LOOKS):
        try:
            return _look(folder, share, num_shares, names)
        except DamagedError as error:
            cause, problems = error.__cause__, error.problems
        except OSError as error:
            cause, problems = error, [str(error)]
        if not isinstance(cause, OSError) or cause.errno in LASTING:
            break
        if look + 1 < LOOKS:
            time.sleep(BETWEEN_LOOKS_S)
            heartbeat.beat(folder.name)
    return problems


def _look(folder: Path, share: int, num_shares: int, names: Collection[str] | None) -> list[str]:
    """As `damage`. Raises DamagedError and OSError."""
    files = files_that_matter(read_manifest(folder), names)
    sizes = wrong_sizes(folder, files)
    if sizes:
        return sizes
    problems = []
    mine = list(files)[share::num_shares]
    with show_progress(BYTES) as report:
        add = summed(report, f"verifying {folder.name}", sum(files[name]["size_bytes"] for name in mine))

        def on_block(num_bytes: int) -> None:
            heartbeat.beat()
            add(num_bytes)

        for name in mine:
            heartbeat.beat(name)
            found, expected = hash_file(folder / name, on_block), files[name]["xxh3_128"]
            if found != expected:
                problems.append(f"{name}: its bytes changed (xxh3-128 {found}, {expected} when it was written)")
    return problems


def files_that_matter(manifest: dict[str, Any], names: Collection[str] | None) -> dict[str, Any]:
    """Entries of the manifest: of these files, or of all."""
    return {name: entry for name, entry in manifest["files"].items() if names is None or name in names}


def wrong_sizes(folder: Path, files: dict[str, Any]) -> list[str]:
    if folder.is_symlink():
        return [f"{folder.name} is a link, not a folder"]
    problems = []
    for name, entry in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name}: missing, or not a plain file")
        elif path.stat().st_size != entry["size_bytes"]:
            problems.append(f"{name}: {path.stat().st_size} bytes, {entry['size_bytes']} when it was written")
    return problems


def checksum(manifest: dict[str, Any]) -> str:
    """Of the content, not of the bytes: the manifest may be indented anew, and holds its own checksum."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def hash_file(path: Path, on_block: Callable[[int], None]) -> str:
    """Of the whole file; `on_block` is told after each block how many bytes it had. Raises OSError."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0, opener=no_links) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            on_block(len(block))
    return digest.hexdigest()
