"""Crops → CLIP → separators → projector → image tokens.

What comes in: flat crops of a row's pictures (per picture the global view, then its local crops), or this rank's share
of them, and a `Placement`. What goes out: one feature per image token of this rank's tokens. Surprise: the features are
CLIP's *last but one* layer without its final norm, so the 24th layer and `post_layernorm` are never computed; they are
no parameters here and pass from the base folder to an export untouched.

Crops come as normalised floats, or as bytes that are normalised here, on the device. When layers are recomputed in the
backward pass, many crops go through the tower in chunks (`ImageEmbedding.set_gradient_checkpointing` says why); without
gradients they always do.

Source: the published remote code of Phi-3-vision (`hd_transform_order` "sub_glb"); shapes in MODEL.md §4.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

from phi3v_dist.errors import CheckpointError
from phi3v_dist.model.placement import CELLS, ROW_END, SEPARATORS, SIDE, VIEW_END, Placement
from phi3v_dist.parallel.ulysses import ALONE, SequenceGroup

CLIP_VIT_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip

CROPS_WITHOUT_GRADIENTS = 16  # in one call of the tower: of ViT-L in bf16 a layer then makes about 0.2 GB


def clip_config(config: dict[str, Any]) -> CLIPVisionConfig:
    """The tower of a config.json: `img_processor.clip_config` where given, else ViT-L/14-336."""
    given = config["img_processor"].get("clip_config", {})
    fields = CLIP_VIT_L_336 | {name: value for name, value in given.items() if not name.startswith("_")}
    return CLIPVisionConfig(**fields | {"attn_implementation": "sdpa"})


@dataclass(frozen=True)
class Normalization:
    """Bytes → what CLIP was trained on: (x / 255 - mean) / std for red, green and blue.

    The numbers are those of a model folder's preprocessor_config.json; the processor reads them, and a Batch of uint8
    crops brings them to the model.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, mean: Any, std: Any) -> "Normalization":
        """From what the file says; CheckpointError when that is not three numbers each, deviations above 0."""
        if not _is_triple(mean) or not _is_triple(std) or not min(std) > 0:
            raise CheckpointError(
                f"pictures cannot be normalised by image_mean {mean} and image_std {std}: three numbers each are "
                "needed, those of image_std above 0; correct preprocessor_config.json of the model folder"
            )
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        return cls(mean, std)

    def __call__(self, pixels: UInt8[Tensor, "*crops 3 height width"]) -> Float[Tensor, "*crops 3 height width"]:
        """In fp32. Plain numbers, not tensors: to copy those to a GPU would make it wait."""
        values = pixels.to(torch.float32).div_(255)
        for channel, mean, std in zip(values.unbind(-3), self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)
        return values


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

    def forward(
        self, pixel_values: Float[Tensor, "crops 3 height width"], checkpoint_layers: bool = False
    ) -> Float[Tensor, "crops patches clip"]:
        model = self.vision_model
        hidden = model.pre_layrnorm(model.embeddings(pixel_values))
        for layer in model.encoder.layers:
            hidden = checkpoint(layer, hidden, None, use_reentrant=False) if checkpoint_layers else layer(hidden, None)
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
        self.set_gradient_checkpointing(False)

    def set_gradient_checkpointing(self, on: bool, chunk_crops: int | None = None) -> None:
        """Recompute in the backward pass: layer by layer, or chunk by chunk when there are many crops.

        chunk_crops: most crops in a chunk where a Batch does not say how many chunks to make; None: no limit.

        In one call every layer keeps its input until its turn comes: 26 MiB a crop (ViT-L, bf16), 23 GiB for the 888
        crops that a row of 131,072 tokens can hold, and that beside all the decoder keeps. In chunks, each recomputed
        as a whole, only pixels and features are kept. A chunk's activations, 521 MiB a crop (bytes saved for the
        backward pass, counted), 8 GiB for 16 crops, exist after the decoder's are gone, for one chunk at a time.
        Recomputing costs the same either way; every chunk more gathers the tower's weights (0.6 GB) again under ZeRO-3.
        """
        self.gradient_checkpointing, self.chunk_crops = on, chunk_crops

    def forward(
        self,
        pixel_values: Float[Tensor, "crops 3 height width"] | UInt8[Tensor, "crops 3 height width"],
        placement: Placement,
        normalization: Normalization | None = None,
        num_chunks: int | None = None,
        sequence: SequenceGroup = ALONE,
    ) -> Float[Tensor, "image_tokens hidden"]:
        """Features of the image tokens of this rank's slice, from this rank's share of the row's crops.

        Crops beyond that share belong to no picture; they keep the tower in the graph of a rank that has none.

        normalization: for uint8 crops. num_chunks: calls of the tower while it is checkpointed, filled up with crops
        of zeros; None: as many as its own crops need. Without checkpointing there is one call, always; without
        gradients as many as `CROPS_WITHOUT_GRADIENTS` asks for, for nobody then waits for another rank's calls.
        """
        crops = merge_patches(self._patches(pixel_values, normalization, num_chunks)).flatten(0, 2)
        ends = torch.cat([self.sub_GN.flatten()[None], self.glb_GN.flatten()[None]])  # by ROW_END and VIEW_END
        ends, cells = self.img_projection(torch.cat([ends, crops])).tensor_split([SEPARATORS])
        used, unused = cells.tensor_split([placement.num_crops * CELLS])
        received = sequence.exchange(used.index_select(0, placement.cells), placement.send, placement.receive)
        # Separators are put in by `where`: its gradient is a sum, where a look-up would add to one row many times.
        features = torch.cat([ends.detach(), received]).index_select(0, placement.sources)
        for source in (ROW_END, VIEW_END):
            features = torch.where((placement.sources == source)[:, None], ends[source], features)
        return features + 0.0 * unused.sum()

    def _patches(
        self, pixel_values: Tensor, normalization: Normalization | None, num_chunks: int | None
    ) -> Float[Tensor, "crops patches clip"]:
        if not torch.is_grad_enabled():
            chunks = pixel_values.split(CROPS_WITHOUT_GRADIENTS)
            return torch.cat([self._tower(chunk, normalization, checkpoint_layers=False) for chunk in chunks])
        recompute = self.gradient_checkpointing and self.training
        if num_chunks is None:
            num_chunks = -(-len(pixel_values) // self.chunk_crops) if self.chunk_crops else 1
        if num_chunks <= 1 or not recompute:
            return self._tower(pixel_values, normalization, checkpoint_layers=recompute)
        num_missing = num_chunks - len(pixel_values)
        if num_missing > 0:
            pixel_values = torch.cat([pixel_values, pixel_values.new_zeros(num_missing, *pixel_values.shape[1:])])
        chunks = pixel_values.tensor_split(num_chunks)  # of equal size, but for one crop
        patches = [checkpoint(self._tower, chunk, normalization, False, use_reentrant=False) for chunk in chunks]
        return torch.cat(patches)

    def _tower(
        self, pixel_values: Tensor, normalization: Normalization | None, checkpoint_layers: bool
    ) -> Float[Tensor, "crops patches clip"]:
        if pixel_values.dtype == torch.uint8:
            if normalization is None:
                raise ValueError("uint8 crops come with the `normalization` of their model folder; it is missing")
            pixel_values = normalization(pixel_values)
        return self.img_processor(pixel_values.to(self.glb_GN.dtype), checkpoint_layers)


def _is_triple(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) == 3 and all(isinstance(v, int | float) for v in values)


def merge_patches(patches: Float[Tensor, "crops patches clip"]) -> Float[Tensor, "crops side side merged"]:
    """2 x 2 neighbouring patches become one token: channels in order (row in pair, column in pair, channel)."""
    crops, _, channels = patches.shape
    grid = patches.view(crops, SIDE, 2, SIDE, 2, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(crops, SIDE, SIDE, 4 * channels)
