"""A run folder → one paragraph: what happened, to whom, and what to do; and a table of the attempts.

What comes in: whatever the run left behind. What goes out: a `Diagnosis`, as text or as plain data. Surprise: it reads
nothing but files, so it works on a login node, long after the job, and on a run that is still going on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from phi3v_dist.errors import ConfigError
from phi3v_dist.invocation import as_typed
from phi3v_dist.observe.tracker import RECORD_NAME
from phi3v_dist.printable import printable
from phi3v_dist.watch import flight_recorder
from phi3v_dist.watch.attempts import (
    FINISHED,
    LOST,
    RUNS,
    STOPPED,
    PastAttempt,
    read_attempts,
    said_that_it_ended,
)
from phi3v_dist.watch.checkpoint_names import goes_on, newest_checkpoint
from phi3v_dist.watch.node_report import DIED, FAILED, HANG, Verdict

ADVICE = {
    DIED: "See the machine's log (dmesg). If the same machine comes up again, leave it out.",
    LOST: "See whether that machine is up (ping); start again without it.",
    FAILED: "Mend what the error names, then start again.",
    HANG: "See the stacks. If the same machine comes up again, leave it out.",
}
ADVICE_UNDER_SLURM = {
    DIED: "See the node's log (dmesg, sacct -j {job} --format=State,ExitCode,MaxRSS). If the same node comes up again, "
    "leave it out (sbatch --exclude).",
    LOST: "See whether that node is up (sinfo -R, ping); start again without it (sbatch --exclude).",
    HANG: "See the stacks. If the same node comes up again, leave it out (sbatch --exclude).",
}
ADVICE_ON_HANG = {
    "data": "See whether the storage of that shard answers (ls, dd on that node); if the run stops at the same sample "
    "again, take the sample out.",
    "evaluate": "See the stacks: an evaluation waits for storage, or for one rank's answers.",
    "write": "See whether the disk of the run folder answers and has space (df, dmesg on that node).",
    "flush": "See whether the disk of the run folder answers (dmesg on that node).",
    "commit": "See whether the disk of the run folder answers, and whether all nodes see the same folder.",
    "load": "See whether the storage of the model and of the checkpoints answers on that node.",
}
MAX_LINES = 12
BULLET = "- "


@dataclass(frozen=True)
class Diagnosis:
    """paragraph: for people. facts: the same for scripts. checkpoint: the newest one by name; None where there is none,
    and where the last attempt could not use those that there are."""

    run: Path
    paragraph: str
    attempts: list[PastAttempt]
    checkpoint: str | None

    @property
    def facts(self) -> dict[str, Any]:
        last = self.attempts[-1] if self.attempts else None
        found = last.verdict.verdict if last and last.verdict else None
        return {
            "run": str(self.run), "ending": last.ending if last else None, "says": self.paragraph,
            "blamed": [_blamed(one) for one in found.blamed] if found else [], "last_checkpoint": self.checkpoint,
            "attempts": [
                {
                    "attempt": one.number, "hosts": one.hosts, "ranks": one.num_ranks, "since": one.owner.get("since"),
                    "from_step": one.first_step, "to_step": one.last_step, "ending": one.ending,
                    "silent_hosts": one.silent, "exit_code": one.exit_code,
                }
                for one in self.attempts
            ],
        }  # fmt: skip

    def table(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("attempt", "since", "hosts", "ranks", "steps", "how it ended"):
            table.add_column(name, overflow="fold")
        for one in self.attempts:
            steps = f"{one.first_step}-{one.last_step}" if one.first_step is not None else "none"
            hosts = ", ".join(one.hosts[:3]) + (f" and {len(one.hosts) - 3} more" if len(one.hosts) > 3 else "")
            since = str(one.owner.get("since", ""))[:19].replace("T", " ")
            cells = (str(one.number), since, hosts, str(one.num_ranks or ""), steps, _short(one))
            table.add_row(*(printable(cell) for cell in cells))
        return table


def diagnose(run: Path) -> Diagnosis:
    """Raises ConfigError when `run` is not a run folder."""
    names = ("config.yaml", RECORD_NAME, "attempts")
    if not any((run / name).exists() for name in names):
        found = "there is no such folder"
        if run.exists():
            found = "it holds neither config.yaml, metrics.jsonl nor attempts" if run.is_dir() else "it is a file"
        raise ConfigError(
            f"{run} is not a run folder: {found}. Name a folder that {as_typed('launch/train.py')} made (runs/<name>)"
        )
    attempts = read_attempts(run)
    is_refused = bool(attempts) and attempts[-1].refused_checkpoints
    checkpoint = None if is_refused else newest_checkpoint(run)
    return Diagnosis(run, " ".join(_sentences(run, attempts, checkpoint)), attempts, checkpoint)


def _sentences(run: Path, attempts: list[PastAttempt], checkpoint: str | None) -> list[str]:
    if not attempts:
        return [f"{run} has been set up, but no attempt has logged a step or said how it ended."]
    last = attempts[-1]
    where = f"step {last.last_step}" if last.last_step is not None else "no step"
    head = f"Attempt {last.number} of {run.name}"
    again = [] if last.refused_checkpoints else [_sentence(goes_on(checkpoint))]
    if last.ending == FINISHED:
        return [f"{head} finished at {where}: nothing is left to do."]
    if last.ending == STOPPED:
        return [f"{head} was asked to stop and did so after {where}, saved.", *again]
    if last.ending == RUNS:
        return [f"{head} is running: {where} so far."]
    came_to = "before its first step" if last.last_step is None else f"after {where}"
    sentences = [f"{head} ended {came_to}."]
    if last.verdict and last.verdict.verdict:
        sentences.append(_told(last.verdict.verdict))
    if last.silent:
        hosts = ", ".join(last.silent)
        sentences.append(f"No last word came from {hosts}: lost, or killed with everything on it.")
    if not last.verdict and not last.silent:
        sentences.append(_without_word(last))
    sentences += flight_recorder.summarize([run, run / flight_recorder.FOLDER, last.folder])
    sentences.append(_advice(last))
    return [*sentences, *again]


def _told(verdict: Verdict) -> str:
    """The watcher's own lines as sentences, without what it said of the ending; problems in a list are numbered."""
    said = [line.strip() for line in verdict.lines if "all ranks are ended" not in line][:MAX_LINES]
    sentences: list[str] = []
    number, is_in_list = 0, False
    num_problems = sum(line.startswith(BULLET) for line in said)
    for line in said:
        if line.startswith(BULLET):
            number, is_in_list = number + 1, True
            problem = line.removeprefix(BULLET)
            sentences.append(f"({number}) {problem}" if num_problems > 1 else problem)
        elif is_in_list:  # a problem of several lines
            sentences[-1] += f" {line}"
        else:
            sentences.append(line)
    return " ".join(map(_sentence, sentences))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _without_word(attempt: PastAttempt) -> str:
    if said_that_it_ended(attempt):
        return "It ended by itself or was taken over, and no rank said why; the log of the job has its last lines."
    return "It ended without a word: killed with its whole job or node (time limit, power, scancel)."


def _advice(attempt: PastAttempt) -> str:
    advice = ADVICE.get(attempt.ending, "See the log of the job.")
    if job := str(attempt.owner.get("job") or ""):
        advice = ADVICE_UNDER_SLURM.get(attempt.ending, advice).format(job=job)
    blamed = attempt.verdict.verdict.blamed if attempt.verdict and attempt.verdict.verdict else []
    if attempt.ending == HANG and blamed and not blamed[0].frozen:
        return ADVICE_ON_HANG.get(blamed[0].phase, advice)
    return advice


def _short(attempt: PastAttempt) -> str:
    verdict = attempt.verdict.verdict if attempt.verdict else None
    if attempt.ending == LOST:
        return f"lost: {', '.join(attempt.silent)}"
    if verdict and verdict.blamed:
        first = verdict.blamed[0]
        return f"{verdict.kind}: rank {first.rank} on {first.host}, {first.where}"
    return attempt.ending if attempt.ending in (FINISHED, STOPPED, RUNS) else "without a word"


def _blamed(actor: Any) -> dict[str, Any]:
    return {"rank": actor.rank, "host": actor.host, "phase": actor.phase, "step": actor.step, "what": actor.what}
