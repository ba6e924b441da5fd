"""Trains a tiny Phi-3-V under real ZeRO-3, evaluates it in between, and notes every answer token by token.

    python generation_ranks.py FOLDER 2:evaluated 2:plain 3:uneven      leaves FOLDER/TRIAL.json

FOLDER holds config.yaml. A trial is ranks : what happens. `evaluated` trains, saves, evaluates greedily and with draws,
and trains on; `plain` does the same without evaluating; `uneven` evaluates the weights that it began with, on 7 samples
and on 2. Surprise: ranks are forked from this process, as in ../survive/checkpoint_ranks.py. Asserting is done by
test_generation_ranks.py.
"""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch._inductor.compile_fx  # noqa: F401  # a first deepspeed.initialize imports it: once here, for all groups
import xxhash

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked_ranks import fork_ranks, joined, num_ranks

from phi3v_dist import config, run
from phi3v_dist.config import Settings
from phi3v_dist.data.loader import Loader
from phi3v_dist.evaluate import evaluator as module
from phi3v_dist.evaluate.evaluator import Evaluator
from phi3v_dist.model.build import partitioned_model, proven_backend
from phi3v_dist.model.official_config import read_config
from phi3v_dist.parallel import zero
from phi3v_dist.parallel.partitions import Partitions
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.survive.checkpoint import Checkpoints, Position
from phi3v_dist.train.optim import build_optimizer
from phi3v_dist.train.step import train_step

STEPS = 2  # before the evaluation, and again after it
RATES = {"text": 1e-3, "vision": 1e-3, "projector": 1e-3}
DRAWN = {"temperature": 0.9, "top_p": 0.95}
TIMEOUT_S = 240.0


def recorded(answers: dict[str, Any], prompts: dict[str, Any] | None = None):
    """`generate`, which also notes each answer under its sample's id, or `id blind` when it is asked a second time."""
    real = module.generate

    def generate(model, asked, *arguments):
        found = real(model, asked, *arguments)
        for prompt, answer in zip(asked, found, strict=True):
            name = f"{prompt.sample_id} blind" if str(prompt.sample_id) in answers else str(prompt.sample_id)
            assert name not in answers, "asked a third time"
            answers[name] = [list(answer.ids), answer.stopped]
            if prompts is not None:
                prompts[name] = prompt
        return found

    return generate


def build(settings: Settings, topology: Topology):
    """As run.py does it, every tensor partitioned however small."""
    ds_config = zero.resolve(
        settings, topology.world_size, torch.float32, read_config(settings.model.path)["hidden_size"]
    )
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = partitioned_model(settings, proven_backend(settings, topology.device), ds_config)
    return zero.initialize(model.train(), build_optimizer(model, settings.train), ds_config)


def batches(settings: Settings, engine, topology: Topology):
    data = run.Data.open_together(settings.data.train, settings, topology)
    return iter(
        Loader(
            run.plan(settings, data), data.decoder, data.lengths, topology.rank, topology.world_size,
            engine.gradient_accumulation_steps(), 1, 1,
        )
    )  # fmt: skip


def ask(settings: Settings, engine, topology: Topology, folder: Path | None, num_samples=None, **changes) -> dict:
    """Every rank's answers of an evaluation, and its metrics."""
    data = run.Data.open_together(settings.data.validation, settings, topology)
    sample_ids = run.fixed_order(data.lengths, settings.data.row_length_tokens)
    choice = settings.eval.model_copy(update=changes)
    answers: dict[str, Any] = {}
    real, module.generate = module.generate, recorded(answers)
    try:
        evaluator = Evaluator(data.decoder, data.lengths, sample_ids, choice, topology, settings.run.seed)
        metrics = evaluator.run(engine.module, folder, num_samples)
    finally:
        module.generate = real
    return {"answers": topology.gather(answers), "metrics": metrics}


def state(engine) -> dict[str, str]:
    """This rank's masters, moments and random numbers."""
    found = {"generator": xxhash.xxh3_64_hexdigest(torch.random.get_rng_state().numpy())}
    for piece in Partitions(engine).pieces():
        for name, tensor in piece.states.items():
            found[f"{name}/{piece.name}"] = xxhash.xxh3_64_hexdigest(tensor.contiguous().view(torch.uint8).numpy())
    return found


def run_trial(settings: Settings, topology: Topology, what: str) -> dict:
    engine = build(settings, topology)
    if what == "uneven":
        return {
            "seven": ask(settings, engine, topology, None, batch_samples=1),
            "two": ask(settings, engine, topology, None, num_samples=2, batch_samples=1),
        }
    steps = batches(settings, engine, topology)
    train = lambda: [train_step(engine, *step, RATES, topology).loss.hex() for step in islice(steps, STEPS)]  # noqa: E731
    notes: dict[str, Any] = {"losses": train()}
    if what == "evaluated":
        position = Position(STEPS, "a-run", {}, 1, seed=0, config_digest="", extra={})
        Checkpoints(settings.run.folder / "checkpoints", keep=1).save(engine, position)
        notes["greedy"] = ask(settings, engine, topology, settings.run.folder / "eval" / f"step-{STEPS:06d}")
        notes["drawn"] = ask(settings, engine, topology, None, **DRAWN)
    notes["losses"] += train()
    return notes | {"state": topology.gather(state(engine))}


def run_rank(rank: int, world_size: int, port: int, trials: list[str], folder: Path) -> None:
    with joined(rank, world_size, port, TIMEOUT_S) as topology:
        for trial in trials:
            torch.manual_seed(0)
            notes = run_trial(config.load(folder / "config.yaml"), topology, trial.split(":")[1])
            if topology.is_main:
                (folder / f"{trial}.json").write_text(json.dumps(notes))


def main() -> None:
    folder, trials = Path(sys.argv[1]), sys.argv[2:]
    fork_ranks(run_rank, sorted(trials, key=num_ranks), folder)


if __name__ == "__main__":
    main()
