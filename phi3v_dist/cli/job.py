"""What slurm/train.sh asks: may the job begin, on which nodes, and what now. Answers are lines of `name=value`.

    python launch/job.py begin --config launch/configs/quickstart.yaml --restarts 0 --most 100
    python launch/job.py nodes RUN_FOLDER --life 12.0.1 --hosts node1,node2 --wanted 2 --least 2
    python launch/job.py judge RUN_FOLDER --life 12.0.1 --exit-code 1
    python launch/job.py judge RUN_FOLDER --life 12.0.1 --not-begun
    python launch/job.py sweep --file slurm/sweep.example.txt --config launch/configs/quickstart.yaml

Reasons go to stderr, so into the job's log. Nothing here starts or ends a process: the batch script does, since Slurm's
programs are not to be had inside containers.
"""

import argparse
import logging
import re
import sys
from pathlib import Path

from phi3v_dist import config
from phi3v_dist.attempt.finished import is_finished
from phi3v_dist.cli.app import run_script
from phi3v_dist.cluster import judge, nodes, starts, sweep
from phi3v_dist.cluster.findings import summarize
from phi3v_dist.cluster.report import FOLDER_NAME, read_reports
from phi3v_dist.cluster.starts import End, Life
from phi3v_dist.errors import ConfigError, CrashLoopError
from phi3v_dist.watch.attempts import best_step

log = logging.getLogger(__name__)


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="begin | nodes | judge | sweep")
    verb = verbs.add_parser("begin", help="where the run is, and whether the job may begin")
    verb.add_argument("--config", required=True)
    verb.add_argument("--restarts", type=count, default=0, metavar="N", help="how often the job has come back")
    verb.add_argument("--most", type=count, metavar="M", help="how often it may")
    verb.add_argument("overrides", nargs="*")
    verb = verbs.add_parser("nodes", help="which nodes to train on, after launch/doctor.py")
    verb.add_argument("run", type=Path)
    verb.add_argument("--life", type=life, required=True, metavar="JOB.RESTART.NUMBER")
    verb.add_argument("--hosts", type=lambda text: text.split(","), required=True, metavar="A,B,…")
    verb.add_argument("--wanted", type=count, required=True, help="nodes to train on; those beyond are spares")
    verb.add_argument("--least", type=count, required=True, help="nodes with which to train rather than wait")
    verb.add_argument("--waited", type=count, default=0, metavar="N", help="answers `wait` in a row until now")
    verb.add_argument("--noticed", action="store_true", help="the job was told that it is going to be ended")
    verb.add_argument("--time-left", type=seconds, default=None, metavar="S", help="until Slurm ends the job")
    verb = verbs.add_parser("judge", help="how the start ended, and what to do now")
    verb.add_argument("run", type=Path)
    verb.add_argument("--life", type=life, required=True, metavar="JOB.RESTART.NUMBER")
    ending = verb.add_mutually_exclusive_group(required=True)
    ending.add_argument("--exit-code", type=int, help="of srun")
    ending.add_argument("--not-begun", action="store_true", help="it was asked to stop before its ranks began")
    verb.add_argument("--noticed", action="store_true", help="the job was told that it is going to be ended")
    verb = verbs.add_parser("sweep", help="what a task of slurm/sweep.sh adds to the settings, one a line")
    verb.add_argument("--file", type=Path, required=True, help="a line of key=value words for each task")
    verb.add_argument("--task", type=int, metavar="N", help="from 0; without it, all tasks are shown")
    verb.add_argument("--config", required=True)
    verb.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    logging.getLogger().handlers[0].setStream(sys.stderr)  # type: ignore[attr-defined]  # stdout is the answer
    {"begin": begin, "nodes": choose_nodes, "judge": judge_start, "sweep": show_sweep}[arguments.verb](arguments)


def life(text: str) -> Life:
    """`12.0.1` → job 12, never requeued, its first start."""
    match = re.fullmatch(r"(\w+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not JOB.RESTART.NUMBER, such as 12.0.1")
    return Life(match[1], int(match[2]), int(match[3]))


def count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def seconds(text: str) -> float | None:
    """Nothing for a job without a limit."""
    return float(text) if text else None


def answer(**values: object) -> None:
    """At once: what is done after it may fail."""
    for name, value in values.items():
        print(f"{name}={value}", flush=True)


def begin(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides)
    folder = settings.run.folder.absolute()
    if not str(folder).isprintable():
        raise ConfigError(f"`run.root` {str(folder)!r}: a path with control characters cannot be used under Slurm")
    finished = is_finished(settings)
    action, code = (starts.DONE, 0) if finished else ("begin", 0)
    if not finished and arguments.most is not None and arguments.restarts > arguments.most:
        log.warning("the job has come back %d times (PHI3V_MAX_REQUEUES): submit it again to go on", arguments.restarts)
        action, code = starts.STOP, CrashLoopError.exit_code
    answer(run=folder, action=action, code=code)


def choose_nodes(arguments: argparse.Namespace) -> None:
    run, own = arguments.run, arguments.life
    if end := judge.not_begun(run, own) if arguments.noticed else judge.refused(run, own):
        return tell(run, own, end, is_recorded=False)
    past, exclusions = starts.read_all(run)
    step = best_step(run)
    findings = summarize(read_reports(run / FOLDER_NAME), arguments.hosts, str(own))
    is_first = own.restart == 0 and own.number == 1
    if is_first or findings.bad or findings.common or findings.warnings:
        log.warning("\n".join(findings.lines()))
    if findings.common:
        action = nodes.common_problem(arguments.waited, has_trained=step > 0 or not is_first)
        return answer(action=action, code=findings.exit_code)
    unfit = nodes.suspected(past, own.job) | {host: "; ".join(reasons) for host, reasons in findings.bad.items()}
    choice = nodes.choose(arguments.hosts, unfit, past, arguments.wanted, arguments.least)
    if choice.action == nodes.TRAIN:
        choice = nodes.in_time(choice, run, arguments.time_left, is_first=own.number == 1)
    for host, why in choice.bad.items():
        log.warning("%s is left out: %s", host, why)
    if choice.why:
        log.warning("%s", choice.why)
    bad, forgiven = list(choice.bad), list[str]()
    if choice.action == nodes.REQUEUE:
        still_bad, forgiven = starts.excluded(past, exclusions, own.job, bad)
        bad = [*bad, *still_bad]
    if choice.action == nodes.REQUEUE:
        end = judge.unless_in_vain(run, own, End(starts.REQUEUE, choice.why, 0, step))
        if end.action == starts.STOP:
            return tell(run, own, end, is_recorded=False)
    answer(
        action=choice.action, use=",".join(choice.use), bad=",".join(bad), forgive=",".join(forgiven),
        code=ConfigError.exit_code,
    )  # fmt: skip
    if choice.action == nodes.TRAIN:
        starts.begin(run, own, choice.use, step)
    elif choice.action == nodes.REQUEUE:
        starts.begin(run, own, [], step)
        starts.end(run, own, End(starts.REQUEUE, choice.why, 0, step))
        starts.exclude(run, own, list(choice.bad), forgiven)


def judge_start(arguments: argparse.Namespace) -> None:
    run, own = arguments.run, arguments.life
    if arguments.not_begun:
        return tell(run, own, judge.not_begun(run, own))
    tell(run, own, judge.judge(run, own, arguments.exit_code, arguments.noticed))


def tell(run: Path, own: Life, end: End, is_recorded: bool = True) -> None:
    """Answer with what is to be done, and record how a start has ended. is_recorded: its beginning is."""
    log.warning("%s: %s", end.action, end.why)
    bad, forgiven = starts.excluded(*starts.read_all(run), own.job)
    answer(action=end.action, code=end.exit_code, bad=",".join(bad), forgive=",".join(forgiven))
    if not is_recorded:
        starts.begin(run, own, [], end.step)
    starts.end(run, own, end)
    if end.action == starts.REQUEUE and forgiven:
        starts.exclude(run, own, [], forgiven)


def show_sweep(arguments: argparse.Namespace) -> None:
    tasks, given = sweep.read_tasks(arguments.file), arguments.overrides
    if arguments.task is None:
        return print("\n".join(sweep.describe(tasks, arguments.config, given)))
    for word in sweep.added_by(arguments.task, tasks, arguments.config, given):
        print(f"word={word}")


def main() -> None:
    """Entry point of the installed command."""
    run_script(run_command)


if __name__ == "__main__":
    main()
