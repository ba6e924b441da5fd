"""How long a node waits in the network probe, and what it has found so far.

What comes in: the time that is left, and how many nodes there are. What goes out: `Patience`, `Talk`. Surprise: all
waits together end within the time of the whole preflight, so a slow network costs the job its probe and never a node.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import TypeVar

from phi3v_dist.cluster.checking import Notes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """Longest waits, in seconds.

    pause: for one more node, since the last one came. come: for all that have not come. turn: for the node whose turn
    it is to open the meeting. join: for nodes at the meeting. edge: for one neighbour. reduce: for the sum over all.
    whole: for all of it after the nodes have come.
    """

    pause: float
    come: float
    turn: float
    join: float
    edge: float
    reduce: float
    whole: float

    @classmethod
    def of(cls, num_nodes: int, on_gpus: bool, pause: float, come: float, whole: float) -> "Patience":
        """More for more nodes and for NCCL, which starts slowly, as far as `whole` has room for all waits in turn."""
        start = 20.0 if on_gpus else 5.0  # of NCCL or gloo, for the first time
        join, edge, reduce = 8 + num_nodes / 20, start + 5 + num_nodes / 50, start + 5 + num_nodes / 10
        share = min(1.0, 0.95 * whole / (2 * join + 3 * edge + 2 * reduce))
        return cls(pause, come, min(5.0, whole / 10), share * join, share * edge, share * reduce, whole)


@dataclass
class Talk:
    """What came of the probe, so far. edges: MB/s by neighbour, 0 where it failed; at: what it is waiting for.

    timed_out: neighbours with whom it did not end in time. first: the node that opened the meeting, where it is another
    one. total: what came of the sum over all.
    """

    edges: dict[str, float] = field(default_factory=dict)
    timed_out: list[str] = field(default_factory=list)
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


def wait_for(condition: Callable[[], bool], limit_s: float) -> bool:
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True


def first_words(error: Exception) -> str:
    """The first line that says something, of an error that may hold a stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
