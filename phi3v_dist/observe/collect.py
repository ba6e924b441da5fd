"""Every rank's steps → windows of plain numbers → one row on rank 0, and a line for each node in `RUN/ranks/`.

What comes in: each finished step (`add`), on every rank. What goes out: registered numbers to rank 0's tracker, a few
steps late, and what each rank measured to `RUN/ranks/HOST.jsonl`. Surprise: nothing of this may hurt the run. Training
only appends to a list; a thread does the rest, in process groups of its own. When that fails, because a rank is gone,
say, one warning says so and there are no more of these rows; training goes on, or ends for reasons of its own.
"""

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from phi3v_dist.data.plan import PlannedStep
from phi3v_dist.data.pool import Meter
from phi3v_dist.observe import columns, machine
from phi3v_dist.observe.gather import Nodes
from phi3v_dist.observe.metrics import STEP, Number
from phi3v_dist.observe.rank_file import RankFile
from phi3v_dist.observe.stragglers import Stragglers
from phi3v_dist.observe.tracker import Tracker
from phi3v_dist.observe.window import Step, Whole, label
from phi3v_dist.train.laps import Lapped
from phi3v_dist.train.step import StepResult

BEHIND_TRAINING = 10  # niceness of the thread: where cores are few, the steps go first
FINISH_S = 10.0  # the last window may take so long at the end of a run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """Some steps in a row, on one rank. age_steps: what a failure at their end would cost."""

    steps: tuple[Step, ...]
    decode_s: float
    probe_tflops: float
    age_steps: int

    @property
    def last(self) -> int:
        return self.steps[-1].result.step


class Collector:
    """A context around the training loop. All ranks make it together, from their main threads, and add every step.

    every_n_steps: windows end at its multiples, and with the loop. folder: of the run. committed: the newest step whose
    checkpoint is safe. whole: on rank 0 alone.
    """

    def __init__(
        self, nodes: Nodes, device: torch.device, tracker: Tracker, folder: Path, attempt: int, every_n_steps: int,
        meter: Meter, committed: Callable[[], int], whole: Whole | None,
    ):  # fmt: skip
        self.nodes, self.device, self.tracker = nodes, device, tracker
        self.every_n_steps, self.meter, self.committed, self.whole = every_n_steps, meter, committed, whole
        self._file = RankFile(folder, nodes.topology.host, nodes.here, attempt)
        self._stragglers = Stragglers(nodes.hosts, [label(host) for host in nodes.hosts])
        self._probe = machine.Probe(device)
        self._steps: list[Step] = []
        self._windows: queue.Queue[Window | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="collect", daemon=True)
        self._open = threading.Lock()
        self._closed = False

    def __enter__(self) -> "Collector":
        self._thread.start()
        return self

    def add(self, plan: PlannedStep, result: StepResult, laps: Lapped) -> None:
        """A step has ended. Some microseconds."""
        self._steps.append(Step(plan, result, laps, self.meter.queue_depth()))
        if result.step % self.every_n_steps == 0:
            self._end_window()

    def __exit__(self, kind: object, *error: object) -> None:
        """After the last step, what is left of a window is collected too; after an error nothing is waited for."""
        if kind is None:
            if self._steps:
                self._end_window()
            self._windows.put(None)
            self._thread.join(FINISH_S)
            if self._thread.is_alive() and self.nodes.topology.is_main:
                log.warning("the last window of steps is left out: not all ranks came with theirs in %.0f s", FINISH_S)
        with self._open:
            self._closed = True

    def _end_window(self) -> None:
        last = self._steps[-1].result.step
        found = self._probe.take()
        window = Window(tuple(self._steps), self.meter.take_slowest_s(), found or math.nan, last - self.committed())
        self._probe.start()
        self._steps = []
        if self._thread.is_alive():  # else it has said why not
            self._windows.put(window)

    def _work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BEHIND_TRAINING)  # of this thread alone, on Linux
        while (window := self._windows.get()) is not None:
            try:
                self._collect(window)
            except Exception as error:  # whatever it is, training does not need it
                ours = self.nodes.topology.is_main or not isinstance(error, RuntimeError)  # else rank 0 says it
                log.log(
                    logging.WARNING if ours and not self._closed else logging.INFO,
                    "numbers of all ranks are not collected any more (%s: %s); training goes on without",
                    *(type(error).__name__, str(error).splitlines()[0] if str(error) else ""),
                )
                return
            finally:
                self._windows.task_done()

    def _collect(self, window: Window) -> None:
        """On all ranks, window by window in the same order."""
        measured = _measured(window) | machine.measured(self.device)
        if len(self.nodes.hosts) == 1:
            measured["comm/wait_s"] = math.nan  # there is nobody to wait for
        mine = columns.line(measured)
        node = self.nodes.gather((window.last, mine, _unix(window.steps[-1].laps)))
        if node is None:
            return
        lasts, lines, spans = zip(*node, strict=True)
        assert len(set(lasts)) == 1, f"windows of ranks {self.nodes.here} end with steps {lasts}"
        table = np.stack(lines)
        self._file.append(window.last, table, spans)
        everyone = self.nodes.gather_leaders((self.nodes.here, table))
        if everyone is not None:
            whole = np.empty((len(self.nodes.hosts), len(columns.COLUMNS)))
            for ranks, part in everyone:
                whole[list(ranks)] = part
            row = self._row(window, whole)
            with self._open:
                if not self._closed:
                    self.tracker.log(row)

    def _row(self, window: Window, table: np.ndarray) -> dict[str, Number]:
        row: dict[str, Number] = {STEP: window.last, "ckpt/age_steps": window.age_steps} | columns.reduce(table)
        data_s, compute_s = (columns.column(table, f"health/{what}_s") for what in ("data", "compute"))
        steps = window.steps[0].result.step, window.last
        row |= self._stragglers.look(steps, data_s, compute_s, row["time/step_s/mean"])
        return row | (self.whole.row(window.steps, row["time/step_s/mean"]) if self.whole else {})


def _measured(window: Window) -> dict[str, Number]:
    """What this rank measured of a window, by the registry's base names."""
    laps, results = [step.laps for step in window.steps], [step.result for step in window.steps]
    losses = [result.own.loss for result in results if math.isfinite(result.own.loss)]
    return {
        "train/rank_loss": fmean(losses) if losses else math.nan,
        "time/step_s": fmean(lapped.step_s for lapped in laps),
        **{f"time/{part}_s": fmean(lapped.seconds[part] for lapped in laps) for part in laps[0].seconds},
        "health/data_s": fmean(result.own.data_s for result in results),
        "health/compute_s": fmean(result.own.compute_s for result in results),
        "health/gemm_probe_tflops": window.probe_tflops,
        "comm/wait_s": fmean(result.own.wait_s for result in results),
        "data/queue_depth": fmean(step.queue_depth for step in window.steps),
        "data/decode_s": window.decode_s,
    }


def _unix(lapped: Lapped) -> list[tuple[str, float, float]]:
    """Laps one after another, of micro-steps too, in unix seconds."""
    since_s = time.time() - time.perf_counter()
    return [(part, round(begin + since_s, 6), round(end + since_s, 6)) for part, begin, end in lapped.spans]
