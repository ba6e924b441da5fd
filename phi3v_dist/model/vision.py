"""Crops → CLIP → separators → projector → image tokens.

What comes in: flat crops of all pictures (per picture the global view, then its local crops) and the pictures' sizes.
What goes out: one feature per image token, in prompt order. Surprise: the features are CLIP's *last but one* layer
without its final norm, so the 24th layer and `post_layernorm` are never computed; they are no parameters here and
pass from the base folder to an export untouched.

Source: the published remote code of Phi-3-vision (`hd_transform_order` "sub_glb"); shapes in MODEL.md §4.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

CROP_SIZE = 336
PATCHES_PER_SIDE = 24  # 336 / 14
SIDE = PATCHES_PER_SIDE // 2  # tokens per side of a crop, after 2 x 2 patches are merged
CLIP_VIT_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip


def clip_config(config: dict[str, Any]) -> CLIPVisionConfig:
    """The tower of a config.json: `img_processor.clip_config` where given, else ViT-L/14-336."""
    fields = CLIP_VIT_L_336 | config["img_processor"].get("clip_config", {})
    clip = CLIPVisionConfig(**fields)
    clip._attn_implementation = "sdpa"
    return clip


def num_image_tokens(height: int, width: int) -> int:
    """Tokens of a picture padded to height x width: rows end in a separator, one more stands between local and
    global."""
    rows, columns = height // CROP_SIZE * SIDE, width // CROP_SIZE * SIDE
    return rows * (columns + 1) + 1 + SIDE * (SIDE + 1)


def num_crops_of(height: int, width: int) -> int:
    """Crops of a picture padded to height x width, the global view included."""
    return (height // CROP_SIZE) * (width // CROP_SIZE) + 1


class ClipTower(nn.Module):
    """CLIP's encoder up to the last but one layer, under the official names (`vision_model.…`)."""

    def __init__(self, clip: CLIPVisionConfig):
        super().__init__()
        self.vision_model: Any = nn.Module()
        self.vision_model.embeddings = CLIPVisionEmbeddings(clip)
        self.vision_model.pre_layrnorm = nn.LayerNorm(clip.hidden_size, eps=clip.layer_norm_eps)  # sic: official name
        self.vision_model.encoder = nn.Module()
        layers = [CLIPEncoderLayer(clip) for _ in range(clip.num_hidden_layers - 1)]
        self.vision_model.encoder.layers = nn.ModuleList(layers)
        self.gradient_checkpointing = False

    def forward(self, pixel_values: Float[Tensor, "crops 3 height width"]) -> Float[Tensor, "crops patches clip"]:
        model = self.vision_model
        hidden = model.pre_layrnorm(model.embeddings(pixel_values))
        for layer in model.encoder.layers:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, None, use_reentrant=False)
            else:
                hidden = layer(hidden, None)
        return hidden[:, 1:]  # without the class token


class ImageEmbedding(nn.Module):
    """`model.vision_embed_tokens`: pictures → features for their token positions."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        clip = clip_config(config)
        merged = 4 * clip.hidden_size
        self.img_processor = ClipTower(clip)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged))
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config["hidden_size"]),
            nn.GELU(),
            nn.Linear(config["hidden_size"], config["hidden_size"]),
        )

    def forward(
        self, pixel_values: Float[Tensor, "crops 3 height width"], image_sizes: Int[Tensor, "images 2"]
    ) -> Float[Tensor, "image_tokens hidden"]:
        """Features of all pictures, then of crops that belong to none ("unplaced", each as a global view alone)."""
        patches = self.img_processor(pixel_values.to(self.glb_GN.dtype))
        crops = merge_patches(patches)
        pieces: list[Tensor] = []
        used = 0
        for height, width in image_sizes.tolist():
            rows, columns = height // CROP_SIZE, width // CROP_SIZE
            local = crops[used + 1 : used + 1 + rows * columns]
            local = local.view(rows, columns, SIDE, SIDE, -1).transpose(1, 2).reshape(rows * SIDE, columns * SIDE, -1)
            pieces += [self._end_rows(local), self.glb_GN[0], self._end_rows(crops[used])]
            used += 1 + rows * columns
        for unplaced in crops[used:]:
            pieces += [self.glb_GN[0], self._end_rows(unplaced)]
        return self.img_projection(torch.cat(pieces))

    def _end_rows(self, grid: Float[Tensor, "rows columns merged"]) -> Float[Tensor, "tokens merged"]:
        """The grid row by row, a separator after each row."""
        ends = self.sub_GN[0].expand(len(grid), 1, -1)
        return torch.cat([grid, ends], dim=1).flatten(0, 1)


def merge_patches(patches: Float[Tensor, "crops patches clip"]) -> Float[Tensor, "crops side side merged"]:
    """2 x 2 neighbouring patches become one token: channels in order (row in pair, column in pair, channel)."""
    crops, _, channels = patches.shape
    grid = patches.view(crops, SIDE, 2, SIDE, 2, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(crops, SIDE, SIDE, 4 * channels)
