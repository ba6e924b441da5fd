"""Threads that decode samples, in the order in which they are needed.

What comes in: for each row, one call per sample that decodes it, and one that joins the results. What goes out: the
joined row, or an error that names the sample when a call does not come to an end. Surprise: Python cannot end a thread,
and its own `ThreadPoolExecutor` waits for every thread before the process may exit, for ever if one hangs. These
threads are daemons: they never hold up an exit.
"""

import math
import os
import queue
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from phi3v_dist.errors import DataError
from phi3v_dist.watch import heartbeat

DECODE_LIMIT_S = 600.0  # for one sample; the longest a fetch may take with all its retries is well below
POLL_S = 1.0
CLOSE_S = 5.0  # what is running when the pool is closed may take this long; then it is left behind

Part = TypeVar("Part")
Whole = TypeVar("Whole")


class _Row(Generic[Part, Whole]):
    """Results of one row as they come in; the thread that brings the last one joins them."""

    def __init__(self, num_parts: int, join: Callable[[tuple[Part, ...]], Whole]):
        self.whole: Future[Whole] = Future()
        self._parts: list[Part | None] = [None] * num_parts
        self._missing = num_parts
        self._join = join
        self._lock = threading.Lock()
        if not num_parts:
            self.whole.set_result(join(()))

    def take(self, place: int, work: Callable[[], Part]) -> None:
        try:
            self._parts[place] = work()
            with self._lock:
                self._missing -= 1
                is_last = not self._missing
            if is_last:
                self.whole.set_result(self._join(tuple(self._parts)))  # type: ignore[arg-type]  # none is missing
        except BaseException as error:  # goes to whoever asks for the row
            with self._lock:
                if not self.whole.done():  # else another part was wrong as well
                    self.whole.set_exception(error)


class _Task(NamedTuple):
    sample_id: int
    run: Callable[[], None]


class Meter:
    """How far the decoding is ahead of training, for whoever looks on.

    ahead: rows under way, the next one first; the training thread's own.
    """

    def __init__(self) -> None:
        self.ahead: deque[Future[Any]] = deque()
        self._slowest_s = math.nan

    def queue_depth(self) -> int:
        """Rows that are decoded and wait for training. From the training thread."""
        return sum(row.done() for row in self.ahead)

    def took(self, seconds: float) -> None:
        """A sample has been decoded. Of two threads at one moment the slower may be overlooked."""
        if not seconds <= self._slowest_s:
            self._slowest_s = seconds

    def take_slowest_s(self) -> float:
        """The longest time that a sample took since it was last asked; NaN: there was none."""
        slowest_s, self._slowest_s = self._slowest_s, math.nan
        return slowest_s


class DecodePool:
    """A context: its threads end with it.

    name_of: sample id → `shard:key`, for the error. meter: told how long each sample takes.
    """

    def __init__(self, num_workers: int, name_of: Callable[[int], str], meter: Meter | None = None):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a sample's few texts are not worth more threads
        self._name_of = name_of
        self._meter = meter or Meter()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._running: dict[int, _Task] = {}  # by thread, oldest first
        self._num_done = 0  # about; threads do not wait for each other to count
        started = threading.Barrier(num_workers + 1)
        num_threads = torch.get_num_threads()
        self._threads = [
            threading.Thread(target=self._work, args=(started,), name=f"decode_{i}", daemon=True)
            for i in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()
        started.wait()
        torch.set_num_threads(num_threads)  # the threads set theirs, and with it what threads to come would begin with

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *error: object) -> None:
        while not self._tasks.empty():
            self._tasks.get()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def submit(
        self, works: Sequence[tuple[int, Callable[[], Part]]], join: Callable[[tuple[Part, ...]], Whole]
    ) -> "Future[Whole]":
        """Have the samples of a row decoded, and `join` the results, in the same order; calls begin in the order in
        which they were submitted. works: each sample's id and the call that decodes it."""
        row = _Row(len(works), join)
        for place, (sample_id, work) in enumerate(works):
            self._tasks.put(_Task(sample_id, partial(row.take, place, work)))
        return row.whole

    def result(self, future: "Future[Whole]") -> Whole:
        """What `join` returned, or the error that a call raised.

        Raises:
            DataError: a sample of this row, or of an earlier one, takes longer than DECODE_LIMIT_S.
        """
        polls: Counter[int] = Counter()
        num_done = self._num_done
        while not future.done():
            try:
                future.exception(timeout=POLL_S)  # waits, and unlike `result` raises only when the time is up
            except TimeoutError:
                num_done = self._tell_watcher(num_done)
                self._refuse_stuck(polls)
        return future.result()

    def _tell_watcher(self, num_done: int) -> int:
        """Whether samples still come, and which has been at it for longest; the number that have come."""
        if self._num_done != num_done:
            heartbeat.read_on()
        oldest = next(iter(list(self._running.values())), None)
        if oldest is not None:
            heartbeat.waits_for(self._name_of(oldest.sample_id))
        return self._num_done

    def _refuse_stuck(self, polls: "Counter[int]") -> None:
        """Counts looks, not seconds: a whole job that was suspended for an hour is not stuck."""
        for thread_id, task in list(self._running.items()):
            polls[task.sample_id] += 1
            if polls[task.sample_id] * POLL_S >= DECODE_LIMIT_S:
                raise DataError(
                    f"{self._name_of(task.sample_id)}: this sample has been in {_place(thread_id)} for "
                    f"{DECODE_LIMIT_S:.0f} s. See whether the storage of its shard answers, and start the run again, "
                    "which goes on from the last checkpoint; if it stops here again, take the sample out"
                )

    def _work(self, started: threading.Barrier) -> None:
        # It would start threads of its own for each picture; these are enough, and the model needs the cores.
        torch.get_num_threads()  # the first call in a thread takes over the process's number, so it comes first
        torch.set_num_threads(1)
        started.wait()
        me = threading.get_ident()
        while (task := self._tasks.get()) is not None:
            self._running[me] = task
            began = time.perf_counter()
            task.run()
            self._meter.took(time.perf_counter() - began)
            del self._running[me], task
            self._num_done += 1


def _place(thread_id: int) -> str:
    """The innermost function of ours in which a thread is, with file and line."""
    package = str(Path(__file__).parents[1])
    stack = traceback.extract_stack(sys._current_frames().get(thread_id))
    here = [frame for frame in stack if frame.filename.startswith(package)]
    return f"`{here[-1].name}` ({Path(here[-1].filename).name}, line {here[-1].lineno})" if here else "decoding"
