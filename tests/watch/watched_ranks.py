"""One rank of a small gloo loop that reports where it is, and, as local rank 0, has itself watched.

    python watched_ranks.py FOLDER ATTEMPT_FOLDER HOST RANK WORLD_SIZE PORT STEPS HANG_S [LOCAL_RANK LOCAL_SIZE]

Faults come through PHI3V_FAULT, as everywhere. A rank that loses another one ends with WATCHED_CODE. WATCHED_RANKS
says what rank 1 does:

- `skip`: goes another way at step 5.
- `slow`: takes its time at step 6, with signs of life.
- `burns`: computes at step 6 without a sign of life, until there is a file `go` beside the attempts.
- `evaluates`: at step 6, copies its model in many short parts, then has one prefill that takes three times as long as
  the limit of the copy.
- `leaves`: stops while it loads.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from phi3v_dist.watch import heartbeat, watcher
from phi3v_dist.watch.limits import Bounds
from phi3v_dist.watch.node_report import read_report, report_path

folder, attempt_folder, host, rank, world_size, port, steps, hang_s, *local = sys.argv[1:]
local_rank, local_size = map(int, local or (rank, world_size))
os.environ |= {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
slow_factor = float(os.environ.get("WATCHED_SLOW_FACTOR", "10"))
heartbeat.open(Path(folder), int(rank), host, Bounds(float(hang_s), 10.0, 60.0, slow_factor))
if local_rank == 0:
    watcher.start(Path(folder), Path(attempt_folder), host, local_size)

if os.environ.get("WATCHED_RANKS") == "leaves":
    heartbeat.enter("load")
    if rank == "1":
        heartbeat.close(heartbeat.STOPPED, "SIGTERM", 0)
        sys.exit()
    time.sleep(600)  # as if in a collective operation, which no signal but a kill ends in time

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

how = os.environ.get("WATCHED_RANKS", "")
torch.set_num_threads(1)
try:
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    while not (report := read_report(report_path(Path(attempt_folder), host))) or all(
        one.rank != int(rank) for one in report.ranks
    ):
        time.sleep(0.02)  # until the watcher has seen this rank: on a busy machine it starts late
    for step in range(1, int(steps) + 1):
        heartbeat.enter("data", step, f"shard-000.tar:{step:05d}")
        if how == "slow" and rank == "1" and step == 6:
            for part in range(6):  # longer than the others' bound, with signs of life
                time.sleep(float(hang_s) / 2)
                heartbeat.beat(f"part {part}")
        heartbeat.enter("forward", step)
        if how == "skip" and rank == "1" and step == 5:
            heartbeat.enter("evaluate", 0)
            dist.recv(torch.ones(4), src=0)
        if how == "burns" and rank == "1" and step == 6:
            while not (Path(attempt_folder).parents[1] / "go").exists():
                pass
        if how == "evaluates" and rank == "1" and step == 6:
            heartbeat.enter("evaluate", what="a copy of the model", kind="copy")
            for part in range(50):
                heartbeat.beat(f"weight {part}", work=1000)
            heartbeat.enter("evaluate", 0, kind="read")
            heartbeat.beat(kind="prefill", work=30_000)
            time.sleep(3 * float(hang_s))
        dist.all_reduce(torch.ones(4))
        heartbeat.enter("backward", step)
        dist.all_reduce(torch.ones(4))
        heartbeat.enter("optimizer", step)
        time.sleep(0.02)
        heartbeat.enter("write", step, f"step-{step:08d}", lane=heartbeat.SAVE)
        heartbeat.enter("idle", lane=heartbeat.SAVE)
except RuntimeError as error:
    heartbeat.close(heartbeat.FAILED, str(error), int(os.environ.get("WATCHED_CODE", "1")))
    raise
heartbeat.close(heartbeat.DONE)
