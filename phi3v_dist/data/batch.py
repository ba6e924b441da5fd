"""Examples → `Row` → `Batch`: what one rank feeds forward, as one flat row of tokens.

Axis names used in shapes everywhere:

    tokens     positions of a row, all documents one after another
    documents  segments of a row that do not see each other (an example, or filling at the end)
    targets    positions whose next token is trained
    images     pictures, in prompt order         crops   336-pixel squares, per picture global view first
    rows, hidden, heads, vocab, height, width    as usual

Surprise: everything the model would otherwise have to ask the device for (document borders, which positions carry a
label) is worked out here on the CPU, so that no layer ever waits for the device.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from phi3v_dist.data.plan import PlannedStep
from phi3v_dist.model.attention import IGNORE, Layout
from phi3v_dist.model.vision import CROP_SIZE, Normalization

# fp32 and normalised, or the pixels themselves
Crops = Float[Tensor, "crops 3 height width"] | UInt8[Tensor, "crops 3 height width"]


@dataclass(frozen=True)
class Example:
    """One sample, encoded.

    input_ids: int64; the positions of picture k (1-based, prompt order) hold -k.
    labels: int64, not shifted; -100 where nothing is learned.
    pixel_values: fp32 and normalised, or (fast crops) uint8 pixels; real crops only, per picture the global view
        first, then row-major locals.
    image_sizes: int64 (height, width) of each padded picture; a picture has height*width/336² local crops.
    """

    sample_id: int
    input_ids: Int[Tensor, " tokens"]
    labels: Int[Tensor, " tokens"]
    pixel_values: Crops
    image_sizes: Int[Tensor, "images 2"]


@dataclass(frozen=True)
class Row:
    """Examples that share one row, in order.

    A quarantined sample is a `Filling` of the length it was planned with: the plan never moves.
    """

    parts: tuple["Example | Filling", ...]


@dataclass(frozen=True)
class Filling:
    """Tokens that carry nothing: a quarantined sample (with its name and the reason), or an empty row."""

    num_tokens: int
    sample_id: int | None = None
    name: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Batch:
    """What one rank feeds forward: one flat row.

    The loader writes crops to memory that it uses again: `pixel_values` holds until the next Batch is asked for.
    Whoever keeps a Batch longer copies them.

    input_ids: int64; picture positions are negative. position_ids: int64, 0 again at every document.
    labels: int64, not shifted; -100 where nothing is learned.
    pixel_values: real crops in prompt order; if there is none, one crop of zeros, whose features no position takes,
        so that every rank makes the same calls.
    image_sizes: one (height, width) per placed picture.
    layout: document borders and label positions, worked out on the CPU.
    normalization: what the model does with uint8 crops; None: they are normalised fp32.
    num_vision_chunks: in how many calls the vision tower takes the crops when it checkpoints; planned, so equal on
        every rank whatever its own crops are. None: the model decides by its own crops.
    plan: the step this batch belongs to, the same on every rank; None outside training.
    quarantined: samples of this batch that could not be used.
    """

    input_ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    labels: Int[Tensor, "1 tokens"]
    pixel_values: Crops
    image_sizes: Int[Tensor, "images 2"]
    layout: Layout
    normalization: Normalization | None = None
    num_vision_chunks: int | None = None
    plan: PlannedStep | None = None
    quarantined: tuple[Filling, ...] = ()

    @property
    def label_tokens(self) -> int:
        return self.layout.num_targets

    def inputs(self, device: torch.device) -> dict[str, object]:
        """Arguments of the model's forward, on the device."""
        return {
            "input_ids": self.input_ids.to(device, non_blocking=True),
            "position_ids": self.position_ids.to(device, non_blocking=True),
            "pixel_values": self.pixel_values.to(device, non_blocking=True),
            "image_sizes": self.image_sizes,
            "layout": self.layout.to(device),
            "normalization": self.normalization,
            "num_vision_chunks": self.num_vision_chunks,
        }


def collate(
    row: Row,
    pad_id: int,
    plan: PlannedStep | None = None,
    normalization: Normalization | None = None,
    num_vision_chunks: int | None = None,
    slot: Crops | None = None,
) -> Batch:
    """Lay a row's parts one after another.

    Args:
        normalization: comes with fast crops, and only with them.
        slot: memory with room for all crops of the row, and for one; where they lie in it already, in their order,
            nothing is copied. None: fresh memory.
    """
    dtype = torch.float32 if normalization is None else torch.uint8
    ids, labels, lengths, pixels, sizes = [], [], [], [], []
    for part in row.parts:
        if isinstance(part, Filling):
            ids.append(torch.full((part.num_tokens,), pad_id))
            labels.append(torch.full((part.num_tokens,), IGNORE))
        else:
            ids.append(part.input_ids)
            labels.append(part.labels)
            pixels.append(part.pixel_values)
            sizes.append(part.image_sizes)
        lengths.append(len(ids[-1]))
    assert all(crops.dtype == dtype for crops in pixels)  # a run has one kind of crops
    if slot is None:
        slot = torch.empty(max(1, sum(map(len, pixels))), 3, CROP_SIZE, CROP_SIZE, dtype=dtype)
    labels_row = torch.cat(labels)
    return Batch(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        labels=labels_row[None],
        pixel_values=_close_up(pixels, slot),
        image_sizes=torch.cat(sizes) if sizes else torch.zeros(0, 2, dtype=torch.int64),
        layout=Layout.of(lengths, labels_row),
        normalization=normalization,
        num_vision_chunks=num_vision_chunks,
        plan=plan,
        quarantined=tuple(part for part in row.parts if isinstance(part, Filling) and part.sample_id is not None),
    )


def _close_up(pixels: list[Tensor], slot: Tensor) -> Tensor:
    """The crops one after another from the slot's beginning; a quarantined picture leaves a gap where it was to be."""
    end = 0
    for crops in pixels:
        place = slot[end : end + len(crops)]
        if place.data_ptr() != crops.data_ptr():
            place.copy_(crops.clone())  # the two may overlap
        end += len(crops)
    return slot[:end] if end else slot[:1].zero_()
