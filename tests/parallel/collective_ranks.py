"""Trains a tiny Phi-3-V under real ZeRO-3 on rows that differ from rank to rank, and compares every step's gradients.

    python collective_ranks.py FOLDER 2:every:trained:4 4:one:frozen:8 …      leaves FOLDER/TRIAL.json

A trial is ranks : mix : vision tower : steps. Beside the engine, rank 0 runs a plain copy of its weights over the rows
of all ranks, one after another. Surprise: ranks are forked from this process, as in ../survive/checkpoint_ranks.py, and
join as torchrun's would. Asserting is done by test_equal_collectives.py.
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch._inductor.compile_fx  # a first deepspeed.initialize imports it: once here, for all groups
import torch.multiprocessing as mp
from deepspeed.utils import safe_get_full_grad

from phi3v_dist.config import Settings
from phi3v_dist.data.batch import Example
from phi3v_dist.data.loader import Loader
from phi3v_dist.data.plan import Lengths, Planner
from phi3v_dist.data.samples import BadSample
from phi3v_dist.evaluate.generate import local_copy, plain_linear
from phi3v_dist.model.build import partitioned_model, proven_backend
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.placement import num_crops_of, num_image_tokens
from phi3v_dist.model.tiny import write_tiny
from phi3v_dist.model.vision import Normalization
from phi3v_dist.parallel import zero
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.train.optim import build_optimizer
from phi3v_dist.train.step import train_step

CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
           "num_key_value_heads": 2}  # fmt: skip
CHUNK_CROPS = 2
TEXT_TOKENS, LABEL_TOKENS = 20, 6
RATES = {"text": 1e-3, "vision": 1e-3, "projector": 1e-3}
TIMEOUT_S = 60.0

# Kinds of samples: padded pictures' (height, width). 0, 2 and 5 crops: the last takes three chunks.
TEXT, ONE, SEVERAL = (), ((336, 336),), ((672, 336), (336, 336))
EVERY = [(TEXT, True), (ONE, True), (SEVERAL, True), (TEXT, True), (SEVERAL, False)]  # False: cannot be decoded


@dataclass(frozen=True)
class Mix:
    """Sample k of the endless stream is of kind k modulo their number; two micro-steps a step."""

    kinds: list
    rows_per_step: int

    @classmethod
    def named(cls, name: str, world_size: int) -> "Mix":
        if name == "one":  # a picture on one rank, text on all others
            return cls([(ONE, True)] + [(TEXT, True)] * (2 * world_size - 1), 2 * world_size)
        return cls(EVERY, 2 * world_size - 1)  # and an empty row

    def loader(self, consumer: int, num_consumers: int, num_steps: int) -> Loader:
        num_samples = num_steps * self.rows_per_step
        pictures = [self.kinds[i % len(self.kinds)][0] for i in range(num_samples)]
        tokens = np.array([TEXT_TOKENS + sum(num_image_tokens(*size) for size in sizes) for sizes in pictures])
        lengths = Lengths(
            tokens,
            np.full(num_samples, LABEL_TOKENS),
            np.array([sum(num_crops_of(*size) for size in sizes) for sizes in pictures]),
            full_tokens=tokens,
            bad={},
        )
        planner = Planner(
            lambda begin, end: np.arange(begin, end), lengths, rows_per_step=self.rows_per_step,
            row_length_tokens=4096, window_samples=self.rows_per_step, packing=False, seed=0, end=num_samples,
        )  # fmt: skip
        micro_steps = -(-self.rows_per_step // num_consumers)
        decoder = SimpleNamespace(
            example=self.example, normalization=Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
            processor=SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)),
        )  # fmt: skip
        return Loader(planner, decoder, lengths, consumer, num_consumers, micro_steps, 1, 1, CHUNK_CROPS)

    def example(self, sample_id: int, planned_tokens: int, out: torch.Tensor) -> Example:
        """Drawn from its number; the same on every rank."""
        sizes, is_good = self.kinds[sample_id % len(self.kinds)]
        if not is_good:
            raise BadSample("drawn", str(sample_id), "this kind cannot be decoded")
        generator = torch.Generator().manual_seed(sample_id)
        words = torch.randint(3, 300, (TEXT_TOKENS,), generator=generator)
        places = [torch.full((num_image_tokens(*size),), -k) for k, size in enumerate(sizes, start=1)]
        ids = torch.cat([*places, words])
        labels = torch.full_like(ids, -100)
        labels[-LABEL_TOKENS:] = ids[-LABEL_TOKENS:]
        num_crops = sum(num_crops_of(*size) for size in sizes)
        tiles = torch.randint(0, 256, (num_crops, 3, 12, 12), generator=generator, dtype=torch.uint8)
        crops = tiles.repeat_interleave(28, dim=2).repeat_interleave(28, dim=3)
        return Example(sample_id, ids, labels, crops, torch.tensor(sizes, dtype=torch.int64).view(-1, 2))


def build(folder: Path, topology: Topology, mix: Mix, is_frozen: bool):
    """As run.py does it, every tensor partitioned however small."""
    settings = Settings.model_validate(
        {"model": {"path": folder, "vision_chunk_crops": CHUNK_CROPS}, "data": {"train": [{"shards": "none"}]},
         "train": {"steps": 1000, "rows_per_step": mix.rows_per_step,
                   "parts": {"vision": "frozen" if is_frozen else "full"}},
         "parallel": {"deepspeed": Path(__file__).parents[2] / "ds_configs" / "zero3.json"}}
    )  # fmt: skip
    ds_config = zero.resolve(settings, topology.world_size, torch.float32, DECODER["hidden_size"])
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    backend = proven_backend(settings, topology.device)
    model = partitioned_model(settings, backend, ds_config, show_progress=False)
    return zero.initialize(model.train(), build_optimizer(model, settings.train), ds_config)


def run_trial(folder: Path, topology: Topology, num_steps: int, name: str, tower: str) -> dict:
    mix = Mix.named(name, topology.world_size)
    engine = build(folder, topology, mix, tower == "frozen")
    gradients: dict[str, torch.Tensor] = {}
    calls: list[int] = []  # of the tower, recomputation included, by this rank
    engine.module.model.vision_embed_tokens.img_processor.register_forward_pre_hook(lambda *_: calls.append(1))
    update = engine.step

    def look_then_update() -> None:
        if engine.is_gradient_accumulation_boundary():
            for parameter_name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    gradients[parameter_name] = safe_get_full_grad(parameter)
        update()

    engine.step = look_then_update
    alone = iter(mix.loader(0, 1, num_steps)) if topology.is_main else count()
    steps = zip(mix.loader(topology.rank, topology.world_size, num_steps), alone, strict=False)
    differences: dict[str, float] = {}
    losses, by_step = [], []
    for (plan, batches), rows_alone in islice(steps, num_steps):
        copy = local_copy(engine.module)
        calls.clear()
        result = train_step(engine, plan, batches, RATES, topology)
        by_step.append(topology.gather(len(calls)))
        losses.append(result.loss)
        if topology.is_main:
            for parameter_name, difference in compare(copy.train(), rows_alone[1], gradients).items():
                differences[parameter_name] = max(difference, differences.get(parameter_name, 0.0))
    return {"losses": losses, "calls": by_step, "differences": differences}


def compare(copy: Phi3VForCausalLM, batches: Iterable, gradients: dict[str, torch.Tensor]) -> dict[str, float]:
    """Per tensor: norm of the difference relative to max(own norm, 1e-6 x global norm); k_proj.bias, 0 in theory,
    relative to the global norm."""
    with plain_linear():
        for batch in batches:
            (copy(**batch.inputs(torch.device("cpu"))).token_losses.sum() / batch.plan.label_tokens).backward()
    wanted = {name: parameter.grad for name, parameter in copy.named_parameters() if name in gradients}
    total = float(torch.cat([gradient.flatten() for gradient in wanted.values()]).norm())
    differences = {}
    for name, gradient in wanted.items():
        scale = total if name.endswith("k_proj.bias") else max(float(gradient.norm()), 1e-6 * total)
        differences[name] = float((gradients[name] - gradient).norm()) / scale
    return differences


def run_rank(rank: int, world_size: int, folder: Path, trials: list[str], port: int) -> None:
    logging.basicConfig(level=logging.ERROR)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    topology = Topology.from_environment()
    topology.start(TIMEOUT_S)
    for trial in trials:
        _, mix, tower, num_steps = trial.split(":")
        notes = run_trial(folder / "model", topology, int(num_steps), mix, tower)
        if topology.is_main:
            (folder / f"{trial}.json").write_text(json.dumps(notes))
    topology.stop()


def main() -> None:
    folder, trials = Path(sys.argv[1]), sys.argv[2:]
    write_tiny(folder / "model", ["A red coat costs 12."], clip=CLIP, decoder=DECODER)
    for world_size in sorted({int(trial.split(":")[0]) for trial in trials}):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        mine = [trial for trial in trials if trial.startswith(f"{world_size}:")]
        arguments = (world_size, folder, mine, port)
        mp.start_processes(run_rank, arguments, nprocs=world_size, start_method="fork")


if __name__ == "__main__":
    main()
