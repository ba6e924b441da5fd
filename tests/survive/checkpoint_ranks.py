"""Trains, saves, loads and resaves a small module under real ZeRO-3, in one group of processes after another.

    python checkpoint_ranks.py FOLDER        leaves checkpoints, and a note of what each group saw: train-2.json, …

Surprise: groups are forked from this process instead of started by torchrun, because a rank needs eight seconds to
import DeepSpeed and what it pulls in, and these are eight ranks. Asserting is done by test_checkpoint.py.
"""

import json
import logging
import os
import random
import resource
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch._inductor.compile_fx  # a first deepspeed.initialize imports it: once here, for all groups
import torch.distributed as dist
import torch.multiprocessing as mp
import xxhash
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from phi3v_dist.errors import CheckpointError
from phi3v_dist.parallel.partitions import Partitions
from phi3v_dist.parallel.topology import switch_off_shm_op
from phi3v_dist.survive import random_state
from phi3v_dist.survive.checkpoint import Checkpoints, Position

VOCAB, GLOBAL_BATCH, MICRO_BATCH, STEPS = 37, 12, 2, 3  # STEPS before the save, and again after it
DTYPES = ("fp32", "bf16")
# Ranks, checkpoints they begin from, checkpoints they write. The first group trains from scratch; the second resumes
# at the same world size; the others pass a checkpoint on from world size to world size, back to the first.
LAUNCHES = [
    (2, "", "train-2"),
    (2, "train-2", "resumed-2"),
    (1, "train-2", "reshard-1"),
    (3, "reshard-1", "reshard-3"),
    (2, "reshard-3", "reshard-2"),
]


class OddSizes(nn.Module):
    """No size divides by 2 or 3; one tensor is smaller than the ranks are many; some are frozen, tied or buffers.

    Frozen weights do not follow the seed of the process: they are read from where they always were.
    """

    def __init__(self, dropout: float, width: int = 13, frozen_seed: int = 0):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.wte = self.embed
        self.frozen = nn.Linear(width, 7).requires_grad_(False)
        for param in self.frozen.parameters():
            nn.init.normal_(param, generator=torch.Generator().manual_seed(frozen_seed))
        self.up = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.temperature = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(11, VOCAB, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("offset", torch.rand(5))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.dropout(self.norm(self.up(self.frozen(self.embed(input_ids[:, :-1])))))
        logits = self.head(hidden * self.temperature) + self.offset[0]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), input_ids[:, 1:].flatten())


def build(dtype: str, seed: int, dropout: float = 0.1, model: nn.Module | None = None):
    torch.manual_seed(seed)
    model = model or OddSizes(dropout)
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in trained if param.ndim > 1], "lr": 1e-2, "weight_decay": 0.1, "name": "matrices"},
        {"params": [param for param in trained if param.ndim <= 1], "lr": 3e-2, "weight_decay": 0.0, "name": "vectors"},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    settings = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
        # Several sub-groups for each parameter group; some tensors stay gathered between steps, some do not.
        "zero_optimization": {"stage": 3, "sub_group_size": 200, "stage3_param_persistence_threshold": 50},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if dtype == "bf16" and dist.get_world_size() == 2:
        settings["zero_optimization"]["zero_hpz_partition_size"] = 2  # secondary copies, which a load must drop
    engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)[0]
    random_state.reseed(seed, 0, dist.get_rank())  # dropout differs between ranks
    return engine


def micro_step(engine, step: int, index: int) -> str:
    ids = torch.randint(VOCAB, (GLOBAL_BATCH, 5), generator=torch.Generator().manual_seed(step))
    row = (index * dist.get_world_size() + dist.get_rank()) * MICRO_BATCH
    loss = engine(ids[row : row + MICRO_BATCH])
    engine.backward(loss)
    engine.step()
    return float(loss).hex()


def train(engine, first_step: int) -> list[list[str]]:
    """Losses of STEPS steps, for each rank all micro-steps in hexadecimal: equal means bit for bit."""
    steps = range(first_step, first_step + STEPS)
    losses = [
        micro_step(engine, step, index) for step in steps for index in range(engine.gradient_accumulation_steps())
    ]
    assert engine.global_steps == first_step + STEPS, (engine.global_steps, first_step)
    return everyone(losses)


def everyone(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def digests(engine) -> dict[str, str]:
    """Every master, moment and computing weight, whole, by DeepSpeed's public calls."""
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(param):
            tensors = {"computing": param.detach().clone()}
        if param.requires_grad:
            tensors["weight"] = safe_get_full_fp32_param(param)
            tensors |= {key: safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")}
        for state, tensor in tensors.items():
            found[f"{state}/{name}"] = digest(tensor)
    return found | {"buffer/offset": digest(engine.module.offset)}


def digest(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def position(step: int) -> Position:
    loader = {"epoch": 1, "taken": 12 * step}
    return Position(step=step, run_id="a-run", loader=loader, attempt=2, config_digest="c0ffee", seed=7)


def refusal(call) -> list[str]:
    """What a call that must fail told the person who reads it, on every rank."""
    try:
        call()
    except CheckpointError as error:
        return everyone(error.report())
    return everyone("did not fail")


def names(folder: Path) -> list[str]:
    """What is in a checkpoint folder, or was left by a save, but for the empty folder of the attempt that writes."""
    dist.barrier()
    found = sorted(path for path in folder.iterdir() if not path.name.startswith(".attempt-"))
    return [path.name for path in found + sorted(folder.glob(".attempt-*/*"))]


def run_train(folder: Path) -> dict:
    notes = {}
    for dtype in DTYPES:
        uninterrupted = build(dtype, seed=1)
        notes[f"{dtype} uninterrupted"] = [train(uninterrupted, 0), train(uninterrupted, STEPS)]
        notes[f"{dtype} end"] = digests(uninterrupted)
        engine = build(dtype, seed=1)
        before = train(engine, 0)
        notes[f"{dtype} saved"] = digests(engine)
        path = Checkpoints(folder / dtype, keep=1).save(engine, position(STEPS))
        notes[f"{dtype} with a save"] = [before, train(engine, STEPS)]
        Checkpoints(folder / dtype, keep=1).load(engine, path)
        notes[f"{dtype} rolled back"] = train(engine, STEPS)
        notes[f"{dtype} beside a save"] = beside_a_save(engine, folder / f"{dtype} beside", path)
    return notes | weights_only(folder) | refusals(engine, folder)


def beside_a_save(engine, folder: Path, path: Path) -> dict:
    """A save begun at the same point as the one in `path`, held to a rate at which only its header is written until
    somebody waits for it; training goes on meanwhile."""
    checkpoints = Checkpoints(folder, keep=1, write_mb_per_s=1e-5)
    checkpoints.load(engine, path)
    checkpoints.begin(engine, position(STEPS))
    losses = train(engine, STEPS)
    still_busy = checkpoints.busy and checkpoints.poll() is None
    saved = checkpoints.wait()
    return {
        "losses": losses, "was busy": everyone(still_busy), "saved": [saved.path.name, saved.step, saved.size_bytes]
    }  # fmt: skip


def weights_only(folder: Path) -> dict:
    """An engine without an optimizer: what it holds is saved as it is, frozen or not."""
    torch.manual_seed(3)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
    engine = deepspeed.initialize(model=OddSizes(0.0), config=settings)[0]
    path = Checkpoints(folder / "weights-only", keep=1).save(engine, position(STEPS))
    whole = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(param):
            whole[name] = digest(param)
    refused = refusal(lambda: Checkpoints(folder / "weights-only", keep=1).load(engine, path))
    return {"weights only": whole, "weights only loaded": refused}


def refusals(engine, folder: Path) -> dict:
    """What must not be saved or loaded, and what stays in the folder then."""
    notes = {}
    checkpoints = Checkpoints(folder / "pruned", keep=2)
    if dist.get_rank() == 0:
        (folder / "pruned" / ".tmp-step-00000009-killed").mkdir(parents=True)
    dist.barrier()
    checkpoints.newest()
    notes["a reader leaves"] = names(checkpoints.folder)
    for step in (1, 2, 3):
        checkpoints.save(engine, position(step))
    notes["pruned"] = names(checkpoints.folder)

    rank_file = checkpoints.folder / "step-00000003" / "rank-00001.safetensors"
    if dist.get_rank() == 0:
        rank_file.write_bytes(rank_file.read_bytes()[:-1])
    dist.barrier()
    checkpoints.save(engine, position(4))
    notes["pruned beside a damaged one"] = names(checkpoints.folder)

    before = (checkpoints.folder / "step-00000004" / "manifest.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    notes["disk full"] = refusal(lambda: checkpoints.save(engine, position(5)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    notes["after disk full"] = names(checkpoints.folder)
    notes["newest after disk full"] = checkpoints.newest().name
    assert (checkpoints.folder / "step-00000004" / "manifest.json").read_bytes() == before

    notes["not JSON"] = refusal(lambda: checkpoints.save(engine, replace(position(5), loader={"taken": {1, 2}})))
    checkpoints.save(engine, replace(position(4), attempt=3))
    notes["saved again"] = names(checkpoints.folder)

    step = engine.global_steps
    for index in range(engine.gradient_accumulation_steps()):
        micro_step(engine, step, index)
        if index + 1 < engine.gradient_accumulation_steps():
            notes[f"in window, {index + 1} done"] = refusal(lambda: checkpoints.save(engine, position(6)))
    engine.backward(engine(torch.zeros(1, 5, dtype=torch.long)))
    notes["in window, before the step"] = refusal(lambda: checkpoints.save(engine, position(6)))
    checkpoints.load(engine, folder / "bf16" / "step-00000003")
    notes["bf16 rolled back inside a window"] = train(engine, STEPS)
    engine.module.up.weight.requires_grad_(False)
    notes["role of a parameter frozen later"] = Partitions(engine).specs()["up.weight"].role

    class Other(OddSizes):
        def __init__(self):
            super().__init__(dropout=0.0, width=17)
            self.extra = nn.Linear(3, 3)
            del self.offset
            self.norm.bias.requires_grad_(False)

        def forward(self, input_ids):
            return self.extra.weight.sum()

    other = build("fp32", 1, model=Other())
    elsewhere = build("fp32", 1, model=OddSizes(0.0, frozen_seed=1))
    notes["other frozen weights"] = refusal(lambda: checkpoints.load(elsewhere, folder / "fp32" / "step-00000003"))
    notes["other model"] = refusal(lambda: checkpoints.load(other, checkpoints.folder / "step-00000004"))
    return notes


def run_reshard(source: Path, target: Path) -> dict:
    """Load into fresh engines of another seed: continue in one, look at the other and save it at this world size."""
    notes = {}
    for dtype in DTYPES:
        checkpoints = Checkpoints(source / dtype, keep=1)
        path = checkpoints.newest()
        engine = build(dtype, seed=99)
        found = checkpoints.load(engine, path)
        notes[f"{dtype} position"] = found == position(STEPS)
        notes[f"{dtype} continued"] = train(engine, STEPS)
        notes[f"{dtype} end"] = digests(engine)

        plain = build(dtype, seed=99, dropout=0.0)
        checkpoints.load(plain, path)
        notes[f"{dtype} loaded"] = digests(plain)
        Checkpoints(target / dtype, keep=1).save(plain, found)
        notes[f"{dtype} draws"] = everyone([random.random(), np.random.rand(), float(torch.rand(1))])
        losses = [[float.fromhex(loss) for loss in rank] for rank in train(plain, STEPS)]
        by_step = np.array(losses).reshape(len(losses), STEPS, -1).mean((0, 2))
        notes[f"{dtype} step losses without dropout"] = by_step.tolist()
    return notes


def run_rank(rank: int, world_size: int, folder: Path, source: str, target: str) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    switch_off_shm_op()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    meet = f"file://{folder}/meet-{target}"
    deepspeed.init_distributed("gloo", False, init_method=meet, rank=rank, world_size=world_size)  # False: no MPI
    notes = run_reshard(folder / source, folder / target) if source else run_train(folder / target)
    if rank == 0:
        (folder / f"{target}.json").write_text(json.dumps(notes))
    dist.destroy_process_group()


def main() -> None:
    folder = Path(sys.argv[1])
    for world_size, source, target in LAUNCHES:
        mp.start_processes(run_rank, (world_size, folder, source, target), nprocs=world_size, start_method="fork")


if __name__ == "__main__":
    main()
