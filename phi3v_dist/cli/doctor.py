"""The machines of a job, before it trains: versions, GPUs, arithmetic, memory, disks, shards, network.

    python launch/doctor.py --config launch/configs/quickstart.yaml                     this machine
    srun --ntasks-per-node=1 python launch/doctor.py --config …                         all nodes, and a table
    torchrun --nnodes 2 --nproc_per_node 1 … launch/doctor.py --config …                the same without Slurm
    srun … python launch/doctor.py --config … --report RUN/preflight --token 17.0.1     as slurm/train.sh does it

One process on each node. Each writes RUN/preflight/HOST.json. With --token the job judges them; without, the first
process prints the table. Exit code: 0 all well, 5 a machine or the launch, 2 the settings or folders, 3 the data.

Each process ends within --limit-s, whatever hangs: looks at this machine have 40 % of that time together, nodes that
have not come 15 %, the network 35 %. Normally it takes 10 to 30 s. What has no time left is named, and no fault.
"""

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi3v_dist import config, versions
from phi3v_dist.cli.app import new_parser, run_script
from phi3v_dist.errors import ConfigError, LaunchError
from phi3v_dist.parallel.variables import host_name
from phi3v_dist.printable import printable

TOKEN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
LAST_REPORTS_S = 10.0  # for the other nodes to write theirs, once this one is through with the network


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("doctor", __doc__)
    parser.add_argument("--config", required=True, help="YAML file, or a recipe that ships with phi3v-dist")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="where reports go (default: RUN/preflight)")
    parser.add_argument("--token", help="name of this start, the same on all nodes; the job then judges the reports")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks, and GPUs, that each node must have")
    parser.add_argument(
        "--wait-s", type=float, default=20.0, metavar="S", help="for one more node, since the last came (default: 20)"
    )
    parser.add_argument(
        "--limit-s", type=float, default=os.environ.get("PHI3V_EXAMINE_S") or 240.0, metavar="S",
        help="longest time of all (default: PHI3V_EXAMINE_S, else 240)",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    return parser


def run_command() -> None:
    began_s = time.monotonic()
    arguments = build_parser().parse_intermixed_args()
    check_words(arguments)
    with ended_within(arguments.limit_s):
        code = look(arguments, began_s)
        sys.stdout.flush()
        os._exit(code)  # a look that hangs has a thread that would not let this process end


def look(arguments: argparse.Namespace, began_s: float) -> int:
    """Examine this node, and by hand print all nodes. Returns the exit code; raises ConfigError."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns of every address that has no name
    token = arguments.token or token_by_hand()
    with refusal_reported(arguments.report, token):
        versions.require()  # before the imports that may fail for want of the right version, and take seconds
    from phi3v_dist.cluster import preflight
    from phi3v_dist.cluster.checking import Place
    from phi3v_dist.cluster.report import FOLDER_NAME
    from phi3v_dist.parallel.topology import Topology

    topology = Topology.from_environment()
    if topology.local_rank != 0:
        return 0
    with refusal_reported(arguments.report, token):
        settings = config.load(arguments.config, arguments.overrides)
    num_nodes = -(-topology.world_size // topology.local_world_size)
    folder = arguments.report or settings.run.folder / FOLDER_NAME
    left_s = arguments.limit_s - (time.monotonic() - began_s)  # imports may have taken their time
    place = Place(settings, topology.host, num_nodes, arguments.ranks_per_node, folder, left_s)
    try:
        report = preflight.examine(place, token)
        report = preflight.probe(report, place, preflight.patience_of(place, arguments.wait_s))
    except OSError as error:
        raise ConfigError(f"{folder}: the report cannot be written: {error}; set run.root to another place") from error
    return judge_all(folder, token, num_nodes) if topology.is_main and not arguments.token else say(report)


@contextmanager
def refusal_reported(folder: Path | None, token: str) -> Iterator[None]:
    """Write a ConfigError raised within to the report folder as well, if there is one."""
    try:
        yield
    except ConfigError as error:
        if folder is not None:
            from phi3v_dist.cluster.report import refused

            refused(host_name(os.environ), token, folder, error)
        raise


def check_words(arguments: argparse.Namespace) -> None:
    """Raises ConfigError."""
    wrong = []
    if arguments.token is not None and not re.fullmatch(TOKEN, arguments.token):
        wrong.append(f"--token is {arguments.token!r}: it must be letters, digits, and . _ - between them")
    if arguments.ranks_per_node is not None and arguments.ranks_per_node < 1:
        wrong.append(f"--ranks-per-node is {arguments.ranks_per_node}: it must be at least 1")
    if not 0 <= arguments.wait_s < 3600:
        wrong.append(f"--wait-s is {arguments.wait_s}: it must be 0 to 3600 seconds")
    if not 5 <= arguments.limit_s <= 86400:
        wrong.append(f"--limit-s is {arguments.limit_s}: it must be 5 to 86400 seconds")
    if wrong:
        raise ConfigError(wrong)


@contextmanager
def ended_within(limit_s: float) -> Iterator[None]:
    """End this process then, even if the file system of the report folder or the settings does not answer."""

    def end() -> None:
        print(f"not ended after {limit_s:.0f} s: the run folder, the settings or Python's files hang", flush=True)
        os._exit(LaunchError.exit_code)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def token_by_hand() -> str:
    """The same on all nodes of one srun or torchrun, and another the next time."""
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" in env:
        parts = ["hand", env.get("SLURM_JOB_ID", ""), env.get("SLURM_STEP_ID", "")]
    elif "RANK" in env:
        parts = ["hand", env.get("TORCHELASTIC_RUN_ID", ""), env.get("MASTER_PORT", "")]
    else:
        parts = ["hand", str(time.time_ns())]
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))[:100]


def say(report) -> int:  # type: ignore[no-untyped-def]  # its class brings pydantic, and --help should not
    """One node's own outcome, for its log. Returns its exit code."""
    from phi3v_dist.cluster.findings import ERRORS

    for check in report.checks:
        for level, texts in (("PROBLEM", check.problems), ("warning", check.warnings)):
            for text in texts:
                print(printable(f"{report.host}: {level} {check.name}: {text}"))
    if not any(check.problems or check.warnings for check in report.checks):
        print(printable(f"{report.host}: ok"))
    return min((ERRORS[check.kind].exit_code for check in report.checks if check.problems), default=0)


def judge_all(folder: Path, token: str, num_nodes: int) -> int:
    """Print the table of all nodes. Returns the exit code."""
    from phi3v_dist.cluster.findings import summarize
    from phi3v_dist.cluster.report import read_reports

    end_s = time.monotonic() + LAST_REPORTS_S
    while True:
        reports = [report for report in read_reports(folder) if report.token == token]
        if sum(report.is_complete for report in reports) >= num_nodes or time.monotonic() > end_s:
            break
        time.sleep(0.2)
    hosts = [report.host for report in reports]
    hosts += [f"(not heard of {number})" for number in range(1, num_nodes - len(hosts) + 1)]
    findings = summarize(reports, hosts, token)
    print("\n".join(findings.lines()))
    return findings.exit_code


def main() -> None:
    """Entry point of `phi3v-doctor` and `launch/doctor.py`."""
    run_script(run_command)


if __name__ == "__main__":
    main()
