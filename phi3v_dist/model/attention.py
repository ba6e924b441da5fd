"""One seam for attention: a flat row in which documents do not see each other, several backends.

What comes in: queries, keys and values of one layer, and a `Layout` (or a `KeyValueCache` while generating). What goes
out: the attended values. Surprise: no mask is ever built. Transformers' mask builder makes a dense S x S matrix (16
GiB at 131,072) and silently lets documents see each other when a cache or an all-ones mask is given; we call the
decoder layers ourselves and register the function below under `BACKEND`.

Backends: `flash` (flash-attn's variable-length kernel, GPU) and `sdpa` (torch, one call per document; on a CPU more
than twice as fast as a dense mask).
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface

from phi3v_dist.errors import ConfigError

if TYPE_CHECKING:
    from phi3v_dist.model.cache import KeyValueCache

BACKEND = "phi3v_documents"
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
            positions, targets = torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORE)
        rope_lengths = sizes.repeat_interleave(sizes)
        return cls(tuple(lengths), borders.to(torch.int32), rope_lengths, positions, targets, num_targets)

    def to(self, device: torch.device) -> "Layout":
        """The same layout with its tensors on a device."""
        names = ("cu_seqlens", "rope_lengths", "target_positions", "targets")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def choose_backend(wanted: str, device: torch.device) -> str:
    """`auto`, `sdpa` or `flash` → the backend to use on this device.

    Raises:
        ConfigError: flash attention is asked for and cannot run here.
    """
    has_flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if wanted == "flash" and not has_flash:
        raise ConfigError(
            f"`model.attention` is flash, but on {device.type} "
            + (
                "flash-attn is not installed: pip install 'phi3v-dist[gpu]'"
                if device.type == "cuda"
                else "it cannot run"
            )
            + "; use auto"
        )
    return "flash" if has_flash and wanted in ("auto", "flash") else "sdpa"


def attend(
    module: torch.nn.Module, query: Float[Tensor, "rows heads tokens head_dim"],
    key: Float[Tensor, "rows kv_heads tokens head_dim"], value: Float[Tensor, "rows kv_heads tokens head_dim"],
    attention_mask: None, *, scaling: float, layout: Layout | None = None, backend: str = "sdpa",
    cache: "KeyValueCache | None" = None, **_: Any,
) -> tuple[Float[Tensor, "rows tokens heads head_dim"], None]:  # fmt: skip
    """Transformers' attention interface (`AttentionInterface`): the layer calls this with rotated queries and keys.

    One flat row, except while generating with a cache, when each row carries one token.
    """
    if cache is not None:
        return cache.attend(module.layer_idx, query, key, value, scaling), None  # type: ignore[arg-type]
    assert layout is not None  # Phi3VDecoder always gives one
    if backend == "flash":
        return _flash(query, key, value, layout, scaling), None
    return _by_document(query, key, value, layout, scaling), None


def _by_document(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
    pieces = zip(*(t.split(layout.lengths, dim=2) for t in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped) for q, k, v in pieces
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _flash(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    flat = (t[0].transpose(0, 1) for t in (query, key, value))  # [tokens, heads, head_dim]
    longest = max(layout.lengths)
    out = flash_attn_varlen_func(
        *flat, layout.cu_seqlens, layout.cu_seqlens, longest, longest, softmax_scale=scaling, causal=True
    )
    return out[None]


AttentionInterface.register(BACKEND, attend)
