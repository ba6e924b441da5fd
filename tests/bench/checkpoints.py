"""Saving and loading 101 million parameters: our checkpoints beside DeepSpeed's, one process, one disk, in turn.

What comes in: a folder on a disk. What goes out: `Figure`s. DeepSpeed's save holds up training until it is done and
flushes nothing to the disk; ours is hashed, flushed, read back and committed, in the background. Surprise: this runs in
a process of its own, since DeepSpeed's setting up of a process group cannot be undone.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from figures import Figure

ROUNDS = 3  # saves on each side; the first of each does not count
WIDTH, NUM_LAYERS, ROWS = 2048, 24, 16
WRITE_MB_PER_S = 400


def figures(folder: Path) -> list[Figure]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, __file__, str(folder)], env=environment, check=True, stdout=subprocess.DEVNULL)
    seen = json.loads((folder / "seen.json").read_text())
    ours, theirs = median(seen["blocked_s"][1:]), median(seen["deepspeed_s"][1:])
    alone, beside = median(seen["step alone_s"]), median(seen["step beside_s"])
    size, least = seen["size_bytes"], seen["needed_bytes"]
    what = f"{seen['parameters'] / 1e6:.0f} M parameters, {size / 1e9:.2f} GB"
    return [
        Figure(
            "save, training held up, against DeepSpeed", f"{ours / theirs:.3f} x", "≤ 0.10 x",
            f"{1e3 * ours:.0f} against {1e3 * theirs:.0f} ms, {what}; the writing {median(seen['write_s'][1:]):.1f} s",
        ),
        Figure(
            "step beside a save", f"{100 * (beside / alone - 1):+.1f} %", "≤ 10 %",
            f"{alone:.2f} s alone, {beside:.2f} s while the writer keeps to {WRITE_MB_PER_S} MB/s",
        ),
        Figure("checkpoint, bytes", f"{size / least:.4f} x", "≤ 1.01 x", "of what masters and moments take"),
        Figure(
            "load, against DeepSpeed", f"{seen['load_s'] / seen['deepspeed load_s']:.2f} x", "< 1 x",
            f"{seen['load_s']:.2f} s, every byte hashed first, against {seen['deepspeed load_s']:.2f} s",
        ),
    ]  # fmt: skip


def run(folder: Path) -> dict:
    import deepspeed
    import torch
    from torch import nn

    from phi3v_dist.survive.checkpoint import Checkpoints, Position, Saved

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else built from source, in a minute
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/meet", rank=0, world_size=1)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    settings = {
        "train_batch_size": ROWS, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    rows = torch.randn(ROWS, WIDTH)

    def step() -> float:
        began = time.perf_counter()
        engine.backward(engine(rows).square().mean())
        engine.step()
        return time.perf_counter() - began

    def position() -> Position:
        return Position(engine.global_steps, "bench", {}, 1, "none")

    checkpoints = Checkpoints(folder / "ours", keep=1, write_mb_per_s=WRITE_MB_PER_S)
    checkpoints.prepare(engine)
    step()
    seen: dict = {name: [] for name in ("blocked_s", "write_s", "deepspeed_s", "step alone_s", "step beside_s")}
    saved = None
    for _ in range(ROUNDS):
        began = time.perf_counter()
        engine.save_checkpoint(str(folder / "theirs"))
        seen["deepspeed_s"].append(time.perf_counter() - began)
        os.sync()  # what DeepSpeed left to the system must not slow what is timed next
        seen["step alone_s"] += [step() for _ in range(2)]
        checkpoints.begin(engine, position())
        while checkpoints.busy:
            seen["step beside_s"].append(step())
        saved = checkpoints.poll()
        assert isinstance(saved, Saved), saved
        seen["blocked_s"].append(saved.blocked_s)
        seen["write_s"].append(saved.write_s)
    for name, load in (
        ("deepspeed load_s", lambda: engine.load_checkpoint(str(folder / "theirs"))),
        ("load_s", lambda: checkpoints.load(engine, checkpoints.newest())),
    ):
        began = time.perf_counter()
        load()
        seen[name] = time.perf_counter() - began
    parameters = sum(param.ds_numel for param in engine.module.parameters())
    seen |= {"parameters": parameters, "needed_bytes": 12 * parameters, "size_bytes": saved.size_bytes}
    return seen


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "seen.json").write_text(json.dumps(run(target)))
