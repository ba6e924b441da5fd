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
from typing import Literal

import cv2
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
    picture = image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image)
    padded = _white(layout)
    _picture_in(padded, layout)[:] = _resize(picture, layout).transpose(2, 0, 1)
    pixels = normalization(torch.from_numpy(padded))  # [3, height, width]

    # Bicubic without antialiasing, on floats that may leave the range of white and black: as upstream.
    out[:1] = functional.interpolate(pixels[None], size=(CROP_SIZE, CROP_SIZE), mode="bicubic")
    _cut(pixels, layout, out[1:])


def write_fast_crops(image: Picture, layout: CropLayout, out: UInt8[Tensor, "crops 3 336 336"]) -> None:
    """As `write_crops`, in bytes that are still to be normalised."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    pixels = np.require(pixels, requirements=["C", "W"])  # Pillow's arrays are read-only, which torch warns of
    padded = _white(layout)
    cv2.split(_resize_fast(pixels, layout), list(_picture_in(padded, layout)))  # channels, straight to their places
    for channel, view in zip(padded, out[0].numpy(), strict=True):
        cv2.resize(channel, (CROP_SIZE, CROP_SIZE), dst=view, interpolation=cv2.INTER_CUBIC)
    _cut(torch.from_numpy(padded), layout, out[1:])


def _resize(picture: Image.Image, layout: CropLayout) -> UInt8[np.ndarray, "height width 3"]:
    """Bilinear with antialiasing. Upright pictures are scaled lying down: Pillow rounds to bytes between its two
    passes, so the other order would change some pixels by one."""
    height, width = layout.resized_hw
    if height > width:
        lying = picture.transpose(Image.Transpose.TRANSPOSE).resize((height, width), Image.Resampling.BILINEAR)
        return np.asarray(lying).transpose(1, 0, 2)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def _resize_fast(
    pixels: UInt8[np.ndarray, "_height _width 3"], layout: CropLayout
) -> UInt8[np.ndarray, "height width 3"]:
    """`_resize` by torch's kernel for bytes, which follows Pillow pass by pass; its weights have 16 bits, Pillow's 22.

    It takes the vector path only for channels that are innermost in an array whose batch axis is a real one: `[None]`
    after `permute` instead of before it costs twice the time.
    """
    height, width = layout.resized_hw
    is_upright = height > width
    lying = cv2.transpose(pixels) if is_upright else pixels
    size = (width, height) if is_upright else (height, width)
    batch = torch.from_numpy(lying)[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(batch, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return cv2.transpose(resized) if is_upright else resized


def _white(layout: CropLayout) -> UInt8[np.ndarray, "3 padded_height padded_width"]:
    return np.full((3, *layout.padded_hw), WHITE, dtype=np.uint8)


def _picture_in(padded: np.ndarray, layout: CropLayout) -> UInt8[np.ndarray, "3 height width"]:
    """The part of the padded picture that is not margin."""
    top, left = layout.margins
    height, width = layout.resized_hw
    return padded[:, top : top + height, left : left + width]


def _cut(padded: Tensor, layout: CropLayout, out: Tensor) -> None:
    """[3, padded height, padded width] → local crops, row by row."""
    rows, columns = layout.grid
    tiles = padded.view(3, rows, CROP_SIZE, columns, CROP_SIZE).permute(1, 3, 0, 2, 4)
    out.view(rows, columns, 3, CROP_SIZE, CROP_SIZE).copy_(tiles)
