"""Run folders → report.html in each; of several also one page that compares them. Or one run, live in the terminal.

python launch/report.py runs/quickstart
python launch/report.py runs/first runs/second --out comparison.html
python launch/report.py --watch runs/quickstart
python launch/report.py --changes runs/quickstart/eval/step-000200 runs/quickstart/eval/step-000400

A run with answers also gets answers.html, a table of all of them, and changes.html: what changed between its two newest
evaluations. --changes names any two instead, by an evaluation's folder, or by a run for its newest one.
Default of --out: comparison.html beside the first run folder; of --changes, changes.html in the second folder.
--watch reads files alone, so it works on a login node; into a pipe it prints once and ends. The pages need no network
and fetch nothing.
"""

import argparse
from pathlib import Path

from phi3v_dist.cli.app import plain_console, run_script
from phi3v_dist.errors import ConfigError
from phi3v_dist.observe.answers import ANSWERS_NAME
from phi3v_dist.observe.changes import CHANGES_NAME
from phi3v_dist.observe.compare import write_comparison
from phi3v_dist.observe.live import watch
from phi3v_dist.observe.report import write_changes, write_report


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run folder, e.g. runs/quickstart")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of the page that compares runs or evaluations")
    parser.add_argument(
        "--changes", nargs=2, type=Path, metavar=("BEFORE", "NOW"), help="write what changed between two evaluations"
    )
    parser.add_argument("--watch", action="store_true", help="show one run in the terminal until it ends")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between looks of --watch (2)")
    arguments = parser.parse_args()
    if arguments.changes:
        if arguments.runs or arguments.watch:
            parser.error("--changes writes one page, of the two folders named after it: leave the rest out")
        before, now = arguments.changes
        print(write_changes(before, now, arguments.out or now / CHANGES_NAME))
        return
    if not arguments.runs:
        parser.error("name a run folder, e.g. runs/quickstart")
    if arguments.watch and (len(arguments.runs) > 1 or arguments.out):
        parser.error("--watch shows one run, and writes no page")
    if arguments.out and len(arguments.runs) < 2:
        parser.error("--out is the page that compares runs: name two or more; a run's own page is RUN/report.html")
    if not 0.1 <= arguments.every <= 3600:
        parser.error(f"--every is {arguments.every}: 0.1 to 3600 seconds")
    if arguments.watch:
        watch(arguments.runs[0], plain_console(), arguments.every)
        return
    written, problems = [], []
    for run in arguments.runs:
        try:
            print(write_report(run))
            for page in (run / name for name in (ANSWERS_NAME, CHANGES_NAME)):
                if page.exists():
                    print(page)
            written.append(run)
        except ConfigError as error:  # the other folders get their page all the same
            problems += error.problems
    if len(arguments.runs) > 1 and len(written) > 1:
        print(write_comparison(written, arguments.out))
    if problems:
        raise ConfigError(problems)


def main() -> None:
    """Entry point of the installed command."""
    run_script(run_command)


if __name__ == "__main__":
    main()
