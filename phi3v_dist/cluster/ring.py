"""Nodes that have met → how fast neighbours on a ring talk, and whether a sum over all is right.

What comes in: the store, the nodes. What goes out: MB/s to each neighbour, and notes. Surprise: neighbours meet in
groups of two, and the first sum of each group is not timed: it starts NCCL, which takes seconds where a sum takes ms.
"""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from phi3v_dist.cluster.talk import Talk, first_words

GPU_BYTES, CPU_BYTES = 256 << 20, 8 << 20  # of one message
TIMES = 3


class WrongSum(Exception):
    """What was summed arrived as something else."""


def ring(hosts: list[str]) -> list[list[tuple[str, str]]]:
    """Neighbours on a ring, in rounds in which no node is in two pairs."""
    pairs = list(zip(hosts, hosts[1:], strict=False))
    rounds = [pairs[0::2], pairs[1::2]]
    if len(hosts) > 2:
        rounds.append([(hosts[-1], hosts[0])])
    return [pairs for pairs in rounds if pairs]


def edge(store: dist.TCPStore, pair: tuple[str, str], host: str, until_s: float, result: Talk) -> None:
    """One pair of neighbours sends a known vector to and fro."""
    (other,) = set(pair) - {host}
    result.at, result.edges[other] = f"waiting for {other}", 0.0
    name = "/".join(("edge", *pair))
    store.set(f"{name}/{host}", "")
    left_s = max(until_s - time.monotonic(), 0.1)
    try:
        store.wait([f"{name}/{other}"], timedelta(seconds=left_s))
        left_s = max(until_s - time.monotonic(), 1.0)
        result.edges[other] = round(reduce(store, name, list(pair), host, left_s), 1)
    except (RuntimeError, OSError) as error:  # torch's own are RuntimeErrors
        result.notes.warn(f"{other} did not answer on the ring: {first_words(error)}")
        if time.monotonic() >= until_s - 0.1:
            result.timed_out.append(other)
    except WrongSum as error:
        result.notes.problem(str(error))


def sum_over_all(store: dist.TCPStore, hosts: list[str], host: str, limit_s: float, result: Talk) -> None:
    """One that breaks off is no problem of its own: broken links have shown already, and large jobs start slowly."""
    result.at = f"waiting for a sum over {len(hosts)} nodes"
    try:
        reduce(store, "all", hosts, host, limit_s)
        result.total.detail = f"a sum over {len(hosts)} nodes is right"
    except (RuntimeError, OSError) as error:
        why = first_words(error)
        result.total.warn(f"a sum over {len(hosts)} nodes could not be tried in {limit_s:.0f} s: {why}")
    except WrongSum as error:
        result.total.problem(str(error))


def reduce(store: dist.TCPStore, name: str, hosts: list[str], host: str, limit_s: float) -> float:
    """MB/s of an all-reduce among hosts.

    Raises:
        RuntimeError: it did not end in time.
        WrongSum: it gave other numbers than it had to.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    num_bytes = GPU_BYTES if on_gpu else CPU_BYTES
    rank, size = hosts.index(host), len(hosts)
    ours = torch.arange(num_bytes // 4, device=device, dtype=torch.int32) % 1009  # small, so that sums do not overflow
    expected = ours * (size * (size + 1) // 2)
    limit = timedelta(seconds=limit_s)
    if on_gpu:
        torch.cuda.set_device(device)  # of this thread
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=dist.PrefixStore(f"group/{name}", store), rank=rank, world_size=size,
        timeout=limit,
    )  # fmt: skip
    try:
        seconds = []
        for _ in range(1 + TIMES):
            vector = ours * (rank + 1)
            _synchronize(device)
            began_s = time.perf_counter()
            work = dist.all_reduce(vector, async_op=True)
            assert work is not None
            work.wait(limit)
            _synchronize(device)
            seconds.append(time.perf_counter() - began_s)
            if not torch.equal(vector, expected):
                raise WrongSum(f"a sum over {', '.join(hosts[:4])} came out wrong: a link or a network card is broken")
    finally:
        dist.destroy_process_group()
    moved = 2 * (size - 1) / size * num_bytes  # what each sends and receives in the least (NCCL tests' bus bandwidth)
    return moved / min(seconds[1:]) / 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
