"""Run folders → report.html in each.

python launch/report.py runs/quickstart
"""

import argparse
from pathlib import Path

from phi3v_dist.cli import run_script
from phi3v_dist.errors import ConfigError
from phi3v_dist.observe.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, e.g. runs/quickstart")
    problems = []
    for run in parser.parse_args().runs:
        try:
            print(write_report(run))
        except ConfigError as error:  # the other folders get their page all the same
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def cli() -> None:
    """Entry point of the installed command."""
    run_script(main)


if __name__ == "__main__":
    cli()
