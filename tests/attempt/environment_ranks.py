"""One rank of test_environment.py: plain gloo, then what environment.py asks of all ranks; prints what came of it.

environment_ranks.py RUN_FOLDER STEPS CLOCK_OFFSET_S
"""

import json
import logging
import os
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist

from phi3v_dist.attempt import environment
from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.topology import Topology

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if world_size > 1:
    dist.init_process_group("gloo")
host = socket.gethostname() if world_size == 1 else f"node{rank // 2}"
topology = Topology(rank, world_size, rank % 2, 2, host)
resolved = {"train": {"steps": int(sys.argv[2])}, "data": {"cache": {"path": f"/scratch/{rank}"}}}
said: list[str] = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
logging.getLogger().addHandler(handler)
errors = []
for ask in (
    lambda: environment.require_alike(topology, resolved),
    lambda: environment.require_writable(Path(sys.argv[1]), topology),
):
    try:
        ask()
    except LaunchError as error:
        errors.append(error.report())
spread = environment.warn_of_clocks(topology, lambda: time.time() + float(sys.argv[3]))
print(json.dumps({"errors": errors, "said": said, "spread": spread}))
