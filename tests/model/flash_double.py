"""A plain-torch stand-in for flash-attn's `flash_attn_varlen_func`, of both generations, that checks its arguments.

Where the kernels raise, so does this; where they would read wrong memory without a word (borders that do not end at the
last token, a `max_seqlen` below the longest document), this raises too.
"""

import itertools
from types import ModuleType

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


class FlashDouble:
    """Attention by a dense block mask, in fp32.

    types: what it accepts; the real ones know half types only.
    with_lse: return (out, logsumexp) as flash-attn 3 did before September 2025.
    calls: how often it was called.
    """

    def __init__(self, types: tuple[torch.dtype, ...] = HALF, with_lse: bool = False):
        self.types, self.with_lse, self.calls = types, with_lse, 0

    def module(self, generation: int) -> ModuleType:
        """As one would import it: `flash_attn` (2) or `flash_attn_interface` (3), each with its own argument order."""
        module = ModuleType({2: "flash_attn", 3: "flash_attn_interface"}[generation])
        module.flash_attn_varlen_func = {2: self.second, 3: self.third}[generation]
        return module

    def second(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        """flash-attn 2's signature."""
        assert dropout_p == 0.0 and alibi_slopes is None and block_table is None and not return_attn_probs
        assert window_size == (-1, -1) and softcap == 0.0
        return self._attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)

    def third(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        """flash-attn 3's signature."""
        assert seqused_q is None and seqused_k is None and qv is None and attention_chunk == 0
        assert window_size == (-1, -1) and softcap == 0.0 and not return_attn_probs
        out = self._attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
        return (out, torch.zeros(out.shape[1], out.shape[0])) if self.with_lse else out

    def _attend(self, q, k, v, borders_q, borders_k, max_q, max_k, softmax_scale, causal) -> Tensor:
        self.calls += 1
        for name, tensor in {"q": q, "k": k, "v": v}.items():
            assert tensor.dim() == 3, f"{name} must be [total, heads, head_dim], found {tuple(tensor.shape)}"
            assert tensor.dtype in self.types and tensor.dtype == q.dtype, f"{name} is {tensor.dtype}"
            assert tensor.device == q.device and tensor.stride(-1) == 1, f"{name}: device or stride"
        total, heads, head_dim = q.shape
        assert head_dim % 8 == 0 and head_dim <= 256
        assert k.shape == v.shape and k.shape[2] == head_dim and heads % k.shape[1] == 0
        for borders, tokens, longest in ((borders_q, total, max_q), (borders_k, len(k), max_k)):
            assert borders.dtype == torch.int32 and borders.dim() == 1 and borders.is_contiguous()
            assert borders.device == q.device
            edges = borders.tolist()
            assert edges[0] == 0 and edges[-1] == tokens, f"borders {edges} of {tokens} tokens"
            lengths = [end - begin for begin, end in itertools.pairwise(edges)]
            assert min(lengths) >= 0 and type(longest) is int and longest >= max(lengths), f"{longest} for {lengths}"
        scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        assert type(scale) is float and type(causal) is bool
        return self.compute(q, k, v, edges, scale, causal)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, edges: list[int], scale: float, causal: bool) -> Tensor:
        document = torch.bucketize(torch.arange(len(q)), torch.tensor(edges), right=True)
        seen = document[:, None] == document
        seen = seen.tril() if causal else seen
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


class Leaking(FlashDouble):
    """Causal over the whole row: every document sees those before it."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, edges: list[int], scale: float, causal: bool) -> Tensor:
        return super().compute(q, k, v, [0, len(q)], scale, causal)
