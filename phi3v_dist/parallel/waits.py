"""DeepSpeed's collectives → how long this rank waited in them.

What comes in: the one object through which DeepSpeed communicates. What goes out: seconds, without which a step's time
is this rank's own (`observe/stragglers.py` compares that).

Surprise: in a job that moves in step every rank's step takes equally long, whoever is slow; only the time *not* waited
differs. On a CPU the calls themselves block, so a clock around them is enough. On an accelerator they only make a
stream wait, so a pair of events is put around each one, and read at the end of the step, when they have long passed.
Waits that computing hides are counted there too, on all ranks alike. That half has not run on a GPU yet.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.watch import heartbeat

COLLECTIVES = (
    "all_gather", "all_gather_base", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "broadcast",
    "broadcast_object_list", "gather", "monitored_barrier", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "scatter",
)  # fmt: skip


class Waits:
    """The clock of one process. It counts nothing until `watch` is called."""

    def __init__(self) -> None:
        self._waited_s = 0.0
        self._pairs: list[tuple[Any, Any]] = []  # events around waits on an accelerator
        self._spare: list[Any] = []
        self._backend: Any = None
        self._on_device = False
        self._num_calls = 0
        self._num_read = 0  # pairs whose events have passed and are used again

    def watch(self, topology: Topology) -> None:
        """Time DeepSpeed's collectives from now on; after the process group is joined. One process waits for nobody.

        Collective, since a barrier shows that the timing works.

        Raises:
            LaunchError: DeepSpeed does not call what is wrapped here, so stragglers would never be seen.
        """
        if topology.world_size == 1 or self._backend is not None:
            return
        import deepspeed.comm.comm

        self._backend, self._on_device = deepspeed.comm.comm.cdb, topology.device.type != "cpu"
        for name in COLLECTIVES:
            if hasattr(self._backend, name):
                setattr(self._backend, name, self._timed(getattr(self._backend, name)))

        num_calls = self._num_calls
        deepspeed.comm.barrier()
        if self._num_calls == num_calls:
            raise LaunchError(
                "DeepSpeed's collectives are not timed: its barrier did not pass through the backend that "
                "parallel/waits.py wraps, so waiting ranks and slow ranks could not be told apart"
            )
        self.take_s()

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
        heartbeat.passed()

    @property
    def blocked_s(self) -> float:
        """Seconds that calls kept this process waiting, since `take_s`; not those of an accelerator's stream."""
        return self._waited_s

    def take_s(self) -> float:
        """Seconds waited since it was last asked, of waits that are over."""
        waited_s, self._waited_s = self._waited_s, 0.0
        pending = []
        for before, after in self._pairs:
            if after.query():
                waited_s += before.elapsed_time(after) / 1000
                self._spare += (before, after)
                self._num_read += 1
            else:
                pending.append((before, after))
        self._pairs = pending
        return waited_s

    def device_waits(self) -> tuple[int, bool]:
        """How many waits of the accelerator have ended, and whether it is in one. From any thread: the main one may be
        blocked by it."""
        num_ended = self._num_read
        for before, after in list(self._pairs):
            if not after.query():
                return num_ended, before.query()
            num_ended += 1
        return num_ended, False

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            result = self.count(call, *args, **kwargs)
            return _TimedWork(result, self) if hasattr(result, "wait") else result

        return timed

    def count(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make a call that waits for other ranks, DeepSpeed's or another; returns what it returns."""
        self._num_calls += 1
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
            result = call(*args, **kwargs)
        finally:
            self._waited_s += time.perf_counter() - began
        heartbeat.passed()
        return result


class _TimedWork:
    """The handle of a collective under way; everything but `wait` is the handle's own."""

    def __init__(self, work: Any, waits: Waits):
        self._work, self._waits = work, waits

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        return self._waits.count(self._work.wait, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


WAITS = Waits()  # like logging, a property of the process
