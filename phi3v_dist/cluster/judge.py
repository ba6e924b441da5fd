"""What a start has left in its run folder → what the batch script does next.

What comes in: the run folder, the start, srun's exit code. What goes out: an `End`. Surprise: srun's exit code does not
tell a clean stop from a crash (with --kill-on-bad-exit it is that of a rank which srun itself has ended), so a marker
file does.
"""

from pathlib import Path
from typing import Any

from phi3v_dist.attempt.attempt import ATTEMPTS_NAME, STOPPED_NAME, SUMMARY_NAME
from phi3v_dist.cluster import starts
from phi3v_dist.cluster.starts import AGAIN, DONE, REQUEUE, STOP, End, Life
from phi3v_dist.errors import CrashLoopError
from phi3v_dist.watch.attempts import STOPPED, PastAttempt, best_step, read_attempts, read_json
from phi3v_dist.watch.endings import MAX_WITHOUT_STEP, Ending, how_it_ended


def judge(run: Path, life: Life, exit_code: int, noticed: bool) -> End:
    """exit_code: of srun, as a shell tells it (128 and the signal's number). noticed: the job is about to be ended."""
    return unless_in_vain(run, life, _ending(run, life, exit_code, noticed))


def not_begun(run: Path, life: Life) -> End:
    """Of a start that was asked to stop while its nodes were examined, or copied shards."""
    return unless_in_vain(run, life, End(REQUEUE, "asked to stop before the ranks began", 0, best_step(run)))


def unless_in_vain(run: Path, life: Life, end: End) -> End:
    """The same, unless too many starts in a row have ended so without a new step."""
    most = {AGAIN: MAX_WITHOUT_STEP, REQUEUE: starts.MAX_NOTICES}.get(end.action)
    past = starts.read(run)
    began_at = next((start.step for start in past if start.life == life), end.step)
    if most is None or end.step > began_at or starts.without_step(past, life.job, end.action) + 1 < most:
        return end
    why = f"{most} starts in a row ended without a new step, at step {end.step}. The last one: {end.why}"
    if end.action == REQUEUE:
        why += ". If it was the time limit: ask for more (sbatch --time)"
    return End(STOP, why, CrashLoopError.exit_code, end.step, end.blamed, end.ranks)


def refused(run: Path, life: Life) -> End | None:
    """Of a start that is not made, because Slurm has ended too many with their batch script; None when it may be."""
    step = best_step(run)
    if starts.unended(starts.read(run), life.job, step) < starts.MAX_UNENDED:
        return None
    why = (
        f"{starts.MAX_UNENDED} starts since step {step} were ended together with their batch script, and nobody could "
        "say why: the node that runs it is lost each time, or the job is preempted before it can make a step (sacct "
        "-j JOB --duplicates tells)"
    )
    return End(STOP, why, CrashLoopError.exit_code, step)


def _ending(run: Path, life: Life, exit_code: int, noticed: bool) -> End:
    """By itself, without a look at the starts before."""
    step = best_step(run)
    attempt, said = attempt_of(run, life), read_json(run / ATTEMPTS_NAME / f"last-word-{life}.json")
    if (run / SUMMARY_NAME).is_file() and _is_of_now(attempt, said, exit_code):
        return End(DONE, "the run is finished", 0, step)
    stopped = read_json(run / STOPPED_NAME)
    if stopped and attempt is not None and stopped.get("attempt") == attempt.number:
        why = f"stopped after step {stopped.get('step')} by {stopped.get('why')}"
        return End(REQUEUE if stopped.get("notice") else DONE, why, 0, step)
    ending = how_it_ended(attempt, said, exit_code)
    if not ending.again and ending.exit_code == 0:
        ending = Ending(True, "srun ended with 0, but no rank has finished or stopped the run")
    if not ending.again:
        return End(STOP, ending.why, ending.exit_code, step)
    if noticed or (attempt is None and said.get("outcome") == STOPPED):
        return End(REQUEUE, f"asked to stop before it could save: {ending.why}", ending.exit_code, step)
    return End(AGAIN, ending.why, ending.exit_code, step, list(ending.blamed), dict(ending.blamed))


def _is_of_now(attempt: PastAttempt | None, said: dict[str, Any], exit_code: int) -> bool:
    """Whether a summary is the word of this start, and not of one before that asked for fewer steps.

    An attempt removes the old one before its ranks do anything that is recorded. Without one, ranks that ended well
    have found the run finished, unless they were stopped before they could look.
    """
    if attempt is not None and (attempt.reports or attempt.last_step is not None):
        return True
    return exit_code == 0 and said.get("outcome") != STOPPED


def attempt_of(run: Path, life: Life) -> PastAttempt | None:
    """The attempt that a start of a job has made; None if it came to none."""
    wanted = (life.job, life.restart, life.number)
    for attempt in reversed(read_attempts(run)):
        owner = attempt.owner
        if (owner.get("job"), owner.get("restart"), owner.get("start")) == wanted:
            return attempt
    return None
