"""From a tar to crops in the training process: our loader beside three others, on the same shards.

What comes in: photos of about 0.8 MP, made here. What goes out: samples per second and core of each loader, and what
ours costs above decoding. Surprise: all of it is processor time, of this process and its workers together, since the
wall clock of a shared machine measures its neighbours. The others do what a fine-tuning script does: Pillow, and the HD
transform in fp32, in one worker process. Opening a data set is not counted, starting its worker is.
"""

import io
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import webdataset
from figures import Figure, cpu_seconds
from photos import SIZES_WH, photo_jpeg, plain_crops
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.crops import CropLayout, write_fast_crops
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.importers.sample import vocabulary_text
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.loader import Decoder, Loader
from phi3v_dist.data.order import Order
from phi3v_dist.data.pictures import decode_image
from phi3v_dist.data.plan import Lengths, Planner
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import decode_sample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.model.tiny import write_tiny

ROUNDS = 3
NUM_PHOTOS, NUM_SHARDS = 48, 2
SAMPLES = {4: 192, 16: 96}  # by number of crops; a round of all four loaders takes about 15 s of a core
ROW_TOKENS = 8192
ROWS_AT_A_TIME, TURNS = 20, 12  # of ours against bare loops: long turns, since caches are cold when one begins
PROMPT = "What is shown in this image?"
ANSWER = "Product: {{title}}, Category: {{category}}, Full Price: {{price}}"


@dataclass(frozen=True)
class World:
    """The shards, as our loader sees them and as the others do."""

    tars: list[str]
    decoder: Decoder
    lengths: Lengths
    tokenizer: PreTrainedTokenizerFast

    @property
    def num_crops(self) -> int:
        return self.decoder.processor.num_crops

    @classmethod
    def write(cls, folder: Path, num_crops: int) -> "World":
        num_samples = SAMPLES[num_crops]
        photos = [photo_jpeg(*SIZES_WH[i % len(SIZES_WH)], seed=i) for i in range(NUM_PHOTOS)]
        tars = [str(folder / f"photos-{num_crops}-{shard:03d}.tar") for shard in range(NUM_SHARDS)]
        for shard, tar in enumerate(tars):
            with webdataset.TarWriter(tar) as writer:
                for i in range(shard, num_samples, NUM_SHARDS):
                    record = {"title": f"A red wool coat with belt, number {i}", "category": "Coats", "price": i + 0.95}
                    photo = photos[i % NUM_PHOTOS]
                    writer.write({"__key__": f"{i:06d}", "jpg": photo, "json": json.dumps(record).encode()})
        write_tiny(folder / "tiny", vocabulary_text())
        processor = Phi3VProcessor.from_pretrained(folder / "tiny", num_crops)
        table = ShardTable.open([SourceSettings(shards=tars, prompt=PROMPT, answer=ANSWER)])
        decoder = Decoder(table, Fetcher(table), processor, "fast")
        return cls(tars, decoder, measure(table, processor), processor.tokenizer)

    def loader(self, end: int | None) -> Loader:
        """One thread."""
        planner = Planner(
            Order(self.decoder.table, seed=0).sample_ids, self.lengths, rows_per_step=1, packing=True, seed=0, end=end,
            row_length_tokens=ROW_TOKENS, window_samples=len(self.lengths),
        )  # fmt: skip
        return Loader(planner, self.decoder, self.lengths, 0, 1, micro_steps=1, num_workers=1, prefetch_rows=4)

    def usual_example(self, picture: Image.Image, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """The per-sample processor of a fine-tuning script."""
        layout = CropLayout.of(*picture.size, self.num_crops)
        answer = f"Product: {record['title']}, Category: {record['category']}, Full Price: {record['price']}<|end|>"
        asked = self.tokenizer("<|user|>\n").input_ids + [-1] * layout.num_tokens
        asked += self.tokenizer(f"{PROMPT}<|end|>\n<|assistant|>\n").input_ids
        learned = self.tokenizer(answer).input_ids
        return {
            "input_ids": torch.tensor(asked + learned),
            "labels": torch.tensor([-100] * len(asked) + learned),
            "pixel_values": plain_crops(picture, self.num_crops),
            "image_sizes": torch.tensor([layout.padded_hw]),
        }


class MapStyle(Dataset):
    """Look up, decode, encode: what one would write in ten lines."""

    def __init__(self, world: World):
        self.world = world

    def __len__(self) -> int:
        return len(self.world.lengths)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        members = self.world.decoder.fetcher.fetch(number)
        return self.world.usual_example(Image.open(io.BytesIO(members["jpg"])), json.loads(members["json"]))


def consume(examples: Iterable[Mapping[str, Tensor]]) -> int:
    return sum(len(example["pixel_values"]) > 0 for example in examples)


def contestants(world: World) -> dict[str, Callable[[], int]]:
    """By name: read every sample once, in the training process."""
    import datasets  # takes seconds to import, and only this needs it

    def ours() -> int:
        return sum(len(batch.image_sizes) for _, batches in world.loader(len(world.lengths)) for batch in batches)

    def from_members(members: Mapping[str, Any]) -> dict[str, Tensor]:
        return world.usual_example(Image.open(io.BytesIO(members["jpg"])), json.loads(members["json"]))

    def from_columns(columns: Mapping[str, Any]) -> dict[str, Tensor]:
        return world.usual_example(columns["jpg"], columns["json"])

    plain = webdataset.WebDataset(world.tars, shardshuffle=False).map(from_members)
    stream = datasets.load_dataset("webdataset", data_files=world.tars, split="train", streaming=True)
    columns = stream.column_names or list(next(iter(stream)))
    stream = stream.map(from_columns, remove_columns=columns)
    return {
        "ours": ours,
        "Dataset + DataLoader": lambda: consume(DataLoader(MapStyle(world), None, shuffle=True, num_workers=1)),
        "webdataset": lambda: consume(webdataset.WebLoader(plain, batch_size=None, num_workers=1)),
        "HF streaming": lambda: consume(DataLoader(stream, batch_size=None, num_workers=1)),
    }


def side_by_side(world: World, goal: str) -> list[Figure]:
    """Samples per second and core of each, interleaved; ours first, then how many times as fast it is."""
    loaders = contestants(world)
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in track(range(ROUNDS), f"loaders, {world.num_crops} crops"):
        for name, read_all in loaders.items():
            began = cpu_seconds()
            assert read_all() == len(world.lengths)
            seconds[name].append(cpu_seconds() - began)
    figures = []
    for name, times in seconds.items():
        rate = f"{len(world.lengths) / median(times):.1f} samples/s per core"
        if name == "ours":
            figures.append(Figure(f"our loader, {world.num_crops} crops", rate))
        else:
            ratio = median(other / ours for ours, other in zip(seconds["ours"], times, strict=True))
            wanted = goal if name == "Dataset + DataLoader" else ""
            figures.append(Figure(f"… against {name}", f"{ratio:.2f} x", wanted, rate))
    return figures


def overhead(world: World) -> list[Figure]:
    """What the loader costs above a bare loop over bytes in memory, and the part of it in the training thread.

    All sides take turns, each alone and in a thread of its own, by that thread's clock. The loader has been running for
    a while, as in training; the bare loops write to as much memory as it goes through.
    """
    decoder, table = world.decoder, world.decoder.table
    members = [decoder.fetcher.fetch(i) for i in range(len(world.lengths))]
    numbers = itertools.cycle(range(len(members)))
    most = int(world.lengths.crops.max())
    places = itertools.cycle(torch.zeros(15, most, 3, 336, 336, dtype=torch.uint8))

    def pictures(number: int) -> None:
        pixels = decode_image(members[number]["jpg"])
        layout = CropLayout.of(pixels.shape[1], pixels.shape[0], world.num_crops)
        write_fast_crops(pixels, layout, next(places)[: layout.num_crops])

    def examples(number: int) -> None:
        sample = decode_sample(number, "shard", "key", "source", table.sources[0], members[number], ["jpg"])
        decoder.processor.encode(sample, "fast", next(places)[: int(world.lengths.crops[number])])

    def bare(work: Callable[[int], None], num_samples: int) -> float:
        began = time.thread_time()
        for number in itertools.islice(numbers, num_samples):
            work(number)
        return (time.thread_time() - began) / num_samples

    steps = iter(world.loader(end=None))
    for _, batches in itertools.islice(steps, 8):  # until every slot was used
        list(batches)
    (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("decode"))
    clock = time.pthread_getcpuclockid(thread.ident or 0)

    def decoded_s() -> float:
        """The decoding thread's time, once it has nothing more to do."""
        seconds = -1.0
        while seconds != (seconds := time.clock_gettime(clock)):
            time.sleep(0.02)
        return seconds

    taken, ours, pictures_only, whole = [], [], [], []
    with ThreadPoolExecutor(1) as other:
        for _ in track(range(TURNS), f"overhead, {world.num_crops} crops"):
            began, began_here, num_samples = decoded_s(), time.thread_time(), 0
            for plan, batches in itertools.islice(steps, ROWS_AT_A_TIME):
                num_samples += len(plan.sample_ids)
                list(batches)
            here = time.thread_time() - began_here
            taken.append(here / ROWS_AT_A_TIME)
            ours.append((decoded_s() - began + here) / num_samples)
            pictures_only.append(other.submit(bare, pictures, num_samples).result())
            whole.append(other.submit(bare, examples, num_samples).result())
    steps.close()
    at = f"{world.num_crops} crops"
    return [
        _above(f"loader above bytes → examples, {at}", ours, whole, "<= 5 %"),
        _above(f"loader and text above bytes → crops, {at}", ours, pictures_only),
        Figure(
            f"hand-over of a row, {at}", f"{1000 * median(taken):.2f} ms", "<= 0.5 ms",
            f"training thread, planning included; {ROW_TOKENS // int(world.lengths.tokens.max())} or more pictures",
        ),
    ]  # fmt: skip


def _above(name: str, ours: list[float], bare: list[float], goal: str = "") -> Figure:
    """Seconds per sample, turn by turn → how much more ours are, from pairs."""
    percents = [100 * (a / b - 1) for a, b in zip(ours, bare, strict=True)]
    detail = f"{1000 * median(ours):.2f} against {1000 * median(bare):.2f} ms a sample"
    spread = f"turns {min(percents):+.0f} to {max(percents):+.0f} %"
    return Figure(name, f"{median(percents):+.1f} %", goal, f"{detail}, {spread}")


def figures(folder: Path) -> list[Figure]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else each worker process warns
    found = []
    for num_crops, goal in ((4, ">= 2.5 x"), (16, ">= 4 x")):
        world = World.write(folder, num_crops)
        found += side_by_side(world, goal) + overhead(world)
    return found
