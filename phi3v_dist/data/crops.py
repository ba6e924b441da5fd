"""A picture → the 336-pixel squares CLIP sees: local crops of the enlarged, padded picture and one global view.

What comes in: a picture and the greatest number of crops; what goes out: its crops, or, from width and height alone,
their number and that of the tokens they become. Surprise: pictures are *enlarged* to use up the crops allowed: one
pixel becomes 4 x 4 crops and 2,509 tokens when 16 are allowed.

There are two ways to write crops. *Exact*: normalised fp32, local crops equal to the published processor's to the last
bit. *Fast*: the pixels as bytes, a quarter of the memory and several times as fast (`make bench`), normalised later by
the model. Local crops of a photo then differ from the exact ones by 0.02 grey steps on average and 2 at most, its
global view by half a step on average.

Source: the image processor published with microsoft/Phi-3-vision-128k-instruct (its HD transform);
tests/golden/image_processor.json holds its output.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from phi3v_dist.errors import DataError
from phi3v_dist.model import placement
from phi3v_dist.model.placement import CROP_SIZE
from phi3v_dist.model.vision import Normalization

WHITE = 255

CropMode = Literal["fast", "exact"]
Picture = Image.Image | UInt8[np.ndarray, "_height _width 3"]


@dataclass(frozen=True)
class CropLayout:
    """Where a picture goes on its grid of crops; follows from width, height and `num_crops` alone.

    resized_hw: height and width in pixels the picture is scaled to, its ratio kept.
    padded_hw: the same, filled up with white to multiples of 336; `image_sizes` of the processor.
    """

    resized_hw: tuple[int, int]
    padded_hw: tuple[int, int]

    @classmethod
    def of(cls, width: int, height: int, num_crops: int) -> "CropLayout":
        """The layout with the longest long side whose grid has at most `num_crops` local crops.

        Raises:
            DataError: the picture is empty, or so long and thin that its short side would be scaled to 0 px.
        """
        if min(width, height) < 1:
            raise DataError(f"a picture of {width} x {height} px has no pixels to cut crops from")
        ratio = max(width, height) / min(width, height)
        crops_along = 1  # the long side
        while (crops_along + 1) * math.ceil((crops_along + 1) / ratio) <= num_crops:
            crops_along += 1
        long_px = crops_along * CROP_SIZE
        short_px = int(long_px / ratio)
        if short_px == 0:
            raise DataError(
                f"a picture of {width} x {height} px cannot be cut into crops: with num_crops={num_crops} its long "
                f"side becomes {long_px} px and its short side less than 1 px; trim the picture, or leave it out"
            )
        padded_short_px = math.ceil(short_px / CROP_SIZE) * CROP_SIZE
        if width < height:
            return cls(resized_hw=(long_px, short_px), padded_hw=(long_px, padded_short_px))
        return cls(resized_hw=(short_px, long_px), padded_hw=(padded_short_px, long_px))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of local crops."""
        height, width = self.padded_hw
        return height // CROP_SIZE, width // CROP_SIZE

    @property
    def margins(self) -> tuple[int, int]:
        """White px above the picture and to its left; an odd pixel goes below, or to the right."""
        (height, width), (padded_height, padded_width) = self.resized_hw, self.padded_hw
        return (padded_height - height) // 2, (padded_width - width) // 2

    @property
    def num_crops(self) -> int:
        """Crops the picture really has, the global view included."""
        return placement.num_crops_of(*self.padded_hw)

    @property
    def num_tokens(self) -> int:
        """Positions the picture takes in `input_ids`."""
        return placement.num_image_tokens(*self.padded_hw)


def num_image_tokens(width: int, height: int, num_crops: int) -> int:
    """Tokens a picture of `width` x `height` pixels takes; DataError as `CropLayout.of`."""
    return CropLayout.of(width, height, num_crops).num_tokens


def write_crops(
    image: Picture, layout: CropLayout, normalization: Normalization, out: Float[Tensor, "crops 3 336 336"]
) -> None:
    """Fills `out` (contiguous, `layout.num_crops` crops) exactly: global view first, then local crops row by row.

    The picture is converted to RGB as Pillow does it, nothing repaired.
    """
    padded = np.full((3, *layout.padded_hw), WHITE, dtype=np.uint8)
    _picture_in(padded, layout)[:] = _resize(image, layout).transpose(2, 0, 1)
    pixels = normalization(torch.from_numpy(padded))  # [3, height, width]

    # Bicubic without antialiasing, on floats that may leave the range of white and black: as upstream.
    out[:1] = functional.interpolate(pixels[None], size=(CROP_SIZE, CROP_SIZE), mode="bicubic")
    _cut(pixels, layout, out[1:])


def write_fast_crops(image: Picture, layout: CropLayout, out: UInt8[Tensor, "crops 3 336 336"]) -> None:
    """As `write_crops`, in bytes that are still to be normalised.

    All happens in the order in which the picture lies in memory; the last copy, which brings the channels apart, also
    turns it upright, at no cost.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    is_turned = _is_turned(pixels)
    stored = np.require(pixels.transpose(1, 0, 2) if is_turned else pixels, requirements=["C", "W"])
    stored_layout = CropLayout(layout.resized_hw[::-1], layout.padded_hw[::-1]) if is_turned else layout

    # Columns first where `_resize` transposes: the bytes between the passes are then those of Pillow.
    is_upright = layout.resized_hw[0] > layout.resized_hw[1]
    resized = _scale(
        torch.from_numpy(stored).permute(2, 0, 1), stored_layout.resized_hw, columns_first=is_upright != is_turned,
        mode="bilinear", antialias=True,
    )  # fmt: skip
    padded = torch.full((*stored_layout.padded_hw, 3), WHITE, dtype=torch.uint8).permute(2, 0, 1)
    _picture_in(padded, stored_layout)[:] = resized
    view = _scale(padded, (CROP_SIZE, CROP_SIZE), columns_first=is_turned, mode="bicubic")

    if is_turned:
        view, padded = view.transpose(1, 2), padded.transpose(1, 2)
    out[0] = view
    _cut(padded, layout, out[1:])


def _is_turned(pixels: np.ndarray) -> bool:
    """Whether a picture's columns are what lies together in memory; see `decode_image`."""
    return pixels.strides[0] < pixels.strides[1]


def _resize(image: Picture, layout: CropLayout) -> UInt8[np.ndarray, "height width 3"]:
    """Bilinear with antialiasing. Upright pictures are scaled lying down: Pillow rounds to bytes between its two
    passes, so the other order would change some pixels by one."""
    height, width = layout.resized_hw
    is_upright = height > width
    is_turned = isinstance(image, np.ndarray) and _is_turned(image)
    if isinstance(image, Image.Image):
        stored = image.convert("RGB")
    else:
        stored = Image.fromarray(image.transpose(1, 0, 2) if is_turned else image)

    lying = stored if is_turned == is_upright else stored.transpose(Image.Transpose.TRANSPOSE)
    if is_upright:
        return np.asarray(lying.resize((height, width), Image.Resampling.BILINEAR)).transpose(1, 0, 2)
    return np.asarray(lying.resize((width, height), Image.Resampling.BILINEAR))


def _scale(
    picture: UInt8[Tensor, "3 _height _width"], size: tuple[int, int], columns_first: bool, **how: Any
) -> UInt8[Tensor, "3 height width"]:
    """By torch's kernels for bytes, which round after each pass as Pillow's do; weights have 16 bits, Pillow's 22.

    The kernels take the vector path only for channels that are innermost in memory. One call scales rows first.
    """
    batch = picture.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # `picture[None]` would cost twice the time
    if columns_first:
        batch = functional.interpolate(batch, size=(size[0], picture.shape[2]), **how)
    return functional.interpolate(batch, size=size, **how)[0]


def _picture_in(padded: Any, layout: CropLayout) -> Any:
    """The part of the padded picture (an array or a tensor [3, height, width]) that is not margin."""
    top, left = layout.margins
    height, width = layout.resized_hw
    return padded[:, top : top + height, left : left + width]


def _cut(padded: Tensor, layout: CropLayout, out: Tensor) -> None:
    """[3, padded height, padded width] → local crops, row by row."""
    rows, columns = layout.grid
    tiles = padded.view(3, rows, CROP_SIZE, columns, CROP_SIZE).permute(1, 3, 0, 2, 4)
    # By numpy, which needs two thirds of torch's time to bring innermost channels apart.
    out.view(rows, columns, 3, CROP_SIZE, CROP_SIZE).numpy()[:] = tiles.numpy()
