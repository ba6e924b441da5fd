"""Position and the length that decides → cos and sin, with LongRoPE's short or long factors.

What comes in: position ids and, per token, the length that decides. What goes out: cos and sin for every layer, made
once per Batch. Surprise: the two official codes choose the factors for the whole *batch*, so a short document packed
or batched with a long one gets other values than alone. The rule here has a name (`model.longrope`):

    document      each document by its own length: packed equals alone (ours, the default)
    max_position  one choice for the batch, by its largest position + 1 (Phi-3-vision's code)
    key_length    one choice for the batch, by the padded length of its rows (Phi-3.5-vision's code)
    short, long   always these, for a serving engine that fixes its choice when it starts

docs/longrope.md says which to take. "Long" begins above the original length (4,096): a document of 4,096 is short.

Factors: Ding et al., "LongRoPE" (2024); inv_freq_i = 1 / (factor_i · theta^(2i/d)), and cos and sin are both
multiplied by sqrt(1 + ln(max / original) / ln(original)), on the short branch too.
"""

import math
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from phi3v_dist.config import LongRopeRule
from phi3v_dist.errors import CheckpointError, ConfigError


class LongRope:
    """Holds both lists of inverse frequencies, in fp32, on every device they were used on.

    A plain object, not a module: nothing may cast these numbers to bf16 or partition them.
    """

    def __init__(self, config: dict[str, Any], rule: str = "document"):
        """`config`: official config.json; a config without rope_scaling gives plain RoPE on both branches.

        Raises:
            ConfigError: there is no such rule.
            CheckpointError: config.json has another number of factors than its heads take.
        """
        if rule not in get_args(LongRopeRule):
            names = ", ".join(get_args(LongRopeRule))
            raise ConfigError(f"`model.longrope` is {rule!r}, which is no LongRoPE rule: choose one of {names}")
        self.rule = rule
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        self.original_length: int = config["original_max_position_embeddings"]
        scaling = _scaling(config)
        # On the CPU and in fp32 wherever the model is built: the meta device is overruled by naming the device, and
        # zero.Init, under which `torch.tensor` rounds its numbers to bf16, leaves `new_tensor` alone.
        cpu = torch.device("cpu")
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=cpu).float() / head_dim
        base = config.get("rope_theta", 10000.0) ** exponent
        ones = [1.0] * len(base)
        found = {name: len(scaling[name]) for name in ("short_factor", "long_factor") if name in scaling}
        if set(found.values()) - {len(base)}:
            raise CheckpointError(f"config.json: rope_scaling has {found}, but head_dim {head_dim} takes {len(base)}")
        factors = [base.new_tensor(scaling.get(name, ones)) for name in ("short_factor", "long_factor")]
        self._inv_freq = {cpu: torch.stack([1.0 / (factor * base) for factor in factors])}
        stretch = config["max_position_embeddings"] / self.original_length
        self.magnitude = math.sqrt(1 + math.log(stretch) / math.log(self.original_length)) if stretch > 1 else 1.0
        if not scaling:
            self.magnitude = 1.0

    def deciding(self, own: Int[Tensor, " tokens"], longest: int, row_length: int) -> Int[Tensor, " tokens"]:
        """For every token the length that decides.

        Args:
            own: length of each token's document.
            longest: largest position of the batch, plus 1. row_length: tokens of its rows, padding and all documents.
        """
        if self.rule == "max_position":
            return torch.full_like(own, longest)
        if self.rule == "key_length":
            return torch.full_like(own, row_length)
        return own

    def is_long(self, lengths: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether these deciding lengths take the long factors."""
        if self.rule in ("short", "long"):
            return torch.full_like(lengths, self.rule == "long", dtype=torch.bool)
        return lengths > self.original_length

    def __call__(
        self, position_ids: Int[Tensor, "rows tokens"], lengths: Int[Tensor, "rows tokens"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "rows tokens head_dim"], Float[Tensor, "rows tokens head_dim"]]:
        """cos and sin for tokens at `position_ids`, whose factors the `lengths` decide."""
        inv_freq = self._on(position_ids.device)
        chosen = inv_freq[self.is_long(lengths).long()]  # [rows, tokens, head_dim / 2]
        angles = position_ids[..., None].float() * chosen
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.magnitude).to(dtype), (angles.sin() * self.magnitude).to(dtype)

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._inv_freq:
            self._inv_freq[device] = self._inv_freq[torch.device("cpu")].to(device)
        return self._inv_freq[device]


def _scaling(config: dict[str, Any]) -> dict[str, Any]:
    """The two lists of factors, empty where the model was made for no more than its original length.

    Raises:
        CheckpointError: config.json says it in another form than the published one, or speaks of another scaling.
    """
    scaling = config.get("rope_scaling") or {}
    stretched = config["max_position_embeddings"] > config["original_max_position_embeddings"]
    known = scaling.get("type") in ("su", "longrope") and {"short_factor", "long_factor"} <= scaling.keys()
    if scaling and not known or not scaling and (stretched or "rope_parameters" in config):
        found = scaling or config.get("rope_parameters")
        raise CheckpointError(
            'config.json: LongRoPE is read from `rope_scaling` with "type": "su", short_factor and long_factor, as '
            f"published; found {str(found)[:80]}: use the model's own config.json (transformers 5 rewrites it)"
        )
    return scaling
