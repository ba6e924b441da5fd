"""One forward and backward pass of the real model on fake tensors → its memory, moment by moment.

What comes in: a model of few layers, built under `FakeTensorMode`, and a Batch. What goes out: a `Timeline`, one
`Moment` for every time a module is entered or left in either direction, and for every gradient that is ready.
Surprise: nothing is estimated here. Fake tensors have storages of the true size and the true life time, so counting
the live ones gives what a real run on a CPU allocates, to the byte; and sdpa's fused kernel keeps the same tensors
there as FlashAttention does on a GPU.

The moments are those at which DeepSpeed's own hooks run: `gathering.py` replays ZeRO-3 on them.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from phi3v_dist.model.mlp import FeedForward

# What a storage is for, as it is printed.
VISION, LOSS, KEPT, LAYER, ROW, GRADIENT = range(6)
CAUSES = ("vision", "loss", "kept for the backward pass", "the layer at work", "row and embeddings", "gradients")
Bytes = tuple[int, ...]  # one number for each of CAUSES


Key = tuple[str, str]


@dataclass(frozen=True)
class Timeline:
    """The moments of a step, in order.

    keys: what comes (`forward`, `forward_end`, `backward`, `backward_end` of a module, `gradient` of a parameter,
        `start`, `end`) and its name.
    live: [moments, causes] bytes when it comes. most: the same at the peak from there to the next one.
    host: [moments] bytes in host memory until then.
    """

    keys: tuple[Key, ...]
    live: np.ndarray
    most: np.ndarray
    host: np.ndarray

    @property
    def peak(self) -> int:
        """Bytes, at the worst moment."""
        return int(self.most.sum(1).max())


class Ledger(TorchDispatchMode):
    """Counts live storages by cause while it is entered. Works on fake and on real tensors alike."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Key] = []
        self.rows: list[tuple[Bytes, Bytes, int]] = []
        self.host_bytes = 0
        self.cause, self._live, self._known = ROW, [0] * len(CAUSES), dict[int, int]()
        self.total = 0
        self.key: Key = ("start", "")
        self._at, self._peak, self._most = tuple(self._live), 0, tuple(self._live)

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """These are counted elsewhere: weights, of which ZeRO-3 holds a share."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = -1

    def add(self, tensor: Tensor, cause: int) -> None:
        """Count a storage if it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = cause
        self._live[cause] += size
        self.total += size
        weakref.finalize(storage, self._freed, key, size)
        if self.total > self._peak:
            self._peak, self._most = self.total, tuple(self._live)

    def _freed(self, key: int, size: int) -> None:
        cause = self._known.pop(key, -1)
        if cause >= 0:
            self._live[cause] -= size
            self.total -= size

    def relabel(self, tensor: Tensor, cause: int) -> None:
        """What a storage is for, now that it is known."""
        key = tensor.untyped_storage()._cdata
        if (old := self._known.get(key, -1)) >= 0:
            size = tensor.untyped_storage().nbytes()
            self._live[old] -= size
            self._live[cause] += size
            self._known[key] = cause

    def mark(self, kind: str, name: str) -> None:
        """A moment comes; the one before it is over."""
        self.keys.append(self.key)
        self.rows.append((self._at, self._most, self.host_bytes))
        self.key = (kind, name)
        self._at = self._most = tuple(self._live)
        self._peak = self.total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            kind = args[0].dtype  # a read that makes a GPU wait; the answer decides nothing that we count
            return False if kind == torch.bool else 1.0 if kind.is_floating_point else 0
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.add(out, self.cause)
        else:
            for leaf in tree_flatten(out)[0]:
                if isinstance(leaf, Tensor):
                    self.add(leaf, self.cause)
        return out


def cause_of(name: str, in_backward: bool) -> int:
    """What tensors made inside a module are for."""
    if name.startswith("model.vision_embed_tokens"):
        return VISION
    if name.startswith("lm_head"):
        return LOSS
    if name.startswith(("model.layers", "model.norm")):
        return LAYER if in_backward else KEPT
    return ROW


def zero_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have ZeRO-3's hooks: all, but for what is inside a feed-forward part (`zero.gather_whole`)."""
    whole = [f"{name}." for name, module in model.named_modules() if isinstance(module, FeedForward)]
    for name, module in model.named_modules():
        if not name.startswith(tuple(whole)):
            yield name, module


class Watch:
    """Hooks on every module that mark the moments at which ZeRO-3's hooks run, forwards and backwards.

    As DeepSpeed does it (parameter_offload.py, 0.19.8): identity functions around the inputs and outputs of a module
    tell when its backward pass ends and begins.
    """

    def __init__(self, model: nn.Module, ledger: Ledger):
        self.ledger, self.in_backward = ledger, False
        self._remaining: dict[str, int] = defaultdict(int)
        self._handles: list[Any] = []
        for name, module in zero_modules(model):
            self._handles += [
                module.register_forward_pre_hook(self._before(name)),
                module.register_forward_hook(self._after(name)),
            ]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._ready(name)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _mark(self, kind: str, name: str) -> None:
        self.ledger.mark(kind, name)
        inside = name.rpartition(".")[0] if kind.endswith("_end") else name
        self.ledger.cause = cause_of(inside, self.in_backward)

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            self._mark("forward", name)
            self._remaining[name] = 0
            return tuple(self._wrap(value, name, ends=True) for value in inputs)

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            self._mark("forward_end", name)
            if isinstance(output, tuple):
                return tuple(self._wrap(value, name, ends=False) for value in output)
            return self._wrap(output, name, ends=False)

        return hook

    def _wrap(self, value: Any, name: str, ends: bool) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not torch.is_grad_enabled():
            return value
        if ends and value.requires_grad:
            self._remaining[name] += 1
        return _Identity.apply(value, self._end if ends else self._begin, name)

    def _begin(self, name: str) -> None:
        self._mark("backward", name)

    def _end(self, name: str) -> None:
        self._remaining[name] -= 1
        if self._remaining[name] == 0:
            self._mark("backward_end", name)

    def _ready(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.ledger.relabel(parameter.grad, GRADIENT)
            self.ledger.mark("gradient", name)
            parameter.grad = None  # ZeRO-3 takes it from here

        return hook


class _Identity(torch.autograd.Function):
    """Hands its input on, and says when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, passing: Callable[[str], None], name: str) -> Tensor:
        ctx.passing, ctx.name = passing, name
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.passing(ctx.name)
        return *gradients, None, None


def _away(ledger: Ledger) -> saved_tensors_hooks:
    """Saved tensors that are inputs of the decoder's checkpoints become a number of bytes in host memory."""

    def pack(tensor: Tensor) -> Any:
        kind, name = ledger.key
        begins = name.startswith("model.layers.") and name.count(".") == 2 and kind == "forward_end" or name == "model"
        if not begins or not tensor.is_floating_point():
            return tensor
        size = tensor.numel() * tensor.element_size()
        ledger.host_bytes += size
        return tensor.shape, tensor.dtype, size

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shape, dtype, size = packed
        ledger.host_bytes -= size
        return torch.empty(shape, dtype=dtype)

    return saved_tensors_hooks(pack, unpack)


def record(
    model: nn.Module, run_forward: Callable[[], Tensor], inputs: list[tuple[Tensor, int]], offload: bool = False
) -> Timeline:
    """Forward and backward.

    Args:
        run_forward: calls the model and returns what backward begins with.
        inputs: tensors of the batch and what they are for.
        offload: what checkpointed layers began with goes to host memory.
    """
    ledger = Ledger()
    ledger.ignore(iter([*model.parameters(), *model.buffers()]))
    for tensor, cause in inputs:
        ledger.add(tensor, cause)
    watch = Watch(model, ledger)
    try:
        with ledger:
            with _away(ledger) if offload else nullcontext():
                loss = run_forward()
            watch.in_backward = True
            loss.backward()
        ledger.mark("end", "")
        ledger.mark("", "")
    finally:
        watch.remove()
    live, most, host = zip(*ledger.rows, strict=True)
    return Timeline(tuple(ledger.keys), np.array(live), np.array(most), np.array(host))
