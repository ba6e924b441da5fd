"""A stopwatch → where the time of a step went, without a gap: data, forward, backward, optimizer, checkpoint, logging.

What comes in: `end(part)` at the end of each stretch of work. What goes out: `Lapped`, from one step's end to the next.
Surprise: a lap has no beginning of its own. It begins where the one before it ended, so that the parts add up to the
whole whatever code is between two calls, and a part that nobody names goes to the next one that somebody does.

On a GPU the host only queues work, and its clock would say that everything happens in the optimizer, which waits. So an
event goes into the queue at each border, and once the step has waited for the GPU, borders move to when it passed them.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

PARTS = ("data", "fwd", "bwd", "opt", "ckpt", "log")
OF_STEP = PARTS[:4]  # the rest lies between two steps

Span = tuple[str, float, float]  # part, beginning, end


@dataclass(frozen=True)
class Lapped:
    """seconds: by part, every part. step_s: in all, without what was skipped. spans: in order, `time.perf_counter`."""

    seconds: dict[str, float]
    step_s: float
    spans: tuple[Span, ...]


class Laps:
    """device: where work is queued; a CPU does it at once."""

    def __init__(self, device: torch.device | None = None):
        self._queues = device is not None and device.type == "cuda"
        self._taken = self._since = time.perf_counter()
        self._skipped_s = 0.0
        self._spans: list[Span] = []
        self._events: list[Any] = []  # at the end of each span; None where nothing is queued

    def end(self, part: str, queued: bool = False) -> None:
        """What has happened since the last lap was `part`. queued: work of it may still be under way on the GPU."""
        assert part in PARTS, part
        now = time.perf_counter()
        self._spans.append((part, self._since, now))
        self._since = now
        event = None
        if queued and self._queues:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._events.append(event)

    def skip(self) -> None:
        """What has happened since the last lap is no part of any step."""
        now = time.perf_counter()
        self._skipped_s += now - self._since
        self._since = now

    def settle(self) -> None:
        """Move borders to when the GPU passed them; once it has been waited for."""
        passed = [place for place, event in enumerate(self._events) if event is not None and event.query()]
        if len(passed) < 2:
            return
        first = passed[0]
        anchor_s = self._spans[first][2]  # nothing was queued before it, so it passed at once
        ends = [end for _, _, end in self._spans]
        for place in passed:
            since_s = self._events[first].elapsed_time(self._events[place]) / 1000
            ends[place] = min(anchor_s + since_s, self._since)
        for place in range(first + 1, len(ends)):
            part, begin_s = self._spans[place][0], self._spans[place - 1][2]
            self._spans[place] = part, begin_s, max(begin_s, ends[place])
        self._events = [None] * len(self._spans)

    def seconds(self) -> dict[str, float]:
        """By part, since it was last taken."""
        found = dict.fromkeys(PARTS, 0.0)
        for part, begin, end in self._spans:
            found[part] += end - begin
        return found

    def take(self) -> Lapped:
        """A step has ended."""
        step_s = self._since - self._taken - self._skipped_s
        lapped = Lapped(self.seconds(), step_s, tuple(self._spans))
        self._taken, self._skipped_s, self._spans, self._events = self._since, 0.0, [], []
        return lapped
