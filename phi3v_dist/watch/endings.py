"""How one start of a run ended → whether another one may help, and why, in words.

What comes in: the attempt it made, if it came to one, rank 0's last word and the launcher's exit code. What goes out:
an `Ending`. Surprise: the launchers' exit codes are of little use (torchrun answers 1 to everything, srun with that of
a rank that it has itself ended), so they are believed last.
"""

import signal
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from phi3v_dist.errors import (
    CheckpointError,
    ConfigError,
    CorruptedError,
    DataError,
    DivergedError,
    InUseError,
    OutOfMemoryError,
)
from phi3v_dist.watch.attempts import FINISHED, STOPPED, PastAttempt
from phi3v_dist.watch.node_report import DIED, HANG

LAST_WORD_NAME = "last-word.json"
MAX_WITHOUT_STEP = 3  # starts in a row that fail without a new step
SIGNALLED = 128
HOPELESS = {error.exit_code: error.kind for error in (ConfigError, DataError, CheckpointError, InUseError)}
LOOK_FIRST = {error.exit_code: error.kind for error in (DivergedError, OutOfMemoryError, CorruptedError)}


@dataclass(frozen=True)
class Ending:
    """again: whether another start may help; why: for people; blamed: hosts, and which ranks died or hung there."""

    again: bool
    why: str
    exit_code: int = 1
    blamed: Mapping[str, list[int]] = field(default_factory=dict)


def how_it_ended(attempt: PastAttempt | None, said: dict[str, object], code: int) -> Ending:
    """said: rank 0's own last word, which also comes when it ends before there is an attempt. code: of the launcher,
    negative for a signal."""
    said_code = int(str(said.get("exit_code", 0)))
    ended = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with {code}"
    code = SIGNALLED - code if code < 0 else code  # as a shell tells it
    if code == 0:
        return Ending(False, "finished, or stopped cleanly", 0)
    if attempt is not None and attempt.ending in (FINISHED, STOPPED):
        return Ending(False, f"{attempt.ending}, although the launcher {ended}", 0)
    failed = (attempt.exit_code if attempt else 0) or said_code or code
    was_ended = attempt is not None and attempt.ending in (DIED, HANG)  # whatever others said for want of that rank
    if failed in LOOK_FIRST and not was_ended:
        return Ending(False, f"not started again: look at this {LOOK_FIRST[failed]} error first", failed)
    if failed in HOPELESS and not was_ended:
        return Ending(False, f"not started again: another start would not mend this {HOPELESS[failed]} error", failed)
    blamed = blamed_hosts(attempt) if attempt else {}
    if attempt is not None and attempt.verdict and attempt.verdict.verdict:
        return Ending(True, "\n".join(attempt.verdict.verdict.lines), failed, blamed)
    message = str(said.get("message", "")) or f"the launcher {ended} and no rank said why"
    return Ending(True, message, failed, blamed)


def blamed_hosts(attempt: PastAttempt) -> dict[str, list[int]]:
    """Hosts whose ranks died or hung, with these; where none is known, those not heard of again while others were.

    At the first failure srun ends everything on the other nodes, watchers too, so that a node may be silent although
    all is well with it. Where all hang, or nobody is heard of, as when the network or the file server fails, none is
    blamed: the doctor finds out. Nor where the kernel ended a rank that wanted too much memory, as it would elsewhere.
    """
    verdict = attempt.verdict.verdict if attempt.verdict else None
    if verdict and verdict.of_memory:
        return {}
    if verdict and verdict.kind in (DIED, HANG) and verdict.blamed:
        ranks = defaultdict(set)
        for actor in verdict.blamed:
            ranks[actor.host].add(actor.rank)
        return {} if _is_everybody(ranks, attempt) and len(ranks) > 1 else {host: sorted(ranks[host]) for host in ranks}
    told = {report.host for report in attempt.reports if report.ranks and all(rank.outcome for rank in report.ranks)}
    silent: dict[str, list[int]] = {host: [] for host in attempt.silent if host not in told}
    return {} if _is_everybody(silent, attempt) else silent


def _is_everybody(hosts: Iterable[str], attempt: PastAttempt) -> bool:
    return set(hosts) == set(attempt.hosts)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
