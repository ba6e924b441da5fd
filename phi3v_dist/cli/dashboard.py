"""The W&B dashboard of these runs, as code, and offline runs for it.

python launch/dashboard.py --json > workspace.json          what would be sent; needs no network and no key
python launch/dashboard.py --push runs/quickstart           save the workspace in that run's project
python launch/dashboard.py --report --project phi3v-dist    save a report of all runs, for sharing
python launch/dashboard.py --sync runs/a runs/b             upload offline runs, checked before and counted after
"""

import argparse
import json
from pathlib import Path

from phi3v_dist.cli.app import run_script
from phi3v_dist.errors import ConfigError, DataError, Phi3VError
from phi3v_dist.observe import dashboard, wandb_sync


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--json", action="store_true", help="print the workspace")
    what.add_argument("--push", action="store_true", help="save the workspace")
    what.add_argument("--report", action="store_true", help="save a report with the same panels")
    what.add_argument("--sync", action="store_true", help="upload offline runs")
    parser.add_argument("--entity", help="the user or team; default: that of RUN, else the key's own")
    parser.add_argument("--project", help="default: that of RUN")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run folder, e.g. runs/quickstart")
    arguments = parser.parse_args()
    if arguments.sync:
        _sync(arguments)
        return
    dashboard.require_package()
    if arguments.json:
        if arguments.runs or arguments.entity or arguments.project:
            raise ConfigError("--json prints the same workspace for all runs and projects: it takes no other word")
        print(json.dumps(dashboard.spec(), indent=2))
        return
    entity, project = _target(arguments)
    print((dashboard.push if arguments.push else dashboard.share)(entity, project))


def _target(arguments: argparse.Namespace) -> tuple[str, str]:
    if len(arguments.runs) > 1:
        raise ConfigError(f"one RUN says which project it is for, {len(arguments.runs)} were given")
    entity, project = dashboard.place_of(arguments.runs[0]) if arguments.runs else (None, None)
    project = arguments.project or project
    if not project:
        raise ConfigError("which project? Name it with --project, or give a run folder of it")
    wandb_sync.require_server()
    return arguments.entity or entity or dashboard.own_entity(), project


def _sync(arguments: argparse.Namespace) -> None:
    """Each run folder for itself: what is wrong with one keeps no other from being uploaded."""
    if arguments.entity or arguments.project:
        raise ConfigError("--sync uploads a run to the project it was made for: it takes no --entity and no --project")
    if not arguments.runs:
        raise ConfigError("--sync needs at least one run folder, such as runs/quickstart")
    wandb_sync.require_server()
    problems: list[str] = []
    kind: type[Phi3VError] = DataError
    for run in dict.fromkeys(arguments.runs):
        try:
            problems += wandb_sync.sync(run, print)
        except Phi3VError as error:
            problems, kind = problems + error.problems, type(error)
    if problems:
        raise kind(problems)


def main() -> None:
    """Entry point of the installed command."""
    run_script(run_command)


if __name__ == "__main__":
    main()
