"""Sizes of a row → the forward pass of the real model on it, on fake tensors.

What comes in: config.json, how the model is trained, and a `RowShape`. What goes out: a `Timeline` of the real number
of layers and crops. Surprise: the model is called as `train/step.py` calls it: a flat row, its layout and uint8 crops.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from phi3v_dist.config import ModelSettings, TrainSettings
from phi3v_dist.data.plan import PlannedRow
from phi3v_dist.model.adapters import choose_trained
from phi3v_dist.model.attention import IGNORE, Layout
from phi3v_dist.model.backends import Backend
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.placement import CROP_SIZE, Placement, num_crops_of, num_image_tokens
from phi3v_dist.model.vision import Normalization, clip_config
from phi3v_dist.parallel.ulysses import ALONE, SequenceGroup
from phi3v_dist.planner import unroll
from phi3v_dist.planner.trace import ROW, VISION, Timeline, record

GREY = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_KNOWN: dict[str, Timeline] = {}


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
        return sum(num_crops_of(height, width) for height, width in self.images)


def full_row(tokens: int, crops: int, label_tokens: int | None = None, per_image: int = 17) -> RowShape:
    """One document with so many crops, cut into pictures alike."""
    side = (CROP_SIZE, CROP_SIZE * (per_image - 1))
    images = [side] * (crops // per_image)
    if rest := crops % per_image:
        images.append((CROP_SIZE, CROP_SIZE * max(rest - 1, 1)))
    return RowShape((tokens,), tokens if label_tokens is None else label_tokens, tuple(images))


def shape_of(rows: Sequence[PlannedRow]) -> RowShape:
    """The row that stands for all: the longest of these, with the most crops of any, its documents made alike."""
    largest = max(rows, key=lambda row: row.tokens)
    count = max(1, round(largest.tokens**2 / largest.squared_tokens))  # as many as have the same sum of squares
    borders = [number * largest.tokens // count for number in range(count + 1)]
    images = full_row(largest.tokens, max(row.crops for row in rows)).images
    return RowShape(tuple(end - begin for begin, end in itertools.pairwise(borders)), largest.label_tokens, images)


class TracedGroup(SequenceGroup):
    """Ranks that share a row, without the others: exchanges allocate what they would, and send nothing."""

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        received: Tensor = _Exchange.apply(rows, list(send), list(receive))
        return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        ctx.send = send
        rows = rows.contiguous()
        return rows.new_empty(sum(receive), *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient = gradient.contiguous()
        return gradient.new_empty(sum(ctx.send), *gradient.shape[1:]), None, None


def timeline(
    config: dict[str, Any], model: ModelSettings, train: TrainSettings, row: RowShape, dtype: torch.dtype,
    sequence: int = 1,
) -> Timeline:  # fmt: skip
    """Of a step of this model on this row, or on the last slice of it, without what ZeRO-3 adds.

    It takes seconds, so that it is remembered: plans that differ by DeepSpeed's file alone share it.

    sequence: ranks that share the row.
    """
    told = [json.dumps(config, sort_keys=True), model.model_dump_json(), train.model_dump_json(), row, dtype, sequence]
    if (key := str(told)) not in _KNOWN:
        _KNOWN[key] = _timeline(config, model, train, row, dtype, sequence)
    return _KNOWN[key]


def _timeline(
    config: dict[str, Any], model: ModelSettings, train: TrainSettings, row: RowShape, dtype: torch.dtype, sequence: int
) -> Timeline:  # fmt: skip
    crops = -(-row.crops // sequence)
    chunks = row.num_chunks or max(1, -(-crops // model.vision_chunk_crops))
    per_chunk = -(-crops // chunks)
    if not model.gradient_checkpointing or chunks <= unroll.TRACED + 1 or per_chunk < 2:
        found = _trace(config, model, train, replace(row, num_chunks=chunks), dtype, sequence)
    else:
        few, one_more = (
            _trace(config, model, train, _with_chunks(row, number, per_chunk, sequence), dtype, sequence)
            for number in (unroll.TRACED, unroll.TRACED + 1)
        )
        found = unroll.more_rounds(few, one_more, chunks)
    found = unroll.more_layers(found, unroll.TOWER, clip_config(config).num_hidden_layers - 1)
    return unroll.more_layers(found, unroll.DECODER, config["num_hidden_layers"])


def _with_chunks(row: RowShape, chunks: int, per_chunk: int, sequence: int) -> RowShape:
    image = (CROP_SIZE, CROP_SIZE * (per_chunk - 1))
    return replace(row, images=(image,) * chunks * sequence, num_chunks=chunks)


def shallow(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with no more layers than are traced."""
    clip = clip_config(config).to_dict()
    clip["num_hidden_layers"] = min(clip["num_hidden_layers"], unroll.TRACED + 1)  # the last one is never made
    picture = config["img_processor"] | {"clip_config": clip}
    return config | {"num_hidden_layers": min(config["num_hidden_layers"], unroll.TRACED), "img_processor": picture}


def build(
    config: dict[str, Any], model: ModelSettings, train: TrainSettings, dtype: torch.dtype, mode: FakeTensorMode
) -> Phi3VForCausalLM:
    """The model as a run builds it, its parameters fake."""
    made = Phi3VForCausalLM.without_weights(config, model.longrope, Backend("sdpa"))
    with torch.device("meta"):
        prepare(made, model, train)
    with mode:
        fakes = {name: torch.empty(parameter.shape, dtype=dtype) for name, parameter in made.named_parameters()}
    made.load_state_dict(fakes, strict=False, assign=True)  # buffers stay as they are
    return made


def prepare(made: Phi3VForCausalLM, model: ModelSettings, train: TrainSettings) -> None:
    """What of it is trained, and what is recomputed."""
    choose_trained(made, train, seed=0)
    made.train()
    made.set_gradient_checkpointing(model.gradient_checkpointing, model.vision_chunk_crops, model.mlp_chunk_tokens)


def inputs_of(row: RowShape, group: SequenceGroup = ALONE) -> dict[str, Any]:
    """A Batch's arguments for such a row, or a slice of it: real tensors, without the crops, which are large.

    Labels and the tokens of pictures are spread evenly over the row.
    """
    missing = -row.tokens % group.size
    documents = (*row.documents, missing) if missing else row.documents
    total = sum(documents)
    labels = torch.full((total,), IGNORE)
    labels[torch.linspace(1, total - 1, min(row.label_tokens, total - 1)).long()] = 0
    placed = sum(num_image_tokens(height, width) for height, width in row.images)
    places = torch.arange(placed) * total // max(placed, 1)
    tokens = total // group.size
    begin, end = tokens * group.rank, tokens * (group.rank + 1)
    sizes = torch.tensor(row.images, dtype=torch.int64).reshape(-1, 2)
    return {
        "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "position_ids": torch.cat([torch.arange(length) for length in documents])[None, begin:end].contiguous(),
        "layout": Layout.of(documents, labels).cut(begin, end), "placement": Placement.of(sizes, places, tokens, group),
        "normalization": GREY, "num_vision_chunks": row.num_chunks, "sequence": group,
    }  # fmt: skip


def crops_of(row: RowShape, group: SequenceGroup = ALONE) -> Tensor:
    """The share of a rank: bytes, not set."""
    return torch.empty(max(1, len(group.share(row.crops))), 3, CROP_SIZE, CROP_SIZE, dtype=torch.uint8)


def _trace(
    config: dict[str, Any], model: ModelSettings, train: TrainSettings, row: RowShape, dtype: torch.dtype,
    sequence: int,
) -> Timeline:  # fmt: skip
    mode, group = (
        FakeTensorMode(allow_non_fake_inputs=True),
        TracedGroup(sequence, sequence - 1) if sequence > 1 else ALONE,
    )
    arguments = faked(inputs_of(row, group), mode)
    made = build(shallow(config), model, train, dtype, mode)
    with mode:
        arguments["pixel_values"] = crops_of(row, group)
        crops = arguments["pixel_values"]
        held = [(tensor, VISION if tensor is crops else ROW) for tensor in tensors_of(arguments)]
        away = model.offload_activations and model.gradient_checkpointing
        return record(made, lambda: made(**arguments).token_losses.sum() * 1.0, held, away)


def faked(arguments: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    """The same arguments without content."""

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return mode.from_tensor(value)
        if isinstance(value, Layout | Placement):
            fakes: dict[str, Any] = {name: fake(each) for name, each in vars(value).items()}
            return replace(value, **fakes)
        return value

    return {name: fake(value) for name, value in arguments.items()}


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    """Of a batch, on the device."""
    parts = (vars(value).values() if isinstance(value, Layout | Placement) else [value] for value in arguments.values())
    return [value for part in parts for value in part if isinstance(value, Tensor)]
