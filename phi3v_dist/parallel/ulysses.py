"""The ranks that share a row → exchanges between them, through which gradients flow.

What comes in: rows of a tensor and how many each rank is to get. What goes out: the rows that the others sent.
Surprise: one differentiable collective is enough for everything. An all-to-all with unequal shares takes queries, keys
and values from slices of the tokens to groups of heads, attended values back, and features of pictures to the slices
that place them; its backward pass is the same exchange the other way. No gradient is scaled anywhere: each rank holds a
part of it, and ZeRO's sum over all ranks completes it.

Source: Jacobs et al., "DeepSpeed Ulysses" (2023); which primitives are right on gloo and NCCL: SEQUENCE.md §1 and §3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from phi3v_dist.parallel.topology import Topology
from phi3v_dist.parallel.waits import WAITS


@dataclass(frozen=True)
class SequenceGroup:
    """Consecutive ranks that share each row, every one with a slice of its tokens. One rank alone has the whole row.

    rank: place in the group, and number of the slice. handle: the process group of tensors; words: of everything else,
        on the CPU, so that asking each other does not wait for a GPU.
    """

    size: int = 1
    rank: int = 0
    handle: Any = None
    words: Any = None

    @classmethod
    def form(cls, topology: Topology, size: int) -> "SequenceGroup":
        """This rank's group. All ranks call it together; `size` divides their number."""
        if size == 1:
            return ALONE
        ours = ALONE
        for begin in range(0, topology.world_size, size):  # each rank must know of every group
            ranks = list(range(begin, begin + size))
            handle = dist.new_group(ranks)
            words = handle if topology.device.type == "cpu" else dist.new_group(ranks, backend="gloo")
            if topology.rank in ranks:
                ours = cls(size, topology.rank - begin, handle, words)
        return ours

    def share(self, total: int, rank: int | None = None) -> range:
        """What falls to a rank (default: this one) of so many equal things: shares differ by one at most."""
        rank = self.rank if rank is None else rank
        return range(rank * total // self.size, (rank + 1) * total // self.size)

    def exchange(
        self, rows: Float[Tensor, "sent *features"], send: Sequence[int], receive: Sequence[int]
    ) -> Float[Tensor, "received *features"]:
        """Send the first `send[0]` rows to rank 0 of the group, the next `send[1]` to rank 1, …; the rows received, by
        sender. Every rank of the group calls it; gradients go the same way back."""
        if self.size == 1:
            return rows
        received: Tensor = _Exchange.apply(rows, list(send), list(receive), self.handle)
        return received

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank of the group."""
        values = [value] * self.size
        if self.size > 1:
            with WAITS.waiting():
                dist.all_gather_object(values, value, group=self.words)
        return values


ALONE = SequenceGroup()


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], handle: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.handle = send, receive, handle
        return _all_to_all(rows, send, receive, handle)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _all_to_all(gradient, ctx.receive, ctx.send, ctx.handle), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], handle: Any) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    WAITS.count(dist.all_to_all_single, received, rows.contiguous(), receive, send, group=handle)
    return received


def group_sizes(num_heads: int, num_kv_heads: int) -> list[int]:
    """How many ranks may share a row of a model with so many heads: those that `to_heads` can give equal shares."""
    sizes = [size for size in range(1, num_heads + 1) if num_heads % size == 0]
    return [size for size in sizes if num_kv_heads % size == 0 or size % num_kv_heads == 0]


def to_heads(group: SequenceGroup, *parts: Float[Tensor, "1 _ tokens head_dim"]) -> list[Tensor]:
    """Queries, keys and values of this rank's tokens, all heads → of the whole row, this rank's share of the heads.

    Fewer heads than ranks (keys and values of grouped queries) are repeated, so that every rank gets those its queries
    need. One exchange for all of them.
    """
    if group.size == 1:
        return list(parts)
    assert parts[0].shape[1] % group.size == 0, "queries must not be repeated; `require_heads_divide` refuses that"
    repeated = [part.repeat_interleave(max(1, group.size // part.shape[1]), dim=1) for part in parts]
    split = [part[0].unflatten(0, (group.size, -1)) for part in repeated]  # [ranks, heads of each, tokens, head_dim]
    num_heads = [part.shape[1] for part in split]
    rows = torch.cat(split, dim=1).transpose(1, 2).flatten(0, 1)  # [ranks x tokens, heads of each, head_dim]
    counts = [parts[0].shape[2]] * group.size
    whole = group.exchange(rows, counts, counts).transpose(0, 1)[None]
    return list(whole.split(num_heads, dim=1))


def to_tokens(
    group: SequenceGroup, attended: Float[Tensor, "1 row heads head_dim"]
) -> Float[Tensor, "1 tokens all_heads head_dim"]:
    """Attended values of the whole row, this rank's heads → of this rank's tokens, all heads."""
    if group.size == 1:
        return attended
    counts = [attended.shape[1] // group.size] * group.size
    received = group.exchange(attended[0], counts, counts)  # [ranks x tokens, heads of each, head_dim]
    return received.unflatten(0, (group.size, -1)).transpose(0, 1).flatten(1, 2)[None]
