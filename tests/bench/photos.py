"""Pictures to measure with, and the published image path as one would write it.

What comes in: sizes and seeds, or a picture. What goes out: JPEG bytes like a camera's, or fp32 crops.
"""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from phi3v_dist.data.crops import CropLayout
from phi3v_dist.model.tiny import OPENAI_MEAN, OPENAI_STD

SIZES_WH = [(1040, 780), (780, 1040), (1080, 720), (900, 900), (1200, 675), (1024, 768)]  # about 0.8 MP


def photo_jpeg(width: int, height: int, seed: int) -> bytes:
    """Smooth shapes with detail and noise on top, as a camera gives: quality 90, chroma 4:2:0."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for cell_px, contrast in ((200, 50), (50, 25), (12, 12), (3, 6), (1, 4)):
        noise = torch.from_numpy(rng.normal(size=(1, 3, height // cell_px + 2, width // cell_px + 2)))
        smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic")
        pixels += contrast * smooth[0].permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()


def plain_crops(file: Image.Image, num_crops: int) -> Tensor:
    """The published image path as one would write it: Pillow, fp32 from the start."""
    picture = file.convert("RGB")
    layout = CropLayout.of(*picture.size, num_crops)
    (height, width), (top, left), (rows, columns) = layout.resized_hw, layout.margins, layout.grid
    padded = Image.new("RGB", layout.padded_hw[::-1], "white")
    padded.paste(picture.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    pixels = torch.from_numpy(np.array(padded)).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(OPENAI_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_STD).view(3, 1, 1)
    view = torch.nn.functional.interpolate(pixels[None], size=(336, 336), mode="bicubic")
    local = pixels.reshape(3, rows, 336, columns, 336).permute(1, 3, 0, 2, 4).reshape(-1, 3, 336, 336)
    return torch.cat([view, local])
