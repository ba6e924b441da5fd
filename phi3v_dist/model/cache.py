"""Keys and values of rows under generation.

What comes in: each layer's new keys and values. What goes out: attention over everything a row has seen. Surprise: the
prompt is prefilled as one flat row of documents (no padding is computed), and only its keys and values are laid out per
row; from then on each step adds one position to every row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class KeyValueCache:
    """One block of keys and values per layer, [rows, kv_heads, capacity, head_dim].

    lengths: [rows] positions filled.
    prefilling: rows that the coming forward call fills, with their lengths; None while decoding one token per row.
    """

    def __init__(self, num_rows: int, capacity: int):
        self.capacity = capacity
        self.lengths = torch.zeros(num_rows, dtype=torch.int64)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.prefilling: tuple[Sequence[int], Sequence[int]] | None = None

    def begin_prefill(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """The next forward call carries these rows' whole texts as documents of one flat row."""
        self.prefilling = (rows, lengths)
        self.lengths[list(rows)] = torch.tensor(lengths)

    def begin_decode(self) -> None:
        """The next forward call carries one new token for every row."""
        self.prefilling = None
        self.lengths += 1

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Drop all other rows."""
        self.lengths = self.lengths[rows]
        self.keys = [block[rows.to(block.device)] for block in self.keys]
        self.values = [block[rows.to(block.device)] for block in self.values]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Float[Tensor, "rows tokens heads head_dim"]:
        """Store this layer's new keys and values, then attend over all that the rows have."""
        if layer == len(self.keys):
            shape = (len(self.lengths), key.shape[1], self.capacity, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros(shape))
        if self.prefilling:
            return self._prefill(layer, query, key, value, scaling)
        rows, last = torch.arange(len(self.lengths)), self.lengths - 1
        self.keys[layer][rows, :, last] = key[:, :, 0]
        self.values[layer][rows, :, last] = value[:, :, 0]
        longest = int(self.lengths.max())
        seen = torch.arange(longest) < self.lengths[:, None]  # [rows, longest]
        out = F.scaled_dot_product_attention(
            query, self.keys[layer][:, :, :longest], self.values[layer][:, :, :longest],
            attn_mask=seen[:, None, None].to(query.device), scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2)

    def _prefill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        assert self.prefilling is not None
        rows, lengths = self.prefilling
        pieces = zip(*(t.split(list(lengths), dim=2) for t in (query, key, value)), strict=True)
        outputs = []
        for row, (q, k, v) in zip(rows, pieces, strict=True):
            self.keys[layer][row, :, : k.shape[2]] = k[0]
            self.values[layer][row, :, : v.shape[2]] = v[0]
            grouped = q.shape[1] != k.shape[1]
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped))
        return torch.cat(outputs, dim=2).transpose(1, 2)
