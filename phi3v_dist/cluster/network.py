"""The nodes that have reported → how fast each pair of neighbours talks, and who did not answer.

What comes in: a folder that all nodes see. What goes out: MB/s to each neighbour on a ring, and notes. Surprise: there
is no first node that all depend on. The first name among those that came opens the meeting; if it falls silent the next
one does. Every wait is bounded, and neighbours meet in groups of two, so that one's silence costs only them their time.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from phi3v_dist.cluster.checking import Notes
from phi3v_dist.errors import LaunchError
from phi3v_dist.survive.durable import no_links
from phi3v_dist.watch import faults

AGAIN = "~"  # after the name of a start: its second meeting
PREFIX = ".meeting-"  # of a start's folder; empty files in it say who came
ADDRESS_NAME = "address.json"
CONNECT_S = 3.0
GPU_BYTES, CPU_BYTES = 256 << 20, 8 << 20  # of one message
TIMES = 3
Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """Longest waits, in seconds.

    come: for nodes that have not reported. turn: for the node whose turn it is to open the meeting.
    join: for nodes at the meeting. edge: for one neighbour. reduce: for the sum over all. whole: for all of it after
    the nodes have come.
    """

    come: float = 20.0
    turn: float = 5.0
    join: float = 8.0
    edge: float = 8.0
    reduce: float = 10.0
    whole: float = 60.0


@dataclass
class Talk:
    """What came of the probe, so far. edges: MB/s by neighbour, 0 where it failed; at: what it is waiting for.

    first: the node that opened the meeting, where it is another one. total: what came of the sum over all.
    """

    edges: dict[str, float] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)
    at: str = "waiting for the other nodes"
    first: str = ""
    total: Notes = field(default_factory=Notes)

    def broke_off(self, why: str) -> None:
        """Whose fault that is, only a look at all reports can tell: the first node's, if it gave no second one."""
        if self.first:
            self.edges[self.first] = 0.0
            self.notes.warn(f"the network probe broke off, {self.at}; {self.first} held it: {why}")
        else:
            self.notes.problem(f"the network probe broke off, {self.at}: {why}")


def announce(folder: Path, token: str, host: str) -> Path:
    """Say that this node is there. Returns the folder of this start's meeting. Raises OSError."""
    meeting = folder / f"{PREFIX}{token}"
    meeting.mkdir(parents=True, exist_ok=True)
    (meeting / host).touch()
    return meeting


def take_part(folder: Path, token: str, host: str, num_nodes: int, patience: Patience, result: Talk) -> None:
    """The whole probe. Where the first node of a meeting turns out to be out of reach, the others hold one without it.

    Raises whatever a broken network, driver or file server makes of a second meeting.
    """
    try:
        talk(announce(folder, token, host), token, host, num_nodes, patience, result)
    except (LaunchError, RuntimeError, OSError) as error:  # torch's own are RuntimeErrors
        result.broke_off(first_words(error))
        if not result.first or len(result.edges) > 1 or num_nodes == 2:
            return
        again = f"{token}{AGAIN}"
        result.first, result.at = "", "waiting for the other nodes"
        brief = replace(patience, come=2 * patience.turn)
        talk(announce(folder, again, host), again, host, num_nodes - 1, brief, result)


def talk(meeting: Path, token: str, host: str, num_nodes: int, patience: Patience, result: Talk) -> None:
    """Take part in the probe of a start; fills `result` as it goes.

    Raises:
        LaunchError: there was no meeting that could be reached.
    """
    opened = _meet(meeting, token, host, num_nodes, patience)
    _forget_older(meeting, token)
    faults.fire("network", 0)
    store, members = within(2 * patience.join, lambda: _begin(meeting, token, host, opened, patience, result))
    if host not in members:
        result.notes.problem(f"came too late for the network probe: {len(members)} nodes had begun without it")
        return
    began_s = time.monotonic()
    rounds = ring(members)
    for number, pairs in enumerate(rounds, start=1):
        faults.fire("network", number)
        for pair in (pair for pair in pairs if host in pair):
            _edge(store, pair, host, began_s + number * patience.edge, result)
    store.set(f"ready/{host}", "")
    result.at = "waiting for the nodes that are left"
    left_s = began_s + len(rounds) * patience.edge - time.monotonic()
    left = _members(store, "left", "ready", members if opened else None, max(left_s, 0) + 1)
    if host in left and len(left) > 1:
        _sum_over_all(store, left, host, patience.reduce, result)
    store.set(f"done/{host}", "")
    if opened is not None:
        _wait_for(lambda: all(opened.check([f"done/{other}"]) for other in left), patience.reduce)


def _begin(
    meeting: Path, token: str, host: str, opened: dist.TCPStore | None, patience: Patience, result: Talk
) -> tuple[dist.TCPStore, list[str]]:
    """The store, and the nodes that take part."""
    result.at = "joining the other nodes"
    store = opened or _join(meeting, token, patience, result)
    store.set(f"here/{host}", "")
    come = _come(meeting) if opened else None
    return store, _members(store, "members", "here", come, patience.join)


def within(limit_s: float, work: Callable[[], Result]) -> Result:
    """What a thread comes to. A store whose node is frozen, and NCCL, may never answer: then nobody waits for it more.

    Raises TimeoutError, and what `work` raises.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # for the thread that waits
            future.set_exception(error)

    threading.Thread(target=run, name="network", daemon=True).start()
    try:
        return future.result(limit_s)
    except FutureTimeout as error:
        if future.done():
            raise
        raise TimeoutError(f"no answer within {limit_s:.0f} s") from error


def ring(hosts: list[str]) -> list[list[tuple[str, str]]]:
    """Neighbours on a ring, in rounds in which no node is in two pairs."""
    pairs = list(zip(hosts, hosts[1:], strict=False))
    rounds = [pairs[0::2], pairs[1::2]]
    if len(hosts) > 2:
        rounds.append([(hosts[-1], hosts[0])])
    return [pairs for pairs in rounds if pairs]


def _meet(meeting: Path, token: str, host: str, num_nodes: int, patience: Patience) -> dist.TCPStore | None:
    """Wait until all have come, or as long as is allowed. Returns the store if it fell to this node to open it.

    Raises LaunchError when nobody opens one.
    """
    began_s = time.monotonic()
    since_s, pause_s = None, 0.05
    while True:
        os.utime(meeting)  # a network file system then looks again, instead of showing what it remembers
        if (meeting / ADDRESS_NAME).exists():
            return None
        come = _come(meeting)
        now_s = time.monotonic()
        if since_s is None and (len(come) >= num_nodes or now_s - began_s > patience.come):
            since_s = now_s
        if since_s is not None:
            if now_s - since_s >= come.index(host) * patience.turn:
                return _open(meeting, token, host)
            if now_s - since_s > patience.whole / 2:
                raise LaunchError(f"none of {', '.join(come[:3])} opened the meeting for the network probe")
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.3, 1.0)


def _come(meeting: Path) -> list[str]:
    return sorted(name for name in os.listdir(meeting) if not name.startswith(".") and name != ADDRESS_NAME)


def _open(meeting: Path, token: str, host: str) -> dist.TCPStore | None:
    """The store at which all meet; None when another node has just opened one."""
    store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
    store.set("token", token)
    addresses = [host, *_addresses(), "127.0.0.1"]
    draft = meeting / f".{host}.{os.getpid()}"
    draft.write_text(json.dumps({"port": store.port, "addresses": addresses}))
    try:
        os.link(draft, meeting / ADDRESS_NAME)
    except FileExistsError:
        return None
    finally:
        draft.unlink()
    return store


def _addresses() -> list[str]:
    """IPv4 addresses of this machine that others may reach."""
    families = psutil.net_if_addrs().values()
    found = [each.address for interface in families for each in interface if each.family == socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]


def _join(meeting: Path, token: str, patience: Patience, result: Talk) -> dist.TCPStore:
    """The store that another node opened. Raises LaunchError."""
    with open(meeting / ADDRESS_NAME, opener=no_links) as file:
        said = json.load(file)
    result.first = said["addresses"][0]
    tried = []
    for address in dict.fromkeys(said["addresses"]):
        try:
            socket.create_connection((address, said["port"]), CONNECT_S).close()
            store = dist.TCPStore(address, said["port"], timeout=timedelta(seconds=patience.join))
            if store.check(["token"]) and store.get("token").decode() == token:
                return store
            tried.append(f"{address} (another job's)")
        except (OSError, dist.DistError) as error:
            tried.append(f"{address} ({getattr(error, 'strerror', None) or type(error).__name__})")
    raise LaunchError(
        f"port {said['port']} of {result.first} cannot be reached: {', '.join(tried)}; is the node up, and does a "
        "firewall let the ports of jobs through?"
    )


def _members(store: dist.TCPStore, key: str, sign: str, come: list[str] | None, wait_s: float) -> list[str]:
    """Names of the nodes that gave a sign in time. come: of whom one is expected; only the first node, which decides
    so that all know the same ones, gives it."""
    if come is not None:
        _wait_for(lambda: all(store.check([f"{sign}/{name}"]) for name in come), wait_s)
        store.set(key, json.dumps([name for name in come if store.check([f"{sign}/{name}"])]))
    store.wait([key], timedelta(seconds=wait_s + 5))
    names: list[str] = json.loads(store.get(key))
    return names


def _edge(store: dist.TCPStore, pair: tuple[str, str], host: str, until_s: float, result: Talk) -> None:
    """One pair of neighbours sends a known vector to and fro."""
    (other,) = set(pair) - {host}
    result.at, result.edges[other] = f"waiting for {other}", 0.0
    name = "/".join(("edge", *pair))
    store.set(f"{name}/{host}", "")
    left_s = max(until_s - time.monotonic(), 0.1)
    try:
        store.wait([f"{name}/{other}"], timedelta(seconds=left_s))
        left_s = max(until_s - time.monotonic(), 1.0)
        result.edges[other] = round(_reduce(store, name, list(pair), host, left_s), 1)
    except (RuntimeError, OSError) as error:  # torch's own are RuntimeErrors
        result.notes.warn(f"{other} did not answer on the ring: {first_words(error)}")
    except _WrongSum as error:
        result.notes.problem(str(error))


def _sum_over_all(store: dist.TCPStore, hosts: list[str], host: str, limit_s: float, result: Talk) -> None:
    result.at = f"waiting for a sum over {len(hosts)} nodes"
    try:
        _reduce(store, "all", hosts, host, limit_s)
        result.total.detail = f"a sum over {len(hosts)} nodes is right"
    except (RuntimeError, OSError) as error:
        result.total.problem(f"a sum over {len(hosts)} nodes broke off: {first_words(error)}")
    except _WrongSum as error:
        result.total.problem(str(error))


class _WrongSum(Exception):
    """What was summed arrived as something else."""


def _reduce(store: dist.TCPStore, name: str, hosts: list[str], host: str, limit_s: float) -> float:
    """MB/s of an all-reduce among hosts.

    Raises:
        RuntimeError: it did not end in time.
        _WrongSum: it gave other numbers than it had to.
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
        for _ in range(TIMES):
            vector = ours * (rank + 1)
            _synchronize(device)
            began_s = time.perf_counter()
            work = dist.all_reduce(vector, async_op=True)
            assert work is not None
            work.wait(limit)
            _synchronize(device)
            seconds.append(time.perf_counter() - began_s)
            if not torch.equal(vector, expected):
                raise _WrongSum(f"a sum over {', '.join(hosts[:4])} came out wrong: a link or a network card is broken")
    finally:
        dist.destroy_process_group()
    moved = 2 * (size - 1) / size * num_bytes  # what each sends and receives in the least (NCCL tests' bus bandwidth)
    return moved / min(seconds) / 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wait_for(condition: Callable[[], bool], limit_s: float) -> bool:
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True


def _forget_older(meeting: Path, token: str) -> None:
    """Meetings of earlier starts."""
    start = token.removesuffix(AGAIN)
    for folder in meeting.parent.glob(f"{PREFIX}*"):
        if folder.name.removesuffix(AGAIN) != f"{PREFIX}{start}":
            shutil.rmtree(folder, ignore_errors=True)


def first_words(error: Exception) -> str:
    """The first line that says something, of an error that may hold a stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
