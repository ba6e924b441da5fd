"""A decoder layer's feed-forward part, over slices of the tokens.

What comes in: hidden states of a row. What goes out: the same, transformed. Surprise: in the backward pass of a
131,072-token row the inner states of one layer alone would take 6 GiB (bf16); in slices, each recomputed when its turn
comes, they take what one slice needs. ZeRO-3 must not notice the slices: it would gather the weights once for each, and
ranks with shorter rows would make fewer calls than the others. So the module is a leaf to it (`parallel/zero.py`),
gathered as a whole, once forward and once backward, whatever happens inside.

The price is one more forward pass of this part in the backward pass (of all slices but the last), beside that of the
layer's own checkpoint.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3MLP


class FeedForward(Phi3MLP):
    """`mlp`: SwiGLU, as transformers has it, in slices of at most `chunk_tokens` while it is trained."""

    def __init__(self, config: Phi3Config):
        super().__init__(config)
        self.chunk_tokens: int | None = None

    def forward(self, hidden: Float[Tensor, "rows tokens hidden"]) -> Float[Tensor, "rows tokens hidden"]:
        if self.chunk_tokens is None or not self.training or hidden.shape[1] <= self.chunk_tokens:
            return super().forward(hidden)
        whole = super().forward
        slices = hidden.split(self.chunk_tokens, dim=1)
        return torch.cat([checkpoint(whole, part, use_reentrant=False) for part in slices], dim=1)
