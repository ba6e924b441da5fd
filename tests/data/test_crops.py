"""Crops against the published image processor's output (tests/golden/image_processor.json)."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from phi3v_dist.data.crops import CropLayout, num_image_tokens, write_crops
from phi3v_dist.errors import DataError

# Measured on Pillow 13.0 and torch 2.13 (CPU): every sampled value is equal to the last bit. The global view's bicubic
# kernel may round otherwise on other machines.
LOCAL_TOLERANCE = 1e-6
GLOBAL_TOLERANCE = 1e-4
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.fixture(scope="module")
def recorded(golden_folder: Path) -> dict[str, Any]:
    return json.loads((golden_folder / "image_processor.json").read_text())


def crops_of(image: Any, layout: CropLayout) -> torch.Tensor:
    crops = torch.full((layout.num_crops, 3, 336, 336), torch.nan)
    write_crops(image, layout, MEAN, STD, crops)
    return crops


def picture(record: dict[str, Any], folder: Path) -> Image.Image:
    """The stored picture, or the one whose PNG would be too large to store, drawn by its formula."""
    if record["png"]:
        return Image.open(folder / record["png"])
    assert record["formula"] == "rings"
    x, y = np.arange(record["width"]) - record["width"] // 2, np.arange(record["height"]) - record["height"] // 2
    r = (x * x + (y * y)[:, None]) // record["s"] ** 2
    return Image.fromarray(np.stack([r % 256, 3 * r % 256, (255 - r) % 256], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("num_crops", [4, 16])
def test_crops_equal_the_published_processors(num_crops: int, recorded: dict[str, Any], golden_folder: Path) -> None:
    samples = load_file(golden_folder / "image_processor_samples.safetensors")
    for record in recorded["images"]:
        name, image = record["name"], picture(record, golden_folder)
        assert hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest() == record["rgb_sha256"], name
        expected = next(result for result in record["results"] if result["num_crops"] == num_crops)

        layout = CropLayout.of(*image.size, num_crops)
        crops = crops_of(image, layout)

        assert layout.num_tokens == expected["num_img_tokens"], name
        assert list(layout.padded_hw) == expected["image_size_hw"], name
        assert len(crops) == expected["real_crops_incl_global"], name
        local_bytes = ((crops[1:] * STD + MEAN) * 255).round().to(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(local_bytes).hexdigest() == expected["local_crops_u8_sha256"], name
        positions = samples[f"{name}/c{num_crops}/idx"].long()
        difference = (crops[tuple(positions.T)] - samples[f"{name}/c{num_crops}/val"]).abs()
        is_local = positions[:, 0] > 0
        assert difference[is_local].max() <= LOCAL_TOLERANCE, name
        assert (difference * ~is_local).max() <= GLOBAL_TOLERANCE, name
        for statistic, found in (("mean", crops.mean((1, 2, 3))), ("min", crops.amin((1, 2, 3)))):
            torch.testing.assert_close(found, torch.tensor(expected[f"crop_{statistic}"]), rtol=0, atol=1e-5, msg=name)


def test_tokens_follow_from_width_and_height_alone(recorded: dict[str, Any]) -> None:
    for row in recorded["size_table"]:
        for num_crops in (4, 16):
            size, expected = (row["width"], row["height"]), row[f"tokens_c{num_crops}"]
            if expected is None:
                with pytest.raises(DataError):
                    num_image_tokens(*size, num_crops)
            else:
                assert num_image_tokens(*size, num_crops) == expected, (size, num_crops)


def test_a_picture_too_thin_to_cut_names_its_size_and_the_setting() -> None:
    with pytest.raises(DataError, match=r"2000 x 1 px .* num_crops=4 "):
        CropLayout.of(2000, 1, num_crops=4)


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(DataError, match="0 x 5 px"):
        CropLayout.of(0, 5, num_crops=4)


@pytest.mark.parametrize("shape", [(500, 300, 3), (300, 500, 3)])
def test_an_array_gives_the_crops_of_the_same_picture(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    layout = CropLayout.of(shape[1], shape[0], num_crops=4)
    assert torch.equal(crops_of(pixels, layout), crops_of(Image.fromarray(pixels), layout))
