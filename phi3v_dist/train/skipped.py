"""Results of steps → a warning for each step that made no update, and an end when that does not stop.

Surprise: a step without a label token counts for nothing here but a line in the log: its numbers are in order, so it
neither begins nor ends a stretch of bad steps. The length of a stretch is not saved: a run started again counts anew.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from phi3v_dist.data.outcomes import listed
from phi3v_dist.errors import DivergedError
from phi3v_dist.train.step import StepResult

log = logging.getLogger(__name__)


class SkippedSteps:
    """The steps in a row whose loss or gradient was not finite. Every rank has one, and all of them decide alike.

    limit: of such steps in a row (`watch.bad_steps`).
    sample_name: id → `shard:key`. last_checkpoint: the newest good one, asked for at the end alone; collective.
    """

    def __init__(
        self, limit: int, sample_name: Callable[[int], str], last_checkpoint: Callable[[], Path | None],
        is_main: bool = True,
    ):  # fmt: skip
        self.limit, self.sample_name, self.last_checkpoint, self.is_main = limit, sample_name, last_checkpoint, is_main
        self._stretch: list[StepResult] = []

    def look(self, result: StepResult) -> None:
        """Raises DivergedError, on all ranks alike, at the last of `limit` bad steps in a row."""
        if result.skipped and self.is_main:
            log.warning("%s", self._line(result))
        if result.skipped is None:
            self._stretch.clear()
        if not result.not_finite_on:
            return
        self._stretch.append(result)
        if len(self._stretch) == self.limit:
            raise DivergedError(self._report())

    def _line(self, result: StepResult) -> str:
        where = f"; it began on {', '.join(result.not_finite_on)}" if result.not_finite_on else ""
        return (
            f"step {result.step} is skipped on all ranks, weights and moments stay as they were: {result.skipped}"
            f"{where}. Its samples: {listed(result.sample_ids, self.sample_name)}"
        )

    def _report(self) -> list[str]:
        path = self.last_checkpoint()
        first, last = self._stretch[0].step, self._stretch[-1].step
        head = (
            f"{len(self._stretch)} steps in a row, {first} to {last}, had a loss or gradient that is not finite, and "
            f"were skipped (`watch.bad_steps` {self.limit}). The last good checkpoint: {path or 'there is none'}. Look "
            "at the samples below; lower `train.learning_rate` or raise `train.warmup_steps`; if it begins on one rank "
            "whatever the samples are, leave its node out. Then start again"
        )
        return [head, *map(self._line, self._stretch)]
