"""What slurm/train.sh asks: may the job begin, on which nodes, and what now. Answers are lines of `name=value`.

    python launch/job.py begin --config launch/configs/quickstart.yaml
    python launch/job.py nodes RUN_FOLDER --life 12.0.1 --hosts node1,node2 --wanted 2 --least 2
    python launch/job.py judge RUN_FOLDER --life 12.0.1 --exit-code 1
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
from phi3v_dist.cli import run_script
from phi3v_dist.cluster import judge, nodes, starts, sweep
from phi3v_dist.cluster.findings import summarize
from phi3v_dist.cluster.report import FOLDER_NAME, read_reports
from phi3v_dist.cluster.starts import End, Life
from phi3v_dist.errors import ConfigError
from phi3v_dist.watch.attempts import best_step

log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="begin | nodes | judge | sweep")
    verb = verbs.add_parser("begin", help="where the run is, and whether it is finished")
    verb.add_argument("--config", required=True)
    verb.add_argument("overrides", nargs="*")
    verb = verbs.add_parser("nodes", help="which nodes to train on, after launch/doctor.py")
    verb.add_argument("run", type=Path)
    verb.add_argument("--life", type=life, required=True, metavar="JOB.RESTART.NUMBER")
    verb.add_argument("--hosts", type=lambda text: text.split(","), required=True, metavar="A,B,…")
    verb.add_argument("--wanted", type=int, required=True, help="nodes to train on; those beyond are spares")
    verb.add_argument("--least", type=int, required=True, help="nodes with which to train rather than wait")
    verb.add_argument("--noticed", action="store_true", help="the job was told that it is going to be ended")
    verb.add_argument("--time-left", type=seconds, default=None, metavar="S", help="until Slurm ends the job")
    verb = verbs.add_parser("judge", help="how the start ended, and what to do now")
    verb.add_argument("run", type=Path)
    verb.add_argument("--life", type=life, required=True, metavar="JOB.RESTART.NUMBER")
    verb.add_argument("--exit-code", type=int, required=True, help="of srun")
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


def seconds(text: str) -> float | None:
    """Nothing for a job without a limit."""
    return float(text) if text else None


def answer(**values: object) -> None:
    for name, value in values.items():
        print(f"{name}={value}")


def begin(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides)
    folder = settings.run.folder.absolute()
    if not str(folder).isprintable():
        raise ConfigError(f"`run.root` {str(folder)!r}: a path with control characters cannot be used under Slurm")
    answer(run=folder, finished="yes" if is_finished(settings) else "no")


def choose_nodes(arguments: argparse.Namespace) -> None:
    past, own = starts.read(arguments.run), arguments.life
    if arguments.noticed:
        starts.begin(arguments.run, own, [], best_step(arguments.run))
        return tell(arguments.run, own, judge.not_begun(arguments.run, own))
    findings = summarize(read_reports(arguments.run / FOLDER_NAME), arguments.hosts, str(own))
    is_first = own.restart == 0 and own.number == 1
    if is_first or findings.bad or findings.common or findings.warnings:
        log.warning("\n".join(findings.lines()))
    if findings.common:
        return answer(action=nodes.STOP, code=findings.exit_code)
    unfit = {host: "; ".join(reasons) for host, reasons in findings.bad.items()}
    choice = nodes.choose(arguments.hosts, unfit, past, arguments.wanted, arguments.least)
    if choice.action == nodes.TRAIN:
        choice = nodes.in_time(choice, arguments.run, arguments.time_left, is_first=own.number == 1)
    for host, why in choice.bad.items():
        log.warning("%s is left out: %s", host, why)
    if choice.why:
        log.warning("%s", choice.why)
    if choice.action == nodes.TRAIN:
        starts.begin(arguments.run, own, choice.use, best_step(arguments.run))
    answer(action=choice.action, use=",".join(choice.use), bad=",".join(choice.bad), code=ConfigError.exit_code)


def judge_start(arguments: argparse.Namespace) -> None:
    end = judge.judge(arguments.run, arguments.life, arguments.exit_code, arguments.noticed)
    tell(arguments.run, arguments.life, end)


def tell(run: Path, own: Life, end: End) -> None:
    """Record how a start has ended, and answer with what is to be done."""
    starts.end(run, own, end)
    log.warning("%s: %s", end.action, end.why)
    answer(action=end.action, code=end.exit_code)


def show_sweep(arguments: argparse.Namespace) -> None:
    tasks, given = sweep.read_tasks(arguments.file), arguments.overrides
    if arguments.task is None:
        return print("\n".join(sweep.describe(tasks, arguments.config, given)))
    print("\n".join(sweep.added_by(arguments.task, tasks, arguments.config, given)))


def cli() -> None:
    """Entry point of the installed command."""
    run_script(main)


if __name__ == "__main__":
    cli()
