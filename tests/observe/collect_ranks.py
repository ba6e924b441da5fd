"""Four ranks on two hosts gather; then rank 1 ends without a word, and the others go on and end.

python collect_ranks.py FOLDER      leaves FOLDER/gathered.json, metrics.jsonl, and left-RANK of those that ended
"""

import json
import logging
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_collect import add

from phi3v_dist.data.pool import Meter
from phi3v_dist.observe.collect import Collector
from phi3v_dist.observe.gather import Nodes
from phi3v_dist.observe.tracker import AllOf, JsonlTracker, NoTracker
from phi3v_dist.parallel.topology import Topology

WORLD_SIZE = 4


def run_rank(rank: int, folder: Path, port: int) -> None:
    logging.basicConfig(level=logging.WARNING)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    topology = Topology(rank, WORLD_SIZE, rank // 2, 2, f"host-{rank % 2}")
    nodes = Nodes.meet(topology)
    node = nodes.gather(rank)
    seen = {"node": node, "all": nodes.gather_leaders(node) if nodes.is_leader else None}
    everyone = topology.gather(seen)
    tracker = AllOf(JsonlTracker(folder, 1), []) if topology.is_main else NoTracker()
    tracker.start({})
    if topology.is_main:
        (folder / "gathered.json").write_text(json.dumps(dict(enumerate(everyone))))
    with Collector(nodes, torch.device("cpu"), tracker, folder, 1, 2, Meter(), lambda: 0, None) as collector:
        for number in range(1, 7):
            add(collector, number)
            if number == 2:
                collector._windows.join()
                topology.barrier()
            if number == 4 and rank == 1:
                os._exit(9)
            time.sleep(0.05)
    dist.destroy_process_group()
    (folder / f"left-{rank}").touch()


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    processes = [mp.Process(target=run_rank, args=(rank, Path(sys.argv[1]), port)) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    mp.set_start_method("fork")
    main()
