"""The project's claims about speed, each measured beside what it is compared with; prints a table, writes bench.json.

    make bench
    python tests/bench/run.py --only loaders,images

A section is a function: a folder to work in → `Figure`s. Milliseconds depend on the machine, so ratios are what counts,
and the machine is stated with its load.
"""

import argparse
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import generation
import loaders
import long_rows
import many_shards
import observing
import packing
import torch
from figures import Figure, compare
from photos import SIZES_WH, photo_jpeg, plain_crops
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.batch import Example, Row, collate
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.importers.sample import CatalogueSettings, vocabulary_text, write_catalogue
from phi3v_dist.data.loader import Decoder
from phi3v_dist.data.pictures import decode_image
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.model import Phi3VForCausalLM
from phi3v_dist.model.tiny import write_tiny

CPU = torch.device("cpu")


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


def packed_against_padded(model: Phi3VForCausalLM, decoder: Decoder) -> Figure:
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


def image_path(processor: Phi3VProcessor) -> Figure:
    """JPEG bytes → crops: uint8 by our fast way, or fp32 by Pillow. In processor time of one thread, page faults and
    all, since the wall clock of a shared machine measures its neighbours."""
    jpegs = [photo_jpeg(*size, seed) for seed, size in enumerate(SIZES_WH)]
    for jpeg in jpegs:  # the same thing, before its speed is compared
        fast = processor.normalization(processor.crops_of(decode_image(jpeg), "fast")[0])
        assert (fast - plain_crops(Image.open(io.BytesIO(jpeg)), processor.num_crops)).abs().mean() < 0.01

    def ours() -> None:
        for jpeg in jpegs:
            processor.crops_of(decode_image(jpeg), "fast")

    def other() -> None:
        for jpeg in jpegs:
            plain_crops(Image.open(io.BytesIO(jpeg)), processor.num_crops)

    name = f"image path, {processor.num_crops} crops"
    return compare(name, "pictures/s", len(jpegs), ours, other, clock=time.process_time)


def rows(folder: Path) -> list[Figure]:
    """What packing saves in the model."""
    write_catalogue(folder / "data", CatalogueSettings(num_products=120, text_only_frac=0.4, validation_frac=0.1))
    write_tiny(folder / "tiny", vocabulary_text())
    table = ShardTable.open([SourceSettings(shards=[f"{folder}/data/train-*.tar"])])
    decoder = Decoder(table, Fetcher(table), Phi3VProcessor.from_pretrained(folder / "tiny", num_crops=1))
    return [packed_against_padded(Phi3VForCausalLM.from_pretrained(folder / "tiny").train(), decoder)]


def images(folder: Path) -> list[Figure]:
    """The image path alone."""
    write_tiny(folder / "tiny", vocabulary_text())
    return [image_path(Phi3VProcessor.from_pretrained(folder / "tiny", num_crops)) for num_crops in (4, 16)]


SECTIONS: dict[str, Callable[[Path], list[Figure]]] = {
    "rows": rows,
    "images": images,
    "loaders": loaders.figures,
    "packing": packing.figures,
    "many_shards": many_shards.figures,
    "checkpoints": checkpoints.figures,
    "long_rows": long_rows.figures,
    "observing": observing.figures,
    "generation": generation.figures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas (default: %(default)s)")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    found: dict[str, list[Figure]] = {}
    for section in wanted:
        with tempfile.TemporaryDirectory() as folder:
            found[section] = SECTIONS[section](Path(folder))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    view = Table("figure", "value", "goal", "how", title=machine)
    for section in wanted:
        for figure in found[section]:
            view.add_row(*figure)
        view.add_section()
    Console().print(view)
    stored = {section: [figure._asdict() for figure in found[section]] for section in wanted}
    arguments.out.write_text(json.dumps({"machine": machine, "figures": stored}, indent=2) + "\n")


if __name__ == "__main__":
    main()
