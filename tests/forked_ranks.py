"""Runs trials named `RANKS:…` in as many processes as each name says, forked from one that has imported everything.

Note: scripts that use this put the folder above their own on `sys.path`, because they are started as files.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch.multiprocessing as mp

from phi3v_dist.parallel.topology import Topology


def num_ranks(trial: str) -> int:
    return int(trial.partition(":")[0])


def fork_ranks(run_rank: Callable[..., None], trials: Sequence[str], *arguments: object) -> None:
    """Call `run_rank(rank, world_size, port, trials, *arguments)` in the ranks of each world size; neighbours of one
    world size share their processes. Raises what a rank raised."""
    for world_size, mine in groupby(trials, num_ranks):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        given = (world_size, port, list(mine), *arguments)
        mp.start_processes(run_rank, given, nprocs=world_size, start_method="fork")


@contextmanager
def joined(
    rank: int, world_size: int, port: int, timeout_s: float, ranks_per_node: int | None = None
) -> Iterator[Topology]:
    """This process as one of the ranks, for the length of a `with`."""
    logging.basicConfig(level=logging.ERROR)
    local = min(world_size, ranks_per_node or world_size)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank % local), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(local),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    topology = Topology.from_environment()
    topology.start(timeout_s)
    yield topology
    topology.stop()
