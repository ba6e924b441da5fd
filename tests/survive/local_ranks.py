"""Two ranks with a folder of their own each, as if on the disks of two nodes: fast copies, and what may become of them.

    python local_ranks.py FOLDER        leaves a note of what each group of ranks saw: saved.json, damaged.json, …

Surprise: all but two groups save tensors made up by writer_ranks.py, so that only those need DeepSpeed, and a step's
content is known without one. Asserting is done by test_local.py.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from checkpoint_ranks import STEPS, build, digests, everyone, train
from writer_ranks import FORK, end, made_up, step_and_content

from phi3v_dist.errors import CheckpointError
from phi3v_dist.survive.checkpoint import Checkpoints, Position, Saved
from phi3v_dist.survive.fence import Fence
from phi3v_dist.survive.retention import committed
from phi3v_dist.survive.started import Started, write_started

SMALL = 1000  # elements
EVERY = 3  # of six saves, the first and the fourth go to the run folder
OURS = Started(1, 0, 0)

Scenario = Callable[[Path, int], dict]


def checkpoints_of(folder: Path, node: object, attempt: int = 1) -> Checkpoints:
    return Checkpoints(
        folder / "shared", keep=2, attempt=attempt, local=folder / f"node-{node}" / "checkpoints", shared_every=EVERY
    )


def save(checkpoints: Checkpoints, steps: range) -> list:
    """What became of each: the place, or what was said."""
    seen = []
    for step in steps:
        share = made_up(step, dist.get_rank(), dist.get_world_size(), SMALL)
        checkpoints.writer.begin(share, 0.0, checkpoints._next_store(must_last=False))
        outcome = checkpoints.wait()
        seen.append(str(outcome) if not isinstance(outcome, Saved) else "shared" if outcome.is_shared else "local")
    return seen


def saved(folder: Path, rank: int) -> dict:
    checkpoints = checkpoints_of(folder, rank)
    checkpoints.claim()
    if rank == 0:
        write_started(checkpoints._shared.fence, OURS)
    notes = {"places": save(checkpoints, range(1, 7))}
    stores = [checkpoints._shared, checkpoints._local]
    return notes | {"names": everyone([[path.name for path in committed(store.folder)] for store in stores])}


def on_one_disk(folder: Path, rank: int) -> dict:
    checkpoints = checkpoints_of(folder, "both")
    checkpoints.claim()
    if rank == 0:
        write_started(checkpoints._shared.fence, OURS)
    save(checkpoints, range(1, 3))
    path = checkpoints.newest()
    files = sorted(file.name for file in path.iterdir())
    step = step_and_content(path)
    dist.barrier()
    checkpoints.finish()
    return {"files": files, "step": step, "groups": checkpoints._local.groups}


def newest(folder: Path, rank: int) -> dict:
    """What a resume finds, and says."""
    return found(checkpoints_of(folder, rank))


def newest_elsewhere(folder: Path, rank: int) -> dict:
    return found(checkpoints_of(folder, 1 - rank))


def found(checkpoints: Checkpoints) -> dict:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("phi3v_dist").addHandler(handler)
    try:
        path = checkpoints.newest()
        answer = [path.parent.parent.name, path.name] if path else None
    except CheckpointError as error:
        answer = str(error)
    return {"newest": everyone(answer), "said": everyone(said)}


def not_writable(folder: Path, rank: int) -> dict:
    """Rank 1's node has a file where the folder should be."""
    if rank == 1:
        (folder / "node-1").write_text("")
    checkpoints = checkpoints_of(folder, rank)
    checkpoints.claim()
    return {"places": save(checkpoints, range(1, 4))}


def trained(folder: Path, rank: int) -> dict:
    """Step STEPS to the run folder, twice as many to the nodes, then on without a break."""
    checkpoints, engine = checkpoints_of(folder, rank), build("fp32", seed=1)
    checkpoints.prepare(engine)
    assert checkpoints.resume(engine) is None
    train(engine, 0)
    paths = [checkpoints.save(engine, position(STEPS, 1))]
    train(engine, STEPS)
    paths.append(checkpoints.save(engine, position(2 * STEPS, 1)))
    notes = {"digests": digests(engine), "paths": everyone([str(path.relative_to(folder)) for path in paths])}
    return notes | {"losses": train(engine, 2 * STEPS)}


def resumed(folder: Path, rank: int) -> dict:
    checkpoints, engine = checkpoints_of(folder, rank, attempt=2), build("fp32", seed=99)
    checkpoints.prepare(engine)
    path, where = checkpoints.resume(engine)
    notes = {"path": everyone(str(path.relative_to(folder))), "position": where.step, "digests": digests(engine)}
    notes["losses"] = train(engine, 2 * STEPS)
    checkpoints.begin(engine, position(3 * STEPS, 2), must_last=True)
    notes["last is shared"] = checkpoints.wait().is_shared
    checkpoints.finish()
    dist.barrier()
    return notes | {"left": [path.name for path in folder.iterdir() if path.name.startswith("node-")]}


def position(step: int, attempt: int) -> Position:
    return Position(step, "a-run", {}, attempt, "c0ffee", seed=7)


def run_rank(rank: int, world_size: int, scenario: Scenario, folder: Path, name: str, fault: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), PHI3V_FAULT=fault)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    meet = f"file://{folder.parent}/meet-{name}"
    deepspeed.init_distributed("gloo", False, init_method=meet, rank=rank, world_size=world_size)
    notes = scenario(folder, rank)
    if rank == 0:
        (folder.parent / f"{name}.json").write_text(json.dumps(notes))
    dist.destroy_process_group()


def group(folder: Path, name: str, scenario: Scenario, world_size: int = 2, run: str = "", fault: str = "") -> None:
    """Run a scenario in as many processes, in a folder of its name, or of an earlier one's that is `run`."""
    where = folder / (run or name)
    where.mkdir(exist_ok=True)
    ranks = [
        FORK.Process(target=run_rank, args=(rank, world_size, scenario, where, name, fault))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    codes = end(ranks, timeout_s=90)
    assert fault or not any(codes), (name, codes)


def after(folder: Path, name: str, change: Callable[[Path], object], scenario: Scenario = newest, world_size: int = 2):
    """What a resume finds after a change to what `saved` left."""
    shutil.copytree(folder / "saved", folder / name)
    change(folder / name)
    group(folder, name, scenario, world_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def main() -> None:
    folder = Path(sys.argv[1])
    newest_copy = Path("node-1", "checkpoints", "step-00000006")
    group(folder, "saved", saved)
    after(folder, "whole", lambda run: None)
    after(folder, "damaged", lambda run: flip(run / newest_copy / "rank-00001.safetensors"))
    after(folder, "missing", lambda run: shutil.rmtree(run / newest_copy))
    after(folder, "moved", lambda run: None, newest_elsewhere)
    after(folder, "three", lambda run: None, newest, 3)
    went_on = Started(2, 4, 1)
    after(folder, "left behind", lambda run: write_started(Fence(run / "shared", 1), went_on))
    after(folder, "only copies", lambda run: [shutil.rmtree(p) for p in (run / "shared").glob("step-*")], newest, 3)
    for phase in ("write", "commit"):
        group(folder, f"killed in {phase}", saved, fault=f"1:{phase}:3:kill9")
        group(folder, f"after a kill in {phase}", newest, run=f"killed in {phase}")
    group(folder, "full", saved, fault="1:write:3:enospc")
    group(folder, "not writable", not_writable)
    group(folder, "on one disk", on_one_disk)
    group(folder, "trained", trained, run="engine")
    group(folder, "resumed", resumed, run="engine")


if __name__ == "__main__":
    main()
