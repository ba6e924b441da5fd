"""Keys and values of rows under generation.

What comes in: each layer's new keys and values. What goes out: attention over everything a row has seen. Surprise:
prompts are prefilled as flat rows of pieces (no padding is computed), and only their keys and values are laid out per
row; from then on each step adds one position to every row.

A piece that goes on where an earlier one of its row ended attends to that one as well: query i of n sees all but the
last n - 1 - i keys. `sdpa(is_causal=True)` would line up the first query with the first key instead, silently.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MASKED_QUERIES = 256  # that share a mask [queries, keys]: 32 MiB for 131,072 keys, whatever the piece's length


class Piece(NamedTuple):
    """Positions [start, end) of a row's text, all those before `start` having been prefilled."""

    row: int
    start: int
    end: int


class KeyValueCache:
    """One block of keys and values per layer, [rows, kv_heads, capacity, head_dim].

    lengths: [rows] positions filled.
    """

    def __init__(self, num_rows: int, capacity: int):
        self.capacity = capacity
        self.lengths = torch.zeros(num_rows, dtype=torch.int64)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._pieces: Sequence[Piece] | None = None  # of the coming forward call; None: one token for every row
        self._places: tuple[Tensor, Tensor] | None = None  # where these tokens go: their rows, and positions in them
        self._longest = 0
        self._seen: Tensor | None = None  # [rows, 1, 1, longest]; None: every row sees all

    def begin_prefill(self, pieces: Sequence[Piece]) -> None:
        """The next forward call carries these pieces, one after the other, in one flat row."""
        self._pieces = pieces
        for row, _, end in pieces:
            self.lengths[row] = end

    def begin_decode(self, device: torch.device) -> None:
        """The next forward call carries one new token for every row."""
        self._pieces = None
        self.lengths += 1
        self._places = (torch.arange(len(self.lengths), device=device), (self.lengths - 1).to(device))
        self._longest = int(self.lengths.max())
        seen = torch.arange(self._longest) < self.lengths[:, None]
        self._seen = None if seen.all() else seen[:, None, None].to(device)

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
        if self._pieces is not None:
            return self._prefill(layer, query, key, value, scaling)
        assert self._places is not None  # begin_decode has set it
        rows, last = self._places
        self.keys[layer][rows, :, last] = key[:, :, 0]
        self.values[layer][rows, :, last] = value[:, :, 0]
        keys, values = (block[layer][:, :, : self._longest] for block in (self.keys, self.values))
        return _attend(query, keys, values, scaling, self._seen).transpose(1, 2)

    def _prefill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        assert self._pieces is not None
        sizes = [end - start for _, start, end in self._pieces]
        new = zip(*(t.split(sizes, dim=2) for t in (query, key, value)), strict=True)
        outputs = []
        for (row, start, end), (q, k, v) in zip(self._pieces, new, strict=True):
            self.keys[layer][row, :, start:end] = k[0]
            self.values[layer][row, :, start:end] = v[0]
            if start == 0:
                outputs.append(_attend(q, k, v, scaling, is_causal=True))
                continue
            keys, values = (block[layer][row : row + 1] for block in (self.keys, self.values))
            for part in q.split(MASKED_QUERIES, dim=2):
                now = start + part.shape[2]
                seen = torch.ones(part.shape[2], now, dtype=torch.bool, device=q.device).tril(start)
                outputs.append(_attend(part, keys[:, :, :now], values[:, :, :now], scaling, seen))
                start = now
        return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, seen: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, is_causal=is_causal, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
