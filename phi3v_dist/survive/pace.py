"""A writer that may be in the way of training → one that keeps to a rate, until somebody waits for it.

Surprise: time lost is not caught up. A disk that stood still for a second would otherwise be followed by a second of
writing at full speed, which is what slows the steps.
"""

import threading
import time


class Pace:
    """bytes_per_s: on average over a block or more; None: no limit."""

    def __init__(self, bytes_per_s: float | None):
        self._bytes_per_s = bytes_per_s
        self._hurry = threading.Event()
        self._due = 0.0

    def spend(self, num_bytes: int) -> None:
        """Wait until this many more bytes are due."""
        if self._bytes_per_s is None:
            return
        now = time.monotonic()
        self._due = max(self._due, now) + num_bytes / self._bytes_per_s
        self._hurry.wait(self._due - now)

    def hurry(self, yes: bool = True) -> None:
        """Somebody waits now, so there is nothing to be spared; False: nobody does."""
        if yes:
            self._hurry.set()
        else:
            self._hurry.clear()
