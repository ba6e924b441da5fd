"""Run folders → report.html in each.

python launch/report.py runs/quickstart
"""

import argparse
import sys
from pathlib import Path

from phi3v_dist.errors import Phi3VError
from phi3v_dist.observe.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write report.html into each run folder, from what the run left there."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, e.g. runs/quickstart")
    exit_code = 0
    for run in parser.parse_args().runs:
        try:
            print(write_report(run))
        except Phi3VError as error:
            print(error.report(), file=sys.stderr)
            exit_code = error.exit_code
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
