"""Trains, saves and loads a tiny Phi-3-V with each of ds_configs/, under real ZeRO-3, and notes what every rank saw.

    python offload_ranks.py FOLDER 2:train:zero3 2:resume:zero3:zero3_offload 1:resume:zero3_hpz:zero3 …

A trial is ranks : `train` : file, or ranks : `resume` : file of the checkpoint : file to go on with; FOLDER/TRIAL.json
is what came of it. Checkpoints are made by two ranks. Surprise: one step of each training is not finite and skipped,
and its save is written while training goes on. Asserting is done by test_offloads.py.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import collective_ranks
import numbers_ranks
from deepspeed.utils import groups
from forked_ranks import fork_ranks, joined

from phi3v_dist.config import Settings
from phi3v_dist.evaluate.generate import local_copy, plain_linear
from phi3v_dist.model.build import partitioned_model, proven_backend
from phi3v_dist.model.offload import HostActivations
from phi3v_dist.model.tiny import write_tiny
from phi3v_dist.parallel import replicas, zero
from phi3v_dist.parallel.partitions import Partitions
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.survive.checkpoint import Checkpoints, Position, read_tensors
from phi3v_dist.train.optim import build_optimizer
from phi3v_dist.train.step import train_step

FILES = Path(__file__).parents[2] / "ds_configs"
RANKS_PER_NODE = 2
RATES = {"text": 2e-3, "vision": 1e-3, "projector": 5e-4}
SAVED_AT, SKIPPED, STEPS_AFTER = 3, 2, 10
# Large enough for DeepSpeed to move some of its optimizer's states to a disk, which begins at 1 MiB.
DECODER = collective_ranks.DECODER | {"hidden_size": 128, "intermediate_size": 512}
MIX = collective_ranks.Mix([(collective_ranks.ONE, True), *[(collective_ranks.TEXT, True)] * 5], 2)


def build(folder: Path, topology: Topology, file: str, seed: int):
    """As run.py does it: some parts frozen, activations in host memory, random weights of this seed."""
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of an engine before this one in the process, which a run has not
    settings = Settings.model_validate(
        {"model": {"path": folder / "model", "init_from": "random", "vision_chunk_crops": collective_ranks.CHUNK_CROPS},
         "run": {"seed": seed}, "data": {"train": [{"shards": "none"}]},
         "train": {"steps": 1000, "rows_per_step": MIX.rows_per_step, "grad_clip": 0.5, "parts": {"vision": "frozen"}},
         "parallel": {"deepspeed": FILES / f"{file}.json", "nvme": folder / "nvme"}}
    )  # fmt: skip
    assert zero.problems(settings, topology.world_size) == []
    ds_config = zero.resolve(settings, topology.world_size, torch.float32, DECODER["hidden_size"])
    model = partitioned_model(settings, proven_backend(settings, topology.device), ds_config)
    model.set_gradient_checkpointing(True, collective_ranks.CHUNK_CROPS, host_activations=HostActivations())
    optimizer = build_optimizer(model, settings.train, on_host=zero.steps_on_host(ds_config))
    return zero.initialize(model.train(), optimizer, ds_config)


def train(engine, topology: Topology, first: int, last: int) -> list:
    """Loss and gradient norm of steps first … last, or why one was skipped; ranks compared after each."""
    seen = []
    loader = MIX.loader(topology.rank, topology.world_size, SAVED_AT + STEPS_AFTER)  # its end is part of the plan
    steps = islice(loader, last)
    for plan, batches in steps:
        if plan.number < first:
            for _ in batches:
                pass
            continue
        before = numbers_ranks.digests(engine) if plan.number == SKIPPED else None
        result = train_step(engine, plan, batches, RATES, topology)
        replicas.compare(engine, topology)
        if before is None:
            seen.append([result.loss, result.grad_norm])
        else:
            seen.append([result.skipped, before == numbers_ranks.digests(engine)])
    return seen


def evaluated(engine) -> float:
    """The loss of the copy that evaluation makes, on words of its own."""
    copy = local_copy(engine.module)
    ids = torch.randint(3, 300, (1, 50), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), plain_linear():
        return float(copy(ids, labels=ids).loss)


def run_train(folder: Path, topology: Topology, file: str) -> dict:
    engine = build(folder, topology, file, seed=1)
    checkpoints = Checkpoints(folder / file, keep=1, write_mb_per_s=1e-5)
    checkpoints.prepare(engine)
    losses = train(engine, topology, 1, SAVED_AT)
    notes = {"evaluated": evaluated(engine), "saved": numbers_ranks.digests(engine)}
    pieces = {
        (piece.name, state): (piece.start, tensor.clone())
        for piece in Partitions(engine).pieces() for state, tensor in piece.states.items()
    }  # fmt: skip
    position = Position(step=SAVED_AT, run_id="a-run", loader={}, attempt=1, config_digest="c0ffee")
    checkpoints.begin(engine, position)
    losses += train(engine, topology, SAVED_AT + 1, SAVED_AT + STEPS_AFTER)
    notes["was busy"] = checkpoints.busy
    reader = read_tensors(checkpoints.wait().path)
    notes["written as it was"] = all(
        torch.equal(reader.read(name, state, start, len(tensor)), tensor)
        for (name, state), (start, tensor) in pieces.items()
    )
    return notes | {"losses": losses, "end": numbers_ranks.digests(engine), "built with": built_with(engine)}


def run_resume(folder: Path, topology: Topology, source: str, file: str) -> dict:
    engine = build(folder, topology, file, seed=1)
    checkpoints = Checkpoints(folder / source, keep=1)
    checkpoints.load(engine, checkpoints.newest())
    notes = {"loaded": numbers_ranks.digests(engine), "evaluated": evaluated(engine)}
    losses = train(engine, topology, SAVED_AT + 1, SAVED_AT + STEPS_AFTER)
    notes |= {"losses": losses, "end": numbers_ranks.digests(engine)}
    checkpoints.load(engine, checkpoints.newest())  # over states that are there already
    return notes | {"rolled back": train(engine, topology, SAVED_AT + 1, SAVED_AT + 2)}


def built_with(engine) -> dict:
    """What this engine was built with, as DeepSpeed itself has it."""
    optimizer = engine.optimizer
    return {
        "optimizer": optimizer.offload_optimizer, "disk": optimizer.swap_optimizer, "weights": optimizer.offload_param,
        "hpz": optimizer.zero_hpz_partition_size, "fused": bool(optimizer.optimizer.param_groups[0]["fused"]),
    }  # fmt: skip


def run_rank(rank: int, world_size: int, port: int, trials: list[str], folder: Path) -> None:
    with joined(rank, world_size, port, collective_ranks.TIMEOUT_S, RANKS_PER_NODE) as topology:
        for trial in trials:
            _, name, *files = trial.split(":")
            numbers_ranks.set_fault(f"0:backward:{SKIPPED}:nan")
            notes = topology.gather({"train": run_train, "resume": run_resume}[name](folder, topology, *files))
            if topology.is_main:
                (folder / f"{trial}.json").write_text(json.dumps(notes))


def main() -> None:
    folder, trials = Path(sys.argv[1]), sys.argv[2:]
    if not (folder / "model").exists():
        write_tiny(folder / "model", ["A red coat costs 12."], clip=collective_ranks.CLIP, decoder=DECODER)
    fork_ranks(run_rank, trials, folder)  # in the order given


if __name__ == "__main__":
    main()
