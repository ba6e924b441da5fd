"""A picture → the 336-pixel squares CLIP sees: local crops of the enlarged, padded picture and one global view.

What comes in: a picture and the greatest number of crops; what goes out: normalised fp32 crops, or, from width and
height alone, their number and that of the tokens they become. Surprise: pictures are *enlarged* to use up the crops
allowed: one pixel becomes 4 x 4 crops and 2,509 tokens when 16 are allowed.

Source: the image processor published with microsoft/Phi-3-vision-128k-instruct (its HD transform), reproduced to the
last bit for local crops; tests/golden/image_processor.json holds its output.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from phi3v_dist.errors import DataError
from phi3v_dist.model import vision
from phi3v_dist.model.vision import CROP_SIZE

WHITE = 255

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
    def num_crops(self) -> int:
        """Crops the picture really has, the global view included."""
        return vision.num_crops_of(*self.padded_hw)

    @property
    def num_tokens(self) -> int:
        """Positions the picture takes in `input_ids`."""
        return vision.num_image_tokens(*self.padded_hw)


def num_image_tokens(width: int, height: int, num_crops: int) -> int:
    """Tokens a picture of `width` x `height` pixels takes; DataError as `CropLayout.of`."""
    return CropLayout.of(width, height, num_crops).num_tokens


def write_crops(
    image: Picture,
    layout: CropLayout,
    mean: Float[Tensor, "3 1 1"],
    std: Float[Tensor, "3 1 1"],
    out: Float[Tensor, "crops 3 336 336"],
) -> None:
    """Fills `out` (contiguous, `layout.num_crops` crops): global view first, then local crops row by row.

    mean, std: of pixels in 0..1, per channel. The picture is converted to RGB as Pillow does it, nothing repaired.
    """
    picture = image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image)
    padded = torch.from_numpy(_pad(_resize(picture, layout), layout))
    pixels = padded.to(torch.float32).div_(255).sub_(mean).div_(std)  # [3, height, width]

    # Bicubic without antialiasing, on floats that may leave the range of white and black: as upstream.
    out[:1] = functional.interpolate(pixels[None], size=(CROP_SIZE, CROP_SIZE), mode="bicubic")
    rows, columns = layout.grid
    tiles = pixels.view(3, rows, CROP_SIZE, columns, CROP_SIZE).permute(1, 3, 0, 2, 4)
    out[1:].view(rows, columns, 3, CROP_SIZE, CROP_SIZE).copy_(tiles)


def _resize(picture: Image.Image, layout: CropLayout) -> UInt8[np.ndarray, "height width 3"]:
    """Bilinear with antialiasing. Upright pictures are scaled lying down: Pillow rounds to bytes between its two
    passes, so the other order would change some pixels by one."""
    height, width = layout.resized_hw
    if height > width:
        lying = picture.transpose(Image.Transpose.TRANSPOSE).resize((height, width), Image.Resampling.BILINEAR)
        return np.asarray(lying).transpose(1, 0, 2)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def _pad(
    pixels: UInt8[np.ndarray, "height width 3"], layout: CropLayout
) -> UInt8[np.ndarray, "3 padded_height padded_width"]:
    """Channels first, white on both sides of the short side; the odd pixel goes below, or to the right."""
    height, width = pixels.shape[:2]
    top, left = (layout.padded_hw[0] - height) // 2, (layout.padded_hw[1] - width) // 2
    padded = np.full((3, *layout.padded_hw), WHITE, dtype=np.uint8)
    padded[:, top : top + height, left : left + width] = pixels.transpose(2, 0, 1)
    return padded
