"""Freed tensors → memory of the system again, at once.

glibc keeps freed blocks below a threshold that grows with use, up to 32 MiB, so a process that passes a large model on
tensor by tensor ends up holding far more than it uses (0.65 GB a rank while the real model is partitioned in two).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3  # malloc.h
MIB = 2**20


@contextmanager
def returned_when_freed() -> Iterator[None]:
    """Blocks of 1 MiB and more go back when they are freed, for the length of a `with`; those of 4 MiB ever after.

    Weights that ZeRO-3 gathers later are larger than that; the quickstart's steps take no longer (measured).
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, MIB)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 4 * MIB)
