"""Two ranks share a long row, train on it twice, and say what it took.

    torchrun --nproc_per_node 2 full_row_ranks.py FOLDER TOKENS PICTURES    leaves FOLDER/rank-0.json and rank-1.json

Two documents: the first has four fifths of the row and all pictures but two. Asserting is done by test_full_row.py.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from phi3v_dist.config import Settings
from phi3v_dist.data.batch import Example, Row, collate
from phi3v_dist.data.plan import PlannedRow, PlannedStep, num_vision_chunks
from phi3v_dist.model.build import partitioned_model, proven_backend
from phi3v_dist.model.placement import num_image_tokens
from phi3v_dist.model.tiny import write_tiny
from phi3v_dist.model.vision import Normalization
from phi3v_dist.parallel import zero
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.parallel.ulysses import SequenceGroup
from phi3v_dist.train.optim import build_optimizer
from phi3v_dist.train.step import train_step

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
           "num_key_value_heads": 2}  # fmt: skip
RATES = {"text": 1e-3, "vision": 1e-3, "projector": 1e-3}
PICTURE = (336, 336)


def document(number: int, num_tokens: int, num_pictures: int) -> Example:
    """Pictures at equal distances in text that repeats itself, so that there is something to learn."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 300, (97,), generator=generator).repeat(-(-num_tokens // 97))[:num_tokens]
    labels, per_picture = ids.clone(), num_image_tokens(*PICTURE)
    for k in range(num_pictures):
        begin = 10 + k * (num_tokens - per_picture - 20) // num_pictures
        ids[begin : begin + per_picture] = -(k + 1)
        labels[begin : begin + per_picture] = -100
    crops = torch.randint(0, 256, (2 * num_pictures, 3, 336, 336), generator=generator, dtype=torch.uint8)
    return Example(number, ids, labels, crops, torch.tensor([PICTURE] * num_pictures))


def peak_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    folder, num_tokens, num_pictures = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    topology = Topology.from_environment()
    topology.start(3000)
    if topology.is_main:
        write_tiny(folder / "model", ["A red coat costs 12."], clip=CLIP, decoder=DECODER)
    topology.barrier()
    settings = Settings.model_validate(
        {"model": {"path": folder / "model"}, "data": {"train": [{"shards": "none"}], "row_length_tokens": num_tokens},
         "train": {"steps": 2, "rows_per_step": 1},
         "parallel": {"sequence": 2, "deepspeed": Path(__file__).parents[2] / "ds_configs" / "zero3.json"}}
    )  # fmt: skip
    ds_config = zero.resolve(settings, topology.world_size, torch.float32, DECODER["hidden_size"])
    model = partitioned_model(settings, proven_backend(settings, topology.device), ds_config)
    engine = zero.initialize(model.train(), build_optimizer(model, settings.train), ds_config)
    group = SequenceGroup.form(topology, 2)
    lengths = (num_tokens * 4 // 5, num_tokens - num_tokens * 4 // 5)
    examples = tuple(document(n, *size) for n, size in enumerate(zip(lengths, (num_pictures - 2, 2), strict=True)))
    label_tokens = sum(int((example.labels[1:] != -100).sum()) for example in examples)
    planned = PlannedRow((0, 1), num_tokens, sum(n * n for n in lengths), label_tokens, 2 * num_pictures)
    normalization = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    num_chunks = num_vision_chunks([planned], settings.model.vision_chunk_crops, group.size)
    before = peak_bytes()
    notes = []
    for number in (1, 2):
        plan = PlannedStep(number, (planned,), label_tokens, num_tokens, {})
        batch = collate(Row(examples), 0, plan, normalization, num_chunks, sequence=group)
        began = time.perf_counter()
        result = train_step(engine, plan, [batch], RATES, topology)
        notes.append({"loss": result.loss, "tokens": result.tokens, "images": result.images,
                      "labels": result.label_tokens, "seconds": time.perf_counter() - began,
                      "own_tokens": batch.input_ids.shape[1], "documents": batch.layout.lengths})  # fmt: skip
    found = {"steps": notes, "peak_bytes": peak_bytes(), "before_bytes": before}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    topology.stop()


if __name__ == "__main__":
    main()
