"""One seam for attention: a flat row in which documents do not see each other, several backends.

What comes in: queries, keys and values of one layer, and a `Layout` (or a `KeyValueCache` while generating). What goes
out: the attended values. Surprise: no mask is ever built. Transformers' mask builder makes a dense S x S matrix (16
GiB at 131,072) and silently lets documents see each other when a cache or an all-ones mask is given; we call the
decoder layers ourselves and register the function below under `INTERFACE`.

Why no backend can leak, whichever `backends.py` chose:
    sdpa, eager        called once per document, with that document's queries, keys and values alone as arguments
    flash_attention_2  one call for the row; the kernel reads keys between two borders of `cu_seqlens`, which are made
    flash_attention_3  in one place (`Layout.of`) from the same lengths that the others cut by
    a cache            prefills per document, and decodes each row against its own keys and values
A layout that does not fill its row is refused, and `isolation.py` shows at start-up, on the real sizes, that it is so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface

from phi3v_dist.model.backends import Backend
from phi3v_dist.parallel import ulysses
from phi3v_dist.parallel.ulysses import ALONE, SequenceGroup

if TYPE_CHECKING:
    from phi3v_dist.model.cache import KeyValueCache

INTERFACE = "phi3v_documents"  # our name among transformers' attention functions
IGNORE = -100


@dataclass(frozen=True)
class Layout:
    """Where documents begin and which positions are trained, for one flat row.

    lengths: tokens of each document, in order; plain integers, so that no layer asks the device.
    cu_seqlens: int32, borders of the documents: 0, …, tokens.
    rope_lengths: int64, for every token the length by which its LongRoPE factors are chosen.
    target_positions, targets: int64, positions whose next token is learned, and that token. Never empty: a row
        without labels has one position with target -100, so that every rank runs the head.
    num_targets: how many of them count.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Int[Tensor, " borders"]
    rope_lengths: Int[Tensor, " tokens"]
    target_positions: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    num_targets: int

    @classmethod
    def of(cls, lengths: Sequence[int], labels: Int[Tensor, " tokens"] | None = None) -> "Layout":
        """The layout of documents of these lengths; `labels` are not shifted."""
        sizes = torch.tensor(lengths, dtype=torch.int64)
        borders = F.pad(sizes.cumsum(0), (1, 0))
        if labels is None:
            positions = targets = torch.zeros(0, dtype=torch.int64)
        else:
            following = F.pad(labels[1:], (0, 1), value=IGNORE)
            following[borders[1:].to(labels.device) - 1] = IGNORE  # a document's last token has no next one
            positions = (following != IGNORE).nonzero().flatten()
            targets = following[positions]
        num_targets = len(targets)
        if num_targets == 0:
            positions, targets = _NO_TARGET
        rope_lengths = sizes.repeat_interleave(sizes)
        return cls(tuple(lengths), borders.to(torch.int32), rope_lengths, positions, targets, num_targets)

    def cut(self, begin: int, end: int) -> "Layout":
        """For a slice of the tokens: what stands per token is that of the slice, positions count from its beginning.

        Documents remain those of the whole row. On the CPU: how many targets a slice has is not asked of a device.
        """
        inside = (self.target_positions >= begin) & (self.target_positions < end)
        positions, targets = self.target_positions[inside] - begin, self.targets[inside]
        num_targets = int((targets != IGNORE).sum())
        if not len(positions):
            positions, targets = _NO_TARGET
        return replace(
            self, rope_lengths=self.rope_lengths[begin:end], target_positions=positions, targets=targets,
            num_targets=num_targets,
        )  # fmt: skip

    def to(self, device: torch.device) -> "Layout":
        """The same layout with its tensors on a device."""
        names = ("cu_seqlens", "rope_lengths", "target_positions", "targets")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


_NO_TARGET = torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORE)


def attend(
    module: torch.nn.Module, query: Float[Tensor, "rows heads tokens head_dim"],
    key: Float[Tensor, "rows kv_heads tokens head_dim"], value: Float[Tensor, "rows kv_heads tokens head_dim"],
    attention_mask: None, *, scaling: float, layout: Layout | None = None, backend: Backend | None = None,
    cache: "KeyValueCache | None" = None, sequence: SequenceGroup = ALONE, **_: Any,
) -> tuple[Float[Tensor, "rows tokens heads head_dim"], None]:  # fmt: skip
    """Transformers' attention interface (`AttentionInterface`): the layer calls this with rotated queries and keys.

    One flat row, or a slice of it, whose heads are then exchanged with the ranks that have the other slices. While
    generating with a cache each row carries one token.
    """
    if cache is not None:
        return cache.attend(module.layer_idx, query, key, value, scaling), None  # type: ignore[arg-type]
    assert layout is not None and backend is not None  # Phi3VDecoder always gives both
    query, key, value = ulysses.to_heads(sequence, query, key, value)
    return ulysses.to_tokens(sequence, attend_documents(query, key, value, layout, backend, scaling)), None


def attend_documents(
    query: Float[Tensor, "1 heads tokens head_dim"], key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"], layout: Layout, backend: Backend, scaling: float,
) -> Float[Tensor, "1 tokens heads head_dim"]:  # fmt: skip
    """Causal attention within each document of one flat row."""
    assert sum(layout.lengths) == query.shape[2], "Phi3VForCausalLM.forward refuses such a layout"
    if backend.kernel is not None:
        return _varlen(query, key, value, layout, backend, scaling)
    one = _eager if backend.name == "eager" else _sdpa
    pieces = zip(*(t.split(layout.lengths, dim=2) for t in (query, key, value)), strict=True)
    return torch.cat([one(q, k, v, scaling) for q, k, v in pieces], dim=2).transpose(1, 2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)


def _eager(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """As the published code computes it: softmax in fp32, everything else in the model's type."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    future = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, backend: Backend, scaling: float) -> Tensor:
    """All documents in one call. By keyword: after max_seqlen_k the two generations order their arguments apart."""
    assert backend.kernel is not None
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [tokens, heads, head_dim]
    longest = max(layout.lengths)
    found: Any = backend.kernel(
        q, k, v, cu_seqlens_q=layout.cu_seqlens, cu_seqlens_k=layout.cu_seqlens, max_seqlen_q=longest,
        max_seqlen_k=longest, softmax_scale=scaling, causal=True,
    )  # fmt: skip
    attended: Tensor = found[0] if isinstance(found, tuple) else found  # flash-attn 3 gave (out, lse) before 9/2025
    return attended[None]


AttentionInterface.register(INTERFACE, attend)
