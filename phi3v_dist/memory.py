"""Freed tensors → memory of the system again, at once; and pages that a GPU copies to or from by itself.

glibc keeps freed blocks below a threshold that grows with use, up to 32 MiB, so a process that passes a large model on
tensor by tensor ends up holding far more than it uses (0.65 GB a rank while the real model is partitioned in two).
"""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

M_MMAP_THRESHOLD = -3  # malloc.h
MIB = 2**20

log = logging.getLogger(__name__)


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


def lock_pages(memory: Tensor) -> bool:
    """Keep host memory where it is, so that a GPU copies at full speed and beside its computing. Where that fails,
    copies are slower, nothing else.

    Not `pin_memory=True`: its allocator rounds up to a power of two, which may double a large block.
    """
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if error:
        log.warning("%d bytes of host memory could not be locked for the GPU (CUDA error %d)", memory.nbytes, error)
    return not error


def unlock_pages(memory: Tensor) -> None:
    """What `lock_pages` said yes to may move or be freed again; no copy may be in flight."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
