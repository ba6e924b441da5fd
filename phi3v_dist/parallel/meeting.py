"""Processes that know their ranks → a store that all of them have come to, or the names of those that have not.

What comes in: who we are, and where rank 0 is. What goes out: the store through which the process group is made.
Surprise: the ranks may wait for hours for rank 0, which looks at all data first and builds indexes; but once it is
there, everybody else has the time of one collective, and the log says who is missing.
"""

import logging
import os
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from phi3v_dist.errors import LaunchError, LostRankError
from phi3v_dist.parallel import slurm_step
from phi3v_dist.parallel.variables import number

RANK_0_LOOKS_S = 6 * 3600  # at most, before the ranks meet; later waits have `parallel.timeout_s`
FIRST_WORD_S, NEXT_WORD_S = 60.0, 300.0  # of rank 0, about ranks that have not come
POLL_S = 0.1  # rank 0 asks for one number, however many ranks there are
MARGIN_S = 30.0  # that the others wait longer than rank 0, which can say who is missing
LOOKED, ARRIVED, COMPLETE = "rank 0 has looked", "arrived", "all are here"
NAMED = 8  # ranks and hosts in a message

log = logging.getLogger(__name__)


def meet(rank: int, world_size: int, host: str, timeout_s: float, env: Mapping[str, str] = os.environ) -> dist.Store:
    """Wait for all ranks. From now on the store waits for nothing longer than `timeout_s`.

    Raises:
        LaunchError: on rank 0: some have not come in `timeout_s`.
        LostRankError: on the others: rank 0 has gone, or gave up.
        torch.distributed.DistNetworkError: on rank 0: its port is taken.
    """
    looks = timedelta(seconds=max(timeout_s, RANK_0_LOOKS_S))
    of_launcher = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun then has one that outlives the ranks
    main = rank == 0
    try:
        tcp = dist.TCPStore(
            env["MASTER_ADDR"], number(env, "MASTER_PORT"), world_size, is_master=main and not of_launcher,
            timeout=looks, wait_for_workers=False,
        )  # fmt: skip
        store = dist.PrefixStore(f"start {env.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
        if main:
            store.set(LOOKED, "")
        store.set(f"{ARRIVED}/{rank}", host)
        store.add(ARRIVED, 1)
        if main:
            _wait_for_all(store, world_size, timeout_s, slurm_step.hosts(env))
            store.set(COMPLETE, "")
        else:
            store.wait([LOOKED], looks)
            store.wait([COMPLETE], timedelta(seconds=timeout_s + MARGIN_S))
    except dist.DistError as error:
        if main:
            raise
        raise LostRankError(
            f"rank {rank} on {host} was to meet the others at port {env['MASTER_PORT']} of {env['MASTER_ADDR']}, but "
            f"rank 0 is not there or gave up: see its own message ({str(error).splitlines()[0]})"
        ) from error
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _wait_for_all(store: dist.Store, world_size: int, timeout_s: float, hosts: list[str]) -> None:
    began_s = time.monotonic()
    said_s = began_s - NEXT_WORD_S + FIRST_WORD_S
    while store.add(ARRIVED, 0) < world_size:
        time.sleep(POLL_S)
        now_s = time.monotonic()
        if now_s - began_s >= timeout_s:
            raise LaunchError(
                f"{_missing(store, world_size, hosts)} in {timeout_s:.0f} s: look at the log of those ranks, and "
                "whether their nodes are up and can reach this one"
            )
        if now_s - said_s >= NEXT_WORD_S:
            said_s = now_s
            log.warning("%s yet, after %.0f s", _missing(store, world_size, hosts), now_s - began_s)


def _missing(store: dist.Store, world_size: int, hosts: list[str]) -> str:
    """Who has not come. hosts: where ranks were started, empty when that is not known."""
    here = [rank for rank in range(world_size) if store.check([f"{ARRIVED}/{rank}"])]
    absent = [str(rank) for rank in sorted(set(range(world_size)) - set(here))]
    seen = {store.get(f"{ARRIVED}/{rank}").decode() for rank in here}
    silent = [host for host in hosts if host not in seen]
    nobody = f"; nobody from {_few(silent)}" if silent else ""
    return f"{len(absent)} of {world_size} ranks have not come ({_few(absent)}{nobody})"


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")
