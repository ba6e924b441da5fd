"""Tensors that autograd saves → host memory until the backward pass wants them, one ahead of its turn.

What comes in: with gradient checkpointing, what each decoder layer began with. What goes out: the same values on the
same device, later. Surprise: no block of device memory is ever told of the side stream (`record_stream` gives a block
back only once the GPU got there, and the CPU runs ahead of it by many layers). All blocks belong to the stream that
computes: a copy waits for it before it begins, and it waits for the copy before a block is used or freed.

On a CPU copies are made at once and in the same order; nothing of torch.cuda is touched.
"""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from phi3v_dist.memory import lock_pages, unlock_pages


class HostActivations:
    """Host buffers that are taken once and used again by every step, and the copies into and out of them.

    A buffer is free again when autograd drops what was saved in it, so forward passes may overlap and graphs may be
    kept or thrown away.

    Args:
        longest_bytes: of one tensor. Buffers are a quarter larger than what needs them, but no larger than this, so
            that rows that grow by and by do not make new ones each time: to lock memory is slow.
    """

    def __init__(self, longest_bytes: int = 0):
        self.longest_bytes = longest_bytes
        self.buffers: list[HostBuffer] = []
        self.num_copies_out = self.num_copies_back = 0
        self._copies: dict[torch.device, Any] = {}
        self._newest: weakref.ref[Any] | None = None

    @property
    def num_live(self) -> int:
        """Buffers that hold something a backward pass may want."""
        return sum(not buffer.is_free for buffer in self.buffers)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """What autograd saves for the length of a `with` goes to the host. The last of it stays on the device too:
        the backward pass begins there."""
        self._newest = None
        with saved_tensors_hooks(self._pack, _unpack):
            yield

    def copies(self, device: torch.device) -> Any:
        if device not in self._copies:
            self._copies[device] = _SideStream(device) if device.type == "cuda" else _AtOnce()
        return self._copies[device]

    def take(self, num_bytes: int, on_gpu: bool) -> "HostBuffer":
        """The first free buffer, made larger if it is too small; a new one when none is free."""
        buffer = next((buffer for buffer in self.buffers if buffer.is_free), None)
        if buffer is None:
            buffer = HostBuffer()
            self.buffers.append(buffer)
        if buffer.memory.nbytes < num_bytes:
            buffer.replace(max(num_bytes, min(self.longest_bytes, num_bytes * 5 // 4)), on_gpu)
        buffer.is_free = False
        return buffer

    def _pack(self, tensor: Tensor) -> "_Saved":
        before = self._newest() if self._newest is not None else None
        if before is not None:
            before.leave_device()  # its copy had a whole layer's time
        saved = _Saved(self, tensor, before)
        self._newest = weakref.ref(saved)
        return saved


def kept_on_host(activations: HostActivations | None) -> AbstractContextManager[None]:
    """`keeping` of it, or nothing when there is none."""
    return activations.keeping() if activations is not None else nullcontext()


class HostBuffer:
    """Bytes of host memory, its pages locked where a GPU copies to it."""

    def __init__(self) -> None:
        self.memory, self.is_free = torch.empty(0, dtype=torch.uint8), True
        self._unlock: weakref.finalize[..., Any] | None = None

    def replace(self, num_bytes: int, on_gpu: bool) -> None:
        """Other memory, its contents not set. Waits for the GPU when it gives locked memory back."""
        if self._unlock is not None:
            torch.cuda.synchronize()
            self._unlock()
            self._unlock = None
        self.memory = torch.empty(num_bytes, dtype=torch.uint8)
        if on_gpu and lock_pages(self.memory.zero_()):  # touched first: locking fresh pages takes longer
            self._unlock = weakref.finalize(self, unlock_pages, self.memory)
            self._unlock.atexit = False  # the driver is gone by then


class _Saved:
    """One tensor: in a host buffer, and now and then on the device too."""

    def __init__(self, owner: HostActivations, tensor: Tensor, before: "_Saved | None"):
        self._owner, self._copies = owner, owner.copies(tensor.device)
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._before = weakref.ref(before) if before is not None else None
        self._on_device: Tensor | None = tensor.detach()
        self._buffer = owner.take(tensor.nbytes, tensor.is_cuda)
        with self._copies.copying():
            self._in_host().copy_(self._on_device, non_blocking=True)
            self._copied = self._copies.mark()
        owner.num_copies_out += 1

    def tensor(self) -> Tensor:
        """The values on the device; the one saved before this one begins its way back."""
        self._bring_back()
        tensor, self._on_device = self._on_device, None
        self._copies.wait(self._copied)
        before = self._before() if self._before is not None else None
        if before is not None:
            before._bring_back()
        assert tensor is not None
        return tensor

    def leave_device(self) -> None:
        if self._on_device is not None:
            self._copies.wait(self._copied)
            self._on_device = None

    def _bring_back(self) -> None:
        if self._on_device is not None:
            return
        # Made on the stream that computes, which may have used this memory for something else until now.
        self._on_device = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        with self._copies.copying():
            self._on_device.copy_(self._in_host(), non_blocking=True)
            self._copied = self._copies.mark()
        self._owner.num_copies_back += 1

    def _in_host(self) -> Tensor:
        num_bytes = self._shape.numel() * self._dtype.itemsize
        return self._buffer.memory[:num_bytes].view(self._dtype).view(self._shape)

    def __del__(self) -> None:
        if hasattr(self, "_copied"):  # else the constructor failed
            self.leave_device()  # a copy in flight must not write into memory that is someone else's by then
            self._buffer.is_free = True  # its next user's copies come later on the same stream


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor()


class _SideStream:
    """Copies beside the computing of one GPU."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Begins after what the computing stream was given until now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event:
        """The end of what was copied until now."""
        return self._stream.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """The computing stream goes on after it; the CPU does not wait."""
        torch.cuda.current_stream(self._device).wait_event(event)


class _AtOnce:
    """The same on a CPU, where a copy is complete when its call returns."""

    def copying(self) -> AbstractContextManager[None]:
        return nullcontext()

    def mark(self) -> None:
        return None

    def wait(self, event: None) -> None:
        return None
