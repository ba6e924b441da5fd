"""What happened to a run, to whom, and what to do: from the files that it left.

python launch/diagnose.py runs/quickstart
python launch/diagnose.py runs/quickstart --json

The exit code is 0 whatever has happened to the run: scripts read `ending` (hang, died, failed, lost, stopped, finished,
running, unknown) in --json. It is 2 when RUN is not a run folder.
"""

import argparse
import json
from pathlib import Path

from rich.text import Text

from phi3v_dist.cli.app import plain_console, run_script
from phi3v_dist.watch.diagnose import diagnose


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, e.g. runs/quickstart")
    parser.add_argument("--json", action="store_true", help="plain data for scripts")
    arguments = parser.parse_args()
    diagnosis = diagnose(arguments.run)
    if arguments.json:
        print(json.dumps(diagnosis.facts, indent=2))
        return
    console = plain_console()
    console.print(Text(diagnosis.paragraph))
    if diagnosis.attempts:
        console.print()
        console.print(diagnosis.table())


def main() -> None:
    """Entry point of the installed command."""
    run_script(run_command)


if __name__ == "__main__":
    main()
