"""Each finished step → what is wrong with the run while it goes on, said once, or the end of it.

What comes in: `StepResult`s, the same on every rank but for what is this rank's own. What goes out: numbers for the
record. Surprise: these are no observers. They compare ranks, so all ranks must ask them in the same step, and they may
end a run that would only do harm by going on.
"""

from dataclasses import dataclass
from typing import Any

from phi3v_dist.observe.health import SpikeWatch
from phi3v_dist.parallel import replicas
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.train.skipped import SkippedSteps
from phi3v_dist.train.step import StepResult


@dataclass
class Guards:
    """compare_every_steps: between comparisons of what ranks hold alike."""

    engine: Any
    topology: Topology
    spikes: SpikeWatch
    skipped: SkippedSteps
    compare_every_steps: int

    def row(self, result: StepResult) -> dict[str, float]:
        """What is to be logged beside the step's own numbers."""
        return {"train/spike": float(self.spikes.look(result.step, result.loss, result.sample_ids))}

    def look(self, result: StepResult) -> None:
        """End a run that would only do harm by going on; once the step is logged. Collective.

        Raises:
            DivergedError: too many steps in a row had to be skipped.
            CorruptedError: a rank's memory changed by itself.
        """
        self.skipped.look(result)
        if result.step % self.compare_every_steps == 0:
            replicas.compare(self.engine, self.topology)
