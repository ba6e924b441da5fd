"""Hidden states at trained positions → one loss per label token, without a logits matrix.

What comes in: hidden states and targets. What goes out: fp32 losses, one per target, which the training step sums.
Surprise: the loss is computed inside the head module. ZeRO-3 gathers a weight while its own module runs, so a loss
taken outside would find an empty one. Chunking is torch's own (`linear_cross_entropy` with options): the widely used
fused kernels that run backward inside forward scale the head's gradient wrongly under accumulation (LONGCONTEXT.md
§4).
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from phi3v_dist.model.attention import IGNORE


class Head(nn.Linear):
    """`lm_head`: hidden → logits, or hidden and targets → losses."""

    def forward(
        self, hidden: Float[Tensor, "*positions hidden"], targets: Int[Tensor, " positions"] | None = None
    ) -> Float[Tensor, "*positions vocab"] | Float[Tensor, " positions"]:
        if targets is None:
            return super().forward(hidden)
        losses = F.linear_cross_entropy(
            hidden, self.weight, targets, reduction="none", ignore_index=IGNORE, options=nn.LinearCrossEntropyOptions()
        )
        return losses.float()
