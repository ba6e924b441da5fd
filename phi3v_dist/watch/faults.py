"""The one place where a fault can be asked for: `PHI3V_FAULT=rank:phase:step:action`, off in production.

What comes in: the phase that a rank is about to enter (`heartbeat.enter` asks). What goes out: nothing, a dead or stuck
process, an exception, or the name of an action that the caller carries out itself (`nan`). Several faults are separated
by commas; `*` as rank or step means every one, `5+` every step from 5 on. `slow` waits half a second, `slow=0.06` so
many.

    PHI3V_FAULT=1:forward:5:kill9 torchrun --nproc_per_node 2 launch/train.py --config …

Surprise: the same words work on CPUs, GPUs and Slurm, so every row of docs/faults.md can be tried on any of them.
"""

import errno
import logging
import os
import re
import signal
import time
from dataclasses import dataclass

from phi3v_dist.errors import ConfigError

VARIABLE = "PHI3V_FAULT"
PHASES = (
    "start", "load", "data", "forward", "backward", "optimizer", "snapshot", "evaluate", "score", "export", "finish",
)  # fmt: skip
PREFLIGHT_PHASES = ("gemm", "network")  # of launch/doctor.py; `nan` makes a product wrong
SAVE_PHASES = ("write", "flush", "commit", "prune", "idle")  # of the thread that writes checkpoints
KNOWN_PHASES = PHASES + SAVE_PHASES + PREFLIGHT_PHASES
SLOW_S = 0.5
FOREVER_S = 10**6
BY_CALLER = ("nan",)  # the loss (phase forward) or the gradients (phase backward) become NaN
SIGNALS = {"kill9": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "stop": signal.SIGSTOP}
SLOW = re.compile(r"slow=(\d+(?:\.\d+)?)")  # seconds
ACTIONS = (*SIGNALS, "hang", "slow", "raise", "enospc", "eio", *BY_CALLER)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """One entry of the variable. rank, step: a number as text, or `*`; step also `N+`."""

    rank: str
    phase: str
    step: str
    action: str

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Raises ConfigError, naming what there is to choose from."""
        parts = text.strip().split(":")
        if len(parts) != 4:
            raise ConfigError(f"{VARIABLE} has {text!r}: it must be rank:phase:step:action, such as 1:forward:5:kill9")
        rank, phase, step, action = parts
        found = [
            (not re.fullmatch(r"\d+|\*", rank), f"rank {rank!r}: a number, or * for every one"),
            (phase not in KNOWN_PHASES, f"phase {phase!r}: one of {', '.join(KNOWN_PHASES)}"),
            (not re.fullmatch(r"\d+\+?|\*", step), f"step {step!r}: a number, one with + for all from there on, or *"),
            (action not in ACTIONS and not SLOW.fullmatch(action), f"action {action!r}: one of {', '.join(ACTIONS)}"),
        ]
        if wrong := [f"{VARIABLE} has {text!r}, {message}" for is_wrong, message in found if is_wrong]:
            raise ConfigError(wrong)
        return cls(rank, phase, step, action)

    def __str__(self) -> str:
        return f"rank {self.rank}, phase {self.phase}, step {self.step} ({self.action})"

    def applies(self, phase: str, step: int | None, rank: str) -> bool:
        at = self.step == "*" or self.step == str(step)
        after = self.step.endswith("+") and step is not None and step >= int(self.step[:-1])
        return self.phase == phase and self.rank in ("*", rank) and (at or after)


def announce() -> None:
    """Say what is going to go wrong on purpose. Raises ConfigError when the variable cannot be understood."""
    if asked := os.environ.get(VARIABLE):
        faults = [Fault.parse(text) for text in asked.split(",")]
        log.warning("%s is set, so %s will go wrong on purpose", VARIABLE, " and ".join(map(str, faults)))


def fire(phase: str, step: int | None) -> str | None:
    """Carry out what is asked for here; returns the action when it is the caller's to do. Raises RuntimeError (action
    `raise`) and OSError (`enospc`, `eio`)."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        return None
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    for fault in map(Fault.parse, asked.split(",")):
        if fault.applies(phase, step, rank):
            _carry_out(fault, phase, step)
            if fault.action in BY_CALLER:
                return fault.action
    return None


def _carry_out(fault: Fault, phase: str, step: int | None) -> None:
    if fault.action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.action])
    elif fault.action in ("hang", "slow"):
        time.sleep(FOREVER_S if fault.action == "hang" else SLOW_S)
    elif seconds := SLOW.fullmatch(fault.action):
        time.sleep(float(seconds[1]))
    elif fault.action == "raise":
        raise RuntimeError(f"injected into phase {phase} of step {step} by {VARIABLE}")
    elif fault.action in ("enospc", "eio"):
        code = getattr(errno, fault.action.upper())
        raise OSError(code, f"{os.strerror(code)} (injected by {VARIABLE})")
