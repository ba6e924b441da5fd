"""A tar, whole or damaged → its members, and what is damaged between them.

What comes in: an open file. What goes out: headers in the tar's order, with `Damage` where bytes make no sense.
Surprise: Python's `tarfile` ends without a word at a header that is damaged. Here the search goes on, block by block,
for the next header with a right checksum. Only after damage: a tar inside a member's bytes is skipped by its size.
"""

import os
import re
import tarfile
from collections.abc import Generator, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20  # of a long name or PAX records; nothing real comes near
SEARCH_BYTES = 1 << 20
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}

_NAMES_THE_NEXT = re.compile(r"@LongLink$|PaxHeader")  # headers that hold a long name for the next one

# What `tarfile` raises on damaged headers: they ask for anything.
_HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)


class Damage(NamedTuple):
    """Bytes begin … end-1 that hold no readable member.

    name: of the member that stood there, as far as it can be read; else "".
    alone: whether just this member is lost.
    """

    begin: int
    end: int
    reason: str
    name: str = ""
    alone: bool = False


def walk(file: BinaryIO, size_bytes: int) -> Iterator[tarfile.TarInfo | Damage]:
    """Every member's header, in order; `offset_data` and `size` say where its bytes are, and they are all there."""
    begin: int | None = 0
    if not size_bytes:
        yield Damage(0, 0, "the file is empty")
    while begin is not None and begin < size_bytes:
        damage = yield from _walk_undamaged(file, begin, size_bytes)
        if damage is None:
            return
        found, only_zeros = _next_header(file, damage.end, size_bytes)
        if found is not None and damage.name and _NAMES_THE_NEXT.search(damage.name):
            damage = damage._replace(name="", alone=False)  # the header found has lost its real name
            found, _ = _next_header(file, found + BLOCK, size_bytes)
        end = size_bytes if found is None else found
        if found is None and only_zeros and not damage.reason:
            return  # the end mark, and the padding after it
        if found is None and damage.begin == 0 and not damage.alone:
            yield Damage(0, size_bytes, _not_a_tar(file))
            return
        reason = damage.reason or "zeros in place of a header: a part was lost, or two tars were joined"
        yield Damage(damage.begin, end, reason, damage.name, damage.alone or _fills(file, damage, end))
        begin = found


def _walk_undamaged(file: BinaryIO, begin: int, size_bytes: int) -> Generator[tarfile.TarInfo, None, Damage | None]:
    """Members from `begin` on, and what stopped it; `end` is where to search on. No reason: zeros, maybe the end."""
    headers = _Headers(file)
    file.seek(begin)
    offset = begin
    try:
        archive = tarfile.TarFile(fileobj=headers, errorlevel=2)  # type: ignore[arg-type]  # it only reads, seeks, tells
        while True:
            offset = archive.offset
            entry = archive.next()
            archive.members.clear()  # type: ignore[attr-defined]  # else a large tar's headers all stay
            if entry is None:
                break
            offset = archive.offset
            left = size_bytes - entry.offset_data
            if entry.size < 0 or entry.isreg() and not entry.issparse() and entry.size > left:
                reason = f"its header says {entry.size:,} bytes, and {max(0, left):,} are left of the tar"
                return Damage(entry.offset, max(entry.offset_data, entry.offset + BLOCK), reason, entry.name, True)
            yield entry
    except _HEADER_ERRORS:
        pass  # looked at below, byte by byte
    offset = min(offset, size_bytes)
    file.seek(offset)
    block = file.read(BLOCK)
    if not block:
        return Damage(offset, offset, "it ends without an end mark, so it may be cut off")
    if len(block) < BLOCK:
        return Damage(offset, size_bytes, f"it is cut off in a header; {len(block)} bytes of it are there")
    if not block.strip(b"\0"):
        return Damage(offset, offset + BLOCK, "")
    return Damage(offset, offset + BLOCK, "its header is damaged", _legible_name(block))


class _Headers:
    """A file from which nobody reads more than headers."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell = file.seek, file.tell
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _next_header(file: BinaryIO, begin: int, size_bytes: int) -> tuple[int | None, bool]:
    """Where the next plausible header begins, and whether all bytes up to there (or the end) are zeros."""
    only_zeros = True
    begin += -begin % BLOCK
    for start in range(begin, size_bytes, SEARCH_BYTES):
        file.seek(start)
        data = file.read(SEARCH_BYTES)
        blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
        marked = (blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1)
        for place in np.flatnonzero(marked).tolist():
            try:
                tarfile.TarInfo.frombuf(blocks[place].tobytes(), "utf-8", "surrogateescape")
            except _HEADER_ERRORS:
                continue
            return start + place * BLOCK, only_zeros and not blocks[:place].any()
        only_zeros = only_zeros and not data.strip(b"\0")
    return None, only_zeros


def _legible_name(block: bytes) -> str:
    """The name in a damaged header, if it looks like one."""
    name = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and (folder := block[345:500].split(b"\0")[0]):
        name = folder + b"/" + name
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return ""
    return text if text.isprintable() else ""


def _fills(file: BinaryIO, damage: Damage, end: int) -> bool:
    """Whether the damaged header's own size leads exactly to the next one."""
    if not damage.name:
        return False
    file.seek(damage.begin)
    digits = file.read(BLOCK)[124:136].strip(b"\0 ")
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        return False
    size = int(digits, 8)
    return damage.begin + BLOCK + size + -size % BLOCK == end


def _not_a_tar(file: BinaryIO) -> str:
    file.seek(0, os.SEEK_SET)
    first = file.read(8)
    for mark, kind in COMPRESSED.items():
        if first.startswith(mark):
            return f"not a plain tar, but {kind}; shards must be plain tars: unpack it"
    return f"not a tar file: it begins with {first!r}"
