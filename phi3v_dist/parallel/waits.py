"""DeepSpeed's collectives → how long this rank waited in them, and which rank all the others wait for.

What comes in: the one object through which DeepSpeed communicates. What goes out: each step's own time (wall time
without the waits), and every N steps a warning that names a rank much slower than the others.

Surprise: in a job that moves in step every rank's step takes equally long, whoever is slow; only the time *not* waited
differs. On a CPU the calls themselves block, so a clock around them is enough. On an accelerator they only make a
stream wait, so a pair of events is put around each one, and read at the end of the step, when they have long passed.
Waits that computing hides are counted there too, on all ranks alike. That half has not run on a GPU yet.
"""

import functools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from phi3v_dist.parallel.topology import Topology

COLLECTIVES = (
    "all_gather", "all_gather_base", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "broadcast",
    "broadcast_object_list", "gather", "monitored_barrier", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "scatter",
)  # fmt: skip
SLOWER, SLOWER_S = 1.5, 0.05  # times the median rank's own time, and at least this much above it
SHARE_OF_STEP = (
    0.1  # the excess must also be this much of a step: a job that only communicates has no own time to compare
)

log = logging.getLogger(__name__)


class Waits:
    """The clock of one process. It counts nothing until `watch` is called."""

    def __init__(self) -> None:
        self._waited_s = 0.0
        self._pairs: list[tuple[Any, Any]] = []  # events around waits on an accelerator
        self._spare: list[Any] = []
        self._backend: Any = None
        self._on_device = False

    def watch(self, topology: Topology) -> None:
        """Time DeepSpeed's collectives from now on; after the process group is joined. One process waits for nobody."""
        if topology.world_size == 1 or self._backend is not None:
            return
        import deepspeed.comm.comm

        self._backend, self._on_device = deepspeed.comm.comm.cdb, topology.device.type != "cpu"
        for name in COLLECTIVES:
            if hasattr(self._backend, name):
                setattr(self._backend, name, self._timed(getattr(self._backend, name)))

    def stop(self) -> None:
        """Leave the backend as it was."""
        for name in COLLECTIVES:
            vars(self._backend or self).pop(name, None)
        self._backend = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For a collective that does not go through DeepSpeed. On an accelerator, after the queue has been emptied."""
        began = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - began

    def take_s(self) -> float:
        """Seconds waited since it was last asked, of waits that are over."""
        waited_s, self._waited_s = self._waited_s, 0.0
        pending = []
        for before, after in self._pairs:
            if after.query():
                waited_s += before.elapsed_time(after) / 1000
                self._spare += (before, after)
            else:
                pending.append((before, after))
        self._pairs = pending
        return waited_s

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            result = self.count(call, *args, **kwargs)
            return _TimedWork(result, self) if hasattr(result, "wait") else result

        return timed

    def count(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make a call that waits for other ranks, DeepSpeed's or another; returns what it returns."""
        if self._on_device:
            before = self._spare.pop() if self._spare else torch.Event(enable_timing=True)
            after = self._spare.pop() if self._spare else torch.Event(enable_timing=True)
            before.record()
            result = call(*args, **kwargs)
            after.record()
            self._pairs.append((before, after))
            return result
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self._waited_s += time.perf_counter() - began


class _TimedWork:
    """The handle of a collective under way; everything but `wait` is the handle's own."""

    def __init__(self, work: Any, waits: Waits):
        self._work, self._waits = work, waits

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        return self._waits.count(self._work.wait, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


WAITS = Waits()  # like logging, a property of the process


class Stragglers:
    """Finds the rank that the others wait for. Collective every `every_n_steps` steps; with one rank there is none."""

    def __init__(self, topology: Topology, every_n_steps: int):
        self.topology, self.every_n_steps = topology, every_n_steps
        self._own_s: list[float] = []
        self._step_s: list[float] = []
        self._named: set[int] = set()

    def look(self, step: int, own_s: float, step_s: float) -> dict[str, float]:
        """A step's time without waits, and in all, both of this rank; returns what is to be logged, if anything.

        A rank is named once for each stretch of intervals in which it is slow.
        """
        self._own_s.append(own_s)
        self._step_s.append(step_s)
        if self.topology.world_size == 1 or len(self._own_s) < self.every_n_steps:
            return {}
        mine = (self.topology.host, statistics.median(self._own_s), statistics.median(self._step_s))
        everyone = self.topology.gather(mine)
        self._own_s, self._step_s = [], []
        typical_s = statistics.median_low(own_s for _, own_s, _ in everyone)  # of two ranks: the faster one
        step_s = statistics.median(step_s for _, _, step_s in everyone)
        allowed_s = max(SLOWER * typical_s, typical_s + max(SLOWER_S, SHARE_OF_STEP * step_s))
        slow = {rank for rank, (_, own_s, _) in enumerate(everyone) if own_s > allowed_s}
        if self.topology.is_main:
            for rank in sorted(slow - self._named):
                host, slow_s, _ = everyone[rank]
                log.warning(
                    "rank %d on %s is slow: of a step (%.2f s) it works %.2f s, the median rank %.2f s, and the others "
                    "wait for it (steps %d to %d). Look at that node: other programs, heat, a weak link, a slow disk",
                    *(rank, host, step_s, slow_s, typical_s, step - self.every_n_steps + 1, step),
                )
        self._named = slow
        slowest_s = max(own_s for _, own_s, _ in everyone)
        return {"health/straggler_ratio": slowest_s / max(typical_s, 1e-9)}
