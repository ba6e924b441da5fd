"""Side-by-side ratios, measured interleaved in one process; prints a table and writes bench.json.

    make bench

Every performance claim of the project is an entry here: a name, two things to compare, and a ratio above 1 when ours is
the better one. Milliseconds depend on the machine, so the ratio is what counts, and the machine is stated.
"""

import argparse
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.batch import Example, Row, collate
from phi3v_dist.data.crops import CropLayout
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.importers.sample import CatalogueSettings, vocabulary_text, write_catalogue
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.loader import Decoder, Loader
from phi3v_dist.data.order import Order
from phi3v_dist.data.pictures import decode_image
from phi3v_dist.data.plan import Planner
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.model import Phi3VForCausalLM
from phi3v_dist.model.tiny import OPENAI_MEAN, OPENAI_STD, write_tiny

ROUNDS = 5
CPU = torch.device("cpu")
PHOTO_SIZES_WH = [(1040, 780), (780, 1040), (1080, 720), (900, 900), (1200, 675), (1024, 768)]  # about 0.8 MP


@dataclass(frozen=True)
class Entry:
    """One comparison. `ours` and `other` are rates (higher is better); spread is max / min of the rounds' ratios."""

    name: str
    unit: str
    ours: float
    other: float
    ratio: float
    spread: float


def compare(
    name: str,
    unit: str,
    amount: float,
    ours: Callable[[], None],
    other: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Entry:
    """Time both in turn, after one round that does not count; rates from medians, the ratio from pairs."""
    seconds = []
    for _ in range(ROUNDS + 1):
        pair = []
        for run in (ours, other):
            began = clock()
            run()
            pair.append(clock() - began)
        seconds.append(pair)
    ratios = [b / a for a, b in seconds[1:]]
    rates = [amount / median(column) for column in zip(*seconds[1:], strict=True)]
    return Entry(name, unit, *rates, median(ratios), max(ratios) / min(ratios))


def padded_inputs(examples: list[Example], pad_id: int) -> dict[str, Tensor]:
    """The usual batch: [rows, tokens], padded to the longest, the processor's crops padded to the most."""
    length = max(len(e.input_ids) for e in examples)
    pad = torch.nn.functional.pad
    pictures = [e for e in examples if len(e.pixel_values)]
    crops = max(len(e.pixel_values) for e in pictures)
    return {
        "input_ids": torch.stack([pad(e.input_ids, (0, length - len(e.input_ids)), value=pad_id) for e in examples]),
        "labels": torch.stack([pad(e.labels, (0, length - len(e.labels)), value=-100) for e in examples]),
        "attention_mask": torch.stack([(torch.arange(length) < len(e.input_ids)).long() for e in examples]),
        "pixel_values": torch.stack(
            [pad(e.pixel_values, (0, 0, 0, 0, 0, 0, 0, crops - len(e.pixel_values))) for e in pictures]
        ),
        "image_sizes": torch.cat([e.image_sizes for e in pictures]),
    }


def packed_against_padded(model: Phi3VForCausalLM, decoder: Decoder) -> Entry:
    """Forward and backward of the same mixed samples: one flat row, or a padded batch whose padding is computed.

    The padded side runs over the flat row that a padded batch is: every row a document of the longest's length.
    """
    examples = [decoder.processor.encode(decoder.sample(i)) for i in range(8)]
    pad_id = decoder.processor.tokenizer.pad_token_id
    packed = collate(Row(tuple(examples)), pad_id).inputs(CPU)
    padded = padded_inputs(examples, pad_id)
    padded["attention_mask"] = torch.ones_like(padded["attention_mask"])  # what a dense batch computes: all of it
    num_tokens = sum(len(e.input_ids) for e in examples)

    def step(inputs: dict) -> None:
        model(**inputs).loss.backward()
        model.zero_grad()

    return compare(
        "step, packed against padded", "real tokens/s", num_tokens, lambda: step(packed), lambda: step(padded)
    )


class PlainDataset(Dataset):
    """What one would write in ten lines: look up, decode, encode."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.decoder.table)

    def __getitem__(self, number: int) -> Example:
        return self.decoder.processor.encode(self.decoder.sample(number))


def loader_against_dataloader(decoder: Decoder) -> Entry:
    """Every sample of the set decoded once and handed over: our threads, or a DataLoader's worker process."""
    lengths = measure(decoder.table, decoder.processor)
    num_samples = len(decoder.table)

    def ours() -> None:
        order = Order(decoder.table, seed=0)
        planner = Planner(
            order.sample_ids, lengths, rows_per_step=1, row_length_tokens=4096, window_samples=256, packing=True,
            seed=0, end=num_samples,
        )  # fmt: skip
        loader = Loader(planner, decoder, lengths, 0, 1, micro_steps=1, num_workers=1, prefetch_rows=4)
        assert sum(len(batch.plan.sample_ids) for (batch,) in loader) == num_samples

    def other() -> None:
        loader = DataLoader(PlainDataset(decoder), batch_size=None, num_workers=1, shuffle=True)
        assert sum(1 for _ in loader) == num_samples

    return compare("loader against Dataset + DataLoader", "samples/s", num_samples, ours, other)


def photo_jpeg(width: int, height: int, seed: int) -> bytes:
    """Smooth shapes with detail and noise on top, as a camera gives: quality 90, chroma 4:2:0."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for cell_px, contrast in ((200, 50), (50, 25), (12, 12), (3, 6), (1, 4)):
        noise = rng.normal(size=(height // cell_px + 2, width // cell_px + 2, 3))
        pixels += contrast * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()


def plain_crops(jpeg: bytes, num_crops: int) -> Tensor:
    """The published image path as one would write it: Pillow, fp32 from the start."""
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    layout = CropLayout.of(*picture.size, num_crops)
    (height, width), (top, left), (rows, columns) = layout.resized_hw, layout.margins, layout.grid
    padded = Image.new("RGB", layout.padded_hw[::-1], "white")
    padded.paste(picture.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    pixels = torch.from_numpy(np.array(padded)).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(OPENAI_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_STD).view(3, 1, 1)
    view = torch.nn.functional.interpolate(pixels[None], size=(336, 336), mode="bicubic")
    local = pixels.reshape(3, rows, 336, columns, 336).permute(1, 3, 0, 2, 4).reshape(-1, 3, 336, 336)
    return torch.cat([view, local])


def image_path(processor: Phi3VProcessor) -> Entry:
    """JPEG bytes → crops: uint8 by our fast way, or fp32 by Pillow. In processor time of one thread, page faults and
    all, since the wall clock of a shared machine measures its neighbours."""
    jpegs = [photo_jpeg(*size, seed) for seed, size in enumerate(PHOTO_SIZES_WH)]
    for jpeg in jpegs:  # the same thing, before its speed is compared
        fast = processor.normalization(processor.crops_of(decode_image(jpeg), "fast")[0])
        assert (fast - plain_crops(jpeg, processor.num_crops)).abs().mean() < 0.01

    def ours() -> None:
        for jpeg in jpegs:
            processor.crops_of(decode_image(jpeg), "fast")

    def other() -> None:
        for jpeg in jpegs:
            plain_crops(jpeg, processor.num_crops)

    name = f"image path, {processor.num_crops} crops"
    return compare(name, "pictures/s", len(jpegs), ours, other, clock=time.process_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        data, tiny = Path(folder) / "data", Path(folder) / "tiny"
        mixed = CatalogueSettings(num_products=120, text_only_frac=0.4, validation_frac=0.1)
        write_catalogue(data, mixed)
        write_tiny(tiny, vocabulary_text())
        table = ShardTable.open([SourceSettings(shards=[f"{data}/train-*.tar"])])
        decoder = Decoder(table, Fetcher(table), Phi3VProcessor.from_pretrained(tiny, num_crops=1))
        model = Phi3VForCausalLM.from_pretrained(tiny).train()
        entries = [packed_against_padded(model, decoder), loader_against_dataloader(decoder)]
        entries += [image_path(Phi3VProcessor.from_pretrained(tiny, num_crops)) for num_crops in (4, 16)]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread"
    table_view = Table("comparison", "ours", "other", "ratio", "spread", title=f"{machine}, {ROUNDS} rounds")
    for e in entries:
        table_view.add_row(e.name, f"{e.ours:,.0f} {e.unit}", f"{e.other:,.0f}", f"{e.ratio:.2f}", f"{e.spread:.2f}")
    Console().print(table_view)
    out.write_text(json.dumps({"machine": machine, "entries": [vars(e) for e in entries]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
