"""A small file → on the disk, whole or not at all, also after a power cut.

Surprise: flushing a file is not enough. Its name is a part of its folder, which is flushed by itself. No link is
followed: what is written or read here lies where its name says.
"""

import os
import secrets
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write, flush, and only then give the name. Raises OSError."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # no two writers, and no planted link
    with partial.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable, not only the contents of its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_links(path: str, flags: int) -> int:
    """An `opener` for `open`, which then fails at a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)  # as `open` does it; the umask decides
