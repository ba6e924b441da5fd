"""Examples → `Row` → `Batch`: what one rank feeds forward, a flat row of tokens or its slice of one.

Axis names used in shapes everywhere:

    tokens     positions of a row, all documents one after another
    documents  segments of a row that do not see each other (an example, or filling at the end)
    targets    positions whose next token is trained
    images     pictures, in prompt order         crops   336-pixel squares, per picture global view first
    rows, hidden, heads, vocab, height, width    as usual

Surprise: everything the model would otherwise have to ask the device for (document borders, which positions carry a
label, which feature each picture token takes) is worked out here on the CPU: no layer ever waits for the device.

Ranks that share a row (`parallel/ulysses.py`) each make the whole row and keep a slice of its tokens and a share of its
crops. Labels are shifted, and positions and document lengths counted, on the whole row, before it is cut.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from phi3v_dist.data.plan import PlannedStep
from phi3v_dist.model.attention import IGNORE, Layout
from phi3v_dist.model.placement import CROP_SIZE, Placement
from phi3v_dist.model.vision import Normalization
from phi3v_dist.parallel.ulysses import ALONE, SequenceGroup

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

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Row:
    """Examples that share one row, in order.

    A quarantined sample is a `Filling` of the length it was planned with: the plan never moves.
    """

    parts: tuple["Example | Filling", ...]

    def without(self, missing: Iterable["Filling"]) -> "Row":
        """The same row with these in the place of the samples whose ids they carry."""
        fillings = {filling.sample_id: filling for filling in missing}
        return Row(tuple(part if part.sample_id is None else fillings.get(part.sample_id, part) for part in self.parts))


@dataclass(frozen=True)
class Filling:
    """Tokens that carry nothing: a quarantined sample (with its name and the reason), or an empty row."""

    num_tokens: int
    sample_id: int | None = None
    name: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Batch:
    """What one rank feeds forward: one flat row, or its slice of a row that several ranks share.

    The loader writes crops to memory that it uses again: `pixel_values` holds until the next Batch is asked for.
    Whoever keeps a Batch longer copies them.

    input_ids: int64; picture positions are negative. position_ids: int64, 0 again at every document.
    pixel_values: this rank's share of the row's crops, in prompt order; if there is none, one crop of zeros, whose
        features no position takes, so that every rank makes the same calls.
    layout: document borders of the row and label positions, worked out on the CPU.
    placement: the same for pictures.
    row: what the whole row is made of, its examples' crops where they lie now.
    sequence: the ranks that share the row.
    normalization: what the model does with uint8 crops; None: they are normalised fp32.
    num_vision_chunks: in how many calls the vision tower takes the crops when it checkpoints; planned, so equal on
        every rank whatever its own crops are. None: the model decides by its own crops.
    plan: the step this batch belongs to, the same on every rank; None outside training.
    """

    input_ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    pixel_values: Crops
    layout: Layout
    placement: Placement
    row: Row
    sequence: SequenceGroup = ALONE
    normalization: Normalization | None = None
    num_vision_chunks: int | None = None
    plan: PlannedStep | None = None

    @property
    def label_tokens(self) -> int:
        """Of this rank's slice."""
        return self.layout.num_targets

    @property
    def quarantined(self) -> tuple[Filling, ...]:
        """Samples of the row that could not be used."""
        return tuple(part for part in self.row.parts if isinstance(part, Filling) and part.sample_id is not None)

    @property
    def image_sizes(self) -> Int[Tensor, "images 2"]:
        """(height, width) of the row's pictures, padded."""
        return _sizes(self.row.parts)

    def inputs(self, device: torch.device) -> dict[str, object]:
        """Arguments of the model's forward, on the device."""
        return {
            "input_ids": self.input_ids.to(device, non_blocking=True),
            "position_ids": self.position_ids.to(device, non_blocking=True),
            "pixel_values": self.pixel_values.to(device, non_blocking=True),
            "layout": self.layout.to(device),
            "placement": self.placement.to(device),
            "normalization": self.normalization,
            "num_vision_chunks": self.num_vision_chunks,
            "sequence": self.sequence,
        }


def collate(
    row: Row,
    pad_id: int,
    plan: PlannedStep | None = None,
    normalization: Normalization | None = None,
    num_vision_chunks: int | None = None,
    slot: Crops | None = None,
    sequence: SequenceGroup = ALONE,
) -> Batch:
    """Lay a row's parts one after another, and cut out what this rank takes of it.

    Args:
        normalization: comes with fast crops, and only with them.
        slot: memory with room for all crops of the row, and for one; where they lie in it already, in their order,
            nothing is copied. None: fresh memory.
        sequence: the ranks that share the row. It is filled up to a multiple of their number, the filling a document
            of its own.
    """
    if missing := -sum(part.num_tokens for part in row.parts) % sequence.size:
        row = Row((*row.parts, Filling(missing)))
    parts = [_laid_out(part, pad_id) for part in row.parts]
    ids, labels, positions = (torch.cat(column) for column in zip(*parts, strict=True))
    row, crops = _close_up(row, slot, torch.float32 if normalization is None else torch.uint8)
    num_tokens = len(ids) // sequence.size
    begin, end = num_tokens * sequence.rank, num_tokens * (sequence.rank + 1)
    own = sequence.share(len(crops))
    return Batch(
        input_ids=ids[None, begin:end],
        position_ids=positions[None, begin:end],
        pixel_values=crops[own.start : own.stop] if own else crops.new_zeros(1, *crops.shape[1:]),
        layout=Layout.of([part.num_tokens for part in row.parts], labels).cut(begin, end),
        placement=Placement.of(_sizes(row.parts), (ids < 0).nonzero().flatten(), num_tokens, sequence),
        row=row, sequence=sequence, normalization=normalization, num_vision_chunks=num_vision_chunks, plan=plan,
    )  # fmt: skip


def _laid_out(part: Example | Filling, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and positions of a part's tokens."""
    positions = torch.arange(part.num_tokens)
    if isinstance(part, Example):
        return part.input_ids, part.labels, positions
    return torch.full_like(positions, pad_id), torch.full_like(positions, IGNORE), positions


def _sizes(parts: tuple[Example | Filling, ...]) -> Int[Tensor, "images 2"]:
    sizes = [part.image_sizes for part in parts if isinstance(part, Example)]
    return torch.cat(sizes) if sizes else torch.zeros(0, 2, dtype=torch.int64)


def _close_up(row: Row, slot: Crops | None, dtype: torch.dtype) -> tuple[Row, Tensor]:
    """The crops one after another from the slot's beginning, and the row whose examples have them there.

    A quarantined picture leaves a gap where it was to be.
    """
    num_crops = sum(len(part.pixel_values) for part in row.parts if isinstance(part, Example))
    if slot is None:
        slot = torch.empty(num_crops, 3, CROP_SIZE, CROP_SIZE, dtype=dtype)
    end, parts = 0, list(row.parts)
    for number, part in enumerate(parts):
        if not isinstance(part, Example):
            continue
        assert part.pixel_values.dtype == dtype  # a run has one kind of crops
        place = slot[end : end + len(part.pixel_values)]
        if place.data_ptr() != part.pixel_values.data_ptr():
            place.copy_(part.pixel_values.clone())  # the two may overlap
        parts[number] = replace(part, pixel_values=place)
        end += len(place)
    return Row(tuple(parts)), slot[:end]
