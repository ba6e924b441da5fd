"""Whether a silent rank makes progress of its own: it computes, or its accelerator does.

Note: processor time alone proves nothing. A rank that waits for others on a GPU burns a whole core while it does so, so
the watcher asks for stacks and for the accelerator's waits as well.
"""

import contextlib
import importlib.util
from collections import deque
from collections.abc import Callable

from phi3v_dist.watch import processes
from phi3v_dist.watch.beat_file import Beats
from phi3v_dist.watch.blame import SAVE, TRAIN

WINDOW_S = 5.0  # progress counts only if it is that recent
EVIDENCE_S = 1.0  # shortest observation from which anything follows
BUSY_SHARE = 0.1  # of a processor; threads that only look at something from time to time take less
CONFIRM_S = 2.0  # a wait that lasts so long is no short one that was just being looked at
AUTOGRAD_THREADS = "pt_autograd"  # in which backward runs on GPUs, while the training thread sleeps
MANY_THREADS = ("start", "load", "data", "read")  # kinds of work in which other threads work for the training thread

Reading = tuple[float, int]  # seconds active, pages read


class Silence:
    """One lane of one rank since its last sign of life."""

    def __init__(self, since_s: float):
        self.since_s = since_s
        self._since_ticks = processes.now_ticks()
        self._last: dict[tuple[int, int], Reading] = {}
        self._active_s, self._page_reads = 0.0, 0
        self._samples: deque[tuple[float, float, int]] = deque()  # time, and the two sums until then
        self._waits_since_s: float | None = None
        self._num_waits = 0

    def observe(self, now_s: float, beats: Beats, lane: str) -> None:
        """Read how much the threads of this lane have done."""
        found = {
            place: (processes.active_s(*place), processes.page_reads(*place)) for place in self._places(beats, lane)
        }
        for place, (active_s, page_reads) in found.items():
            before = self._last.get(place, (active_s, page_reads))
            self._active_s += active_s - before[0]
            self._page_reads += page_reads - before[1]
        self._last = found

        self._samples.append((now_s, self._active_s, self._page_reads))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - WINDOW_S:
            self._samples.popleft()

    def skip(self, seconds: float) -> None:
        """The watcher itself did not run for so long."""
        self.since_s += seconds
        self._samples.clear()

    @property
    def observed_s(self) -> float:
        return self._samples[-1][0] - self._samples[0][0] if self._samples else 0.0

    def computes(self) -> bool:
        """Whether its threads have run lately, were ready to, or have read memory from a disk; also while that is not
        known yet."""
        if self.observed_s < EVIDENCE_S:
            return True
        (_, before_s, pages_before), (_, after_s, pages_after) = self._samples[0], self._samples[-1]
        return (after_s - before_s) / self.observed_s >= BUSY_SHARE or pages_after > pages_before

    def has_waited(self, now_s: float, waits: bool, num_waits: int) -> bool:
        """Whether it has waited for other ranks all the time between two looks. Call it at each look."""
        if not waits or num_waits != self._num_waits:
            self._waits_since_s = None
        self._num_waits = num_waits
        if waits and self._waits_since_s is None:
            self._waits_since_s = now_s
        return self._waits_since_s is not None and now_s - self._waits_since_s >= CONFIRM_S

    def _places(self, beats: Beats, lane: str) -> list[tuple[int, int]]:
        """Process and thread of all that works for this lane."""
        pid, state = beats.pid, beats.lanes[lane]
        if lane == SAVE:
            return [(pid, state.native_thread)]
        threads, writer = processes.threads(pid), beats.lanes[SAVE].native_thread
        many = state.kind in MANY_THREADS
        own = [
            thread
            for thread, name in threads.items()
            if thread == state.native_thread or name.startswith(AUTOGRAD_THREADS) or (many and thread != writer)
        ]
        programs = list(processes.programs_of(pid, self._since_ticks))
        return [(pid, thread) for thread in own] + [
            (program, thread) for program in programs for thread in processes.threads(program)
        ]


def device_busy() -> Callable[[str], bool]:
    """A function: whether the GPU of this UUID has run anything lately. Without NVML it always says no."""
    if importlib.util.find_spec("pynvml") is None:
        return lambda device: False
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return lambda device: False

    def is_busy(device: str) -> bool:
        with contextlib.suppress(pynvml.NVMLError):  # not every driver and GPU tells it
            return bool(device and pynvml.nvmlDeviceGetUtilizationRates(pynvml.nvmlDeviceGetHandleByUUID(device)).gpu)
        return False

    return is_busy


def makes_progress(silence: Silence, now_s: float, beats: Beats, lane: str, waits: bool, device_is_busy: bool) -> bool:
    """Whether a silent lane does work of its own. Call it once at each look.

    waits: for other ranks, as its stack or its accelerator says.
    """
    has_waited = silence.has_waited(now_s, waits, beats.pulse.num_waits)
    return not has_waited and (silence.computes() or (lane == TRAIN and device_is_busy and not waits))
