"""A tiny Phi-3-V is trained and saved by DeepSpeed's own `save_checkpoint`; others go on from what was imported of it.

    python deepspeed_ranks.py FOLDER        FOLDER/NAME.yaml: settings, one file for each way to train

Leaves NAME-old/, the imported runs NAME-2 and NAME-3 (their number of ranks), and a note of what each group saw. Groups
are forked, because importing takes a rank longest. Asserting is done by test_deepspeed_import.py.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch._inductor.compile_fx  # a first deepspeed.initialize imports it: once here, for all groups
import torch.distributed as dist
import torch.multiprocessing as mp
from checkpoint_ranks import digest, everyone
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from phi3v_dist import config, run
from phi3v_dist.parallel.partitions import official_name
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.survive.checkpoint import Checkpoints
from phi3v_dist.survive.deepspeed_files import DeepSpeedCheckpoint
from phi3v_dist.survive.deepspeed_import import import_checkpoint

STEPS, ROWS, TOKENS = 2, 6, 9
LABELS = ROWS * (TOKENS - 1)


def step(engine, number: int) -> float:
    """One optimizer step on rows that any number of ranks shares; returns the mean loss of its tokens."""
    ids = torch.randint(3, 60, (ROWS, TOKENS), generator=torch.Generator().manual_seed(number))
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-3
    total = torch.zeros((), dtype=torch.float64)
    for row in ids[dist.get_rank() :: dist.get_world_size()]:
        losses = engine(input_ids=row[None], labels=row[None]).token_losses.sum()
        engine.backward(losses * (dist.get_world_size() / LABELS), scale_wrt_gas=False)
        engine.step()
        total += losses.detach().double()
    dist.all_reduce(total)
    return float(total) / LABELS


def digests(engine) -> dict[str, str]:
    """Every master and moment, whole, by DeepSpeed's public calls."""
    found = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            found[f"weight/{official_name(name)}"] = digest(safe_get_full_fp32_param(param))
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}/{official_name(name)}"] = digest(safe_get_full_optimizer_state(param, key))
    return found


def save(engine, folder: Path, name: str) -> dict:
    for number in range(STEPS):
        step(engine, number)
    state = {"arguments": argparse.Namespace(seed=1)}  # what scripts put there, and what weights_only refuses
    engine.save_checkpoint(str(folder / f"{name}-old"), client_state=state)
    return {"digests": digests(engine), "losses": [step(engine, STEPS + number) for number in range(STEPS)]}


def resume(engine, run_folder: Path) -> dict:
    checkpoints = Checkpoints(run_folder / "checkpoints", keep=1)
    position = checkpoints.load(engine, checkpoints.newest())
    note = {"digests": digests(engine), "position": [position.step, position.loader], "step": engine.global_steps}
    return note | {"losses": [step(engine, STEPS + number) for number in range(STEPS)]}


def run_rank(rank: int, world_size: int, folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    meet = f"file://{folder}/meet-{name}-{world_size}-{(folder / f'{name}-old').exists()}"
    deepspeed.init_distributed("gloo", False, init_method=meet, rank=rank, world_size=world_size)
    topology = Topology(rank, world_size, rank, world_size)
    settings = settings_of(folder, name, world_size)
    is_old = not (settings.run.folder / "checkpoints").exists()
    torch.manual_seed(1 if is_old else 99)
    engine = run._engine(settings, topology)
    everyone(is_old)  # all have looked before one writes
    note = save(engine, folder, name) if is_old else resume(engine, settings.run.folder)
    if rank == 0:
        (folder / f"{name}-{'old' if is_old else world_size}.json").write_text(json.dumps(note))
    dist.destroy_process_group()


def settings_of(folder: Path, name: str, world_size: int):
    return config.load(folder / f"{name}.yaml", [f"run.name={name}-{world_size}"])


def main() -> None:
    folder = Path(sys.argv[1])
    for name in sorted(path.stem for path in folder.glob("*.yaml")):
        mp.start_processes(run_rank, (2, folder, name), nprocs=2, start_method="fork")
        for world_size in (2, 3):
            import_checkpoint(DeepSpeedCheckpoint.open(folder / f"{name}-old"), settings_of(folder, name, world_size))
            mp.start_processes(run_rank, (world_size, folder, name), nprocs=world_size, start_method="fork")


if __name__ == "__main__":
    main()
