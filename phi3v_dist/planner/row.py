"""Sizes of a row → the forward pass of the real model on it, on fake tensors.

What comes in: config.json, how the model is trained, and a `RowShape`. What goes out: a `Timeline` of the real number of
layers and crops. Surprise: the model is called as `train/step.py` calls it, with a flat row, its layout and uint8 crops.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from phi3v_dist.config import ModelSettings, TrainSettings
from phi3v_dist.model.adapters import choose_trained
from phi3v_dist.model.attention import IGNORE, Layout
from phi3v_dist.model.backends import Backend
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.vision import CROP_SIZE, Normalization, clip_config, num_image_tokens
from phi3v_dist.planner import unroll
from phi3v_dist.planner.trace import ROW, VISION, Timeline, record

LAYOUT_TENSORS = ("cu_seqlens", "rope_lengths", "target_positions", "targets")
GREY = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class RowShape:
    """What a rank feeds forward.

    documents: tokens of each. label_tokens: positions that are trained. images: (height, width) of the padded pictures;
    a picture is one crop for each 336 pixels square, and one more. num_chunks: calls of the vision tower.
    """

    documents: tuple[int, ...]
    label_tokens: int
    images: tuple[tuple[int, int], ...] = ()
    num_chunks: int | None = None

    @property
    def tokens(self) -> int:
        return sum(self.documents)

    @property
    def crops(self) -> int:
        return sum(1 + height * width // CROP_SIZE**2 for height, width in self.images)


def full_row(tokens: int, crops: int, label_tokens: int | None = None, per_image: int = 17) -> RowShape:
    """One document with so many crops, cut into pictures alike."""
    side = (CROP_SIZE, CROP_SIZE * (per_image - 1))
    images = [side] * (crops // per_image)
    if rest := crops % per_image:
        images.append((CROP_SIZE, CROP_SIZE * max(rest - 1, 1)))
    return RowShape((tokens,), tokens if label_tokens is None else label_tokens, tuple(images))


def slice_of(row: RowShape, sequence: int) -> RowShape:
    """What one of the ranks that share a row computes: its part of the tokens, the labels and the pictures.

    An approximation of Ulysses: attention is traced as over the slice with all heads, which keeps as many bytes as the
    whole row with a part of the heads; what the exchanges themselves take, a layer's q, k and v once more, is left out.
    """
    if sequence == 1:
        return row
    tokens = -(-row.tokens // sequence)
    labels = -(-row.label_tokens // sequence)
    return RowShape((tokens,), labels, row.images[: -(-len(row.images) // sequence)])


def timeline(
    config: dict[str, Any], model: ModelSettings, train: TrainSettings, row: RowShape, dtype: torch.dtype
) -> Timeline:
    """Of a step of this model on this row, without what ZeRO-3 adds."""
    chunks = row.num_chunks or max(1, -(-row.crops // model.vision_chunk_crops))
    per_chunk = -(-row.crops // chunks)
    if not model.gradient_checkpointing or chunks <= unroll.TRACED + 1 or per_chunk < 2:
        found = _trace(config, model, train, row, dtype)
    else:
        traced = [
            _trace(config, model, train, _with_chunks(row, number, per_chunk), dtype)
            for number in (unroll.TRACED, unroll.TRACED + 1)
        ]
        found = unroll.more_rounds(*traced, chunks)
    found = unroll.more_layers(found, unroll.TOWER, clip_config(config).num_hidden_layers - 1)
    return unroll.more_layers(found, unroll.DECODER, config["num_hidden_layers"])


def _with_chunks(row: RowShape, chunks: int, per_chunk: int) -> RowShape:
    image = (CROP_SIZE, CROP_SIZE * (per_chunk - 1))
    return replace(row, images=(image,) * chunks, num_chunks=chunks)


def shallow(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with no more layers than are traced."""
    clip = clip_config(config).to_dict()
    clip["num_hidden_layers"] = min(clip["num_hidden_layers"], unroll.TRACED + 1)  # the last one is never made
    picture = config["img_processor"] | {"clip_config": clip}
    return config | {"num_hidden_layers": min(config["num_hidden_layers"], unroll.TRACED), "img_processor": picture}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(
    config: dict[str, Any], model: ModelSettings, train: TrainSettings, dtype: torch.dtype
) -> Phi3VForCausalLM:
    """The model as a run builds it, under the mode that is active."""
    with default_dtype(dtype):
        made = Phi3VForCausalLM(config, model.longrope, Backend("sdpa"))
        choose_trained(made, train, seed=0)
    made.train()
    made.set_gradient_checkpointing(model.gradient_checkpointing, model.vision_chunk_crops)
    return made


def inputs_of(row: RowShape) -> dict[str, Any]:
    """A Batch's arguments for such a row: real tensors, all of them small but the crops, which are left out."""
    labels = torch.full((row.tokens,), IGNORE)
    layout = Layout.of(row.documents, labels)
    positions = torch.arange(max(1, row.label_tokens)) % row.tokens
    layout = replace(layout, target_positions=positions, targets=torch.zeros_like(positions), num_targets=len(positions))
    ids = torch.zeros(1, row.tokens, dtype=torch.int64)
    placed = sum(num_image_tokens(height, width) for height, width in row.images)
    ids[:, : min(placed, row.tokens)] = -1
    return {
        "input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in row.documents])[None],
        "image_sizes": torch.tensor(row.images, dtype=torch.int64).reshape(-1, 2), "layout": layout,
        "normalization": GREY, "num_vision_chunks": row.num_chunks,
    }  # fmt: skip


def _trace(
    config: dict[str, Any], model: ModelSettings, train: TrainSettings, row: RowShape, dtype: torch.dtype
) -> Timeline:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    arguments = faked(inputs_of(row), mode)
    with mode:
        made = build(shallow(config), model, train, dtype)
        arguments["pixel_values"] = torch.empty(max(1, row.crops), 3, CROP_SIZE, CROP_SIZE, dtype=torch.uint8)
        held = [(tensor, ROW) for tensor in tensors_of(arguments)] + [(arguments["pixel_values"], VISION)]
        away = model.offload_activations and model.gradient_checkpointing
        return record(made, lambda: made(**arguments).token_losses.sum() * 1.0, held, away)


def faked(arguments: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    """The same arguments, the sizes of pictures apart, without content."""
    layout: Layout = arguments["layout"]
    fakes = {name: mode.from_tensor(getattr(layout, name)) for name in LAYOUT_TENSORS}
    ids, places = (mode.from_tensor(arguments[name]) for name in ("input_ids", "position_ids"))
    return arguments | {"layout": replace(layout, **fakes), "input_ids": ids, "position_ids": places}


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    """Of a batch, on the device, without the crops."""
    layout = arguments["layout"]
    return [arguments["input_ids"], arguments["position_ids"], *(getattr(layout, name) for name in LAYOUT_TENSORS)]
