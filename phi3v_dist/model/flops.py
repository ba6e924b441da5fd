"""config.json and what is trained → floating-point operations of a row.

What comes in: the model's sizes, how each part is trained. What goes out: `Flops`, the work for a token, a label, a
squared length and a crop. Surprise: at 131,072 tokens the squares are three quarters of the work, so that two full rows
differ by a factor of three. By these figures rows are dealt out to ranks (`data/plan.py`).

A multiplication and the addition after it count as 2. For each weight and token there are 2 in the forward pass, 2 in
the backward pass for the gradient of the activations, and 2 for that of the weight if it is trained (Kaplan et al.,
"Scaling Laws for Neural Language Models", 2020, §2.1). Left out: norms, look-ups, the softmax, and adapters, which at
rank 16 are under 2 %.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from phi3v_dist.config import PartsSettings
from phi3v_dist.data.plan import PlannedRow
from phi3v_dist.model.official_config import head_dim
from phi3v_dist.model.placement import CELLS, CROP_SIZE, PATCHES_PER_SIDE
from phi3v_dist.model.vision import clip_config

PATCHES = PATCHES_PER_SIDE**2
PATCH_PIXELS = (CROP_SIZE // PATCHES_PER_SIDE) ** 2


@dataclass(frozen=True)
class Work:
    """Operations by part. attention: between tokens, the half that a causal mask leaves. vision: and projector."""

    text: int
    attention: int
    vision: int

    @property
    def causal(self) -> int:
        return self.text + self.attention + self.vision

    @property
    def full(self) -> int:
        """By the convention of PaLM and many trainers since, as if every token saw its whole document."""
        return self.causal + self.attention


@dataclass(frozen=True)
class Flops:
    """Operations of a forward and a backward pass."""

    per_token: int
    per_label_token: int
    per_squared_token: int
    per_crop: int

    def of_row(self, row: PlannedRow) -> int:
        """Of what a row holds; padding and unplaced crops are no useful work."""
        return (
            self.per_token * row.tokens
            + self.per_label_token * row.label_tokens
            + self.per_squared_token * row.squared_tokens
            + self.per_crop * row.crops
        )

    def useful(self, rows: Iterable[PlannedRow]) -> Work:
        """By the convention of MFU: the head counts for every token, as in 6 · N · tokens, although `Head` leaves out
        those without a label; so figures can be compared with those of other trainers (OBSERVABILITY.md §3)."""
        rows = list(rows)
        return Work(
            text=(self.per_token + self.per_label_token) * sum(row.tokens for row in rows),
            attention=self.per_squared_token * sum(row.squared_tokens for row in rows),
            vision=self.per_crop * sum(row.crops for row in rows),
        )


def flops(config: dict[str, Any], parts: PartsSettings, recompute: bool = False) -> Flops:
    """Of a model and what is trained of it.

    Args:
        recompute: count the forward pass that gradient checkpointing repeats, of decoder layers and vision tower. It is
            time that a row takes; it is no part of MFU.
    """
    vision_is_trained = parts.vision != "frozen"
    text = _passes(parts.text, trained_below=vision_is_trained or parts.projector != "frozen")
    projector = _passes(parts.projector, trained_below=vision_is_trained)
    vision = _passes(parts.vision, trained_below=False)
    # Attention has no weights: its backward pass is twice its forward pass, whatever is trained.
    again = 1 if recompute else 0
    return Flops(
        per_token=(text + again) * decoder_token(config),
        per_label_token=text * 2 * config["hidden_size"] * config["vocab_size"],  # `Head` sees no other positions
        per_squared_token=(3 + again) * attention_pair(config),
        per_crop=(vision + again * vision_is_trained) * tower_crop(config) + projector * projector_crop(config),
    )


def _passes(how: str, trained_below: bool) -> int:
    """Of a part's forward work: itself, the gradient of its activations if any is wanted, that of its weights."""
    return 1 + (how != "frozen" or trained_below) + (how == "full")


def decoder_token(config: dict[str, Any]) -> int:
    """Forward work of all decoder layers for a token: 2 a weight. Fused q, k, v and the output; gate, up and down."""
    hidden, size = config["hidden_size"], head_dim(config)
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads", num_heads)
    attention = hidden * size * (num_heads + 2 * num_kv_heads) + num_heads * size * hidden
    return 2 * config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"])


def attention_pair(config: dict[str, Any]) -> int:
    """Forward work of attention for a squared token of a document, causal: q · k and the sum of v, 2 · hidden each for
    a pair of tokens, of which there are length² / 2 (MODEL.md §10: 6 · layers · hidden, forward and backward)."""
    return 2 * config["num_hidden_layers"] * config["num_attention_heads"] * head_dim(config)


def tower_crop(config: dict[str, Any]) -> int:
    """Forward work of CLIP for a crop: patches, and every layer but the last, with attention in both directions."""
    clip = clip_config(config)
    hidden, tokens = clip.hidden_size, PATCHES + 1
    weights = 4 * hidden**2 + 2 * hidden * clip.intermediate_size
    layer = 2 * weights * tokens + 4 * hidden * tokens**2
    return (clip.num_hidden_layers - 1) * layer + 2 * 3 * PATCH_PIXELS * hidden * PATCHES


def projector_crop(config: dict[str, Any]) -> int:
    """Forward work of the projector's two matrices for a crop: 4 patches become one token. Separators are projected
    once for all pictures."""
    merged, hidden = 4 * clip_config(config).hidden_size, config["hidden_size"]
    return 2 * (merged * hidden + hidden**2) * CELLS
