"""How long the job may still run → when a run must stop to save its last step.

What comes in: `PHI3V_TIME_LEFT_S`, seconds as Slurm's controller counted them when this process was started. What goes
out: how much is left by now. Surprise: Slurm tells a job neither when it ends nor, before the end, that it does; and
the controller's clock is not this node's, so only the time since the start of this process is counted. It took a while
to start it, too: slurm/train.sh has taken 30 s off for that.
"""

import math
import os
import time
from collections import deque
from collections.abc import Mapping

from phi3v_dist.parallel.variables import number
from phi3v_dist.watch import processes

TIME_LEFT_VARIABLE = "PHI3V_TIME_LEFT_S"
WHY = "the job's time limit"
REMEMBERED = 8  # steps, of which the longest says how long the next one may take


class TimeLimit:
    """left_s: as of now; infinite where nobody ends the job."""

    def __init__(self, left_s: float = math.inf):
        self._ends_s = time.monotonic() + left_s
        self._steps_s: deque[float] = deque(maxlen=REMEMBERED)

    @classmethod
    def of_job(cls, env: Mapping[str, str] = os.environ) -> "TimeLimit":
        """Raises LaunchError when the variable is not a number."""
        if TIME_LEFT_VARIABLE not in env:
            return cls()
        began_ticks = processes.start_ticks(os.getpid()) or 0
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - began_ticks / os.sysconf("SC_CLK_TCK")
        return cls(number(env, TIME_LEFT_VARIABLE, default=0) - age_s)

    def left_s(self) -> float:
        return self._ends_s - time.monotonic()

    def step_took(self, seconds: float) -> None:
        """A step, without evaluations."""
        self._steps_s.append(seconds)

    def is_near(self, grace_s: float) -> bool:
        """Whether there would be no time for a save after one more step."""
        return self.left_s() < grace_s + max(self._steps_s, default=0.0)
