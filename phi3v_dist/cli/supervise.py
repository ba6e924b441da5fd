"""Train, and start again in place after a crash or a hang.

    python launch/supervise.py --restarts 5 runs/quickstart -- deepspeed launch/train.py --config …

Errors in settings, data or checkpoints are not tried again, nor is a run that finished or was asked to stop. Three
starts in a row without a new step end it (exit code 8). Otherwise the exit code is that of the last start's first
failed rank; 128 + N if signal N killed it. SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks.
"""

import argparse
import sys
from pathlib import Path

from phi3v_dist.cli.app import run_script
from phi3v_dist.errors import ConfigError
from phi3v_dist.watch.supervise import Supervisor


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=5, metavar="N", help="at most (default 5)")
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="where the command trains: runs/<name>")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --: how the run is launched")
    arguments = parser.parse_args()
    if arguments.restarts < 0:
        raise ConfigError(f"--restarts is {arguments.restarts}: it must be at least 0")
    sys.exit(Supervisor(arguments.command, arguments.run, arguments.restarts).supervise())


def main() -> None:
    """Entry point of the installed command."""
    run_script(run_command)


if __name__ == "__main__":
    main()
