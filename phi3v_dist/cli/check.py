"""Everything that can be wrong, before a node is allocated: settings, shards, batch arithmetic, labels.

python launch/check.py --config launch/configs/quickstart.yaml --world_size 64
python launch/check.py --config launch/configs/quickstart.yaml --show-labels 3
python launch/check.py --config launch/configs/quickstart.yaml --goodput-of runs/quickstart
python launch/check.py --config launch/configs/quickstart.yaml --goodput --step-s 4 --blocked-s 0.2 --write-s 30 \\
    --restart-s 240                                 what failures will cost, by nodes and time between checkpoints
python launch/check.py --config launch/configs/quickstart.yaml --nodes 2 --gpu h100-80
                                                    what a step will take there; --recommend OUT.yaml, --json
python launch/check.py --schema > settings.schema.json
                                                    settings that editors can complete and explain
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from phi3v_dist import config, versions
from phi3v_dist.cli.app import new_parser, plain_console, run_script
from phi3v_dist.config import Settings
from phi3v_dist.errors import ConfigError
from phi3v_dist.invocation import as_typed
from phi3v_dist.planner import options
from phi3v_dist.survive.goodput import Costs, costs_of, poisson, simulate
from phi3v_dist.survive.interval import about, choose

NUM_FAILURES, SEED = 1000, 0  # simulated for each number of nodes; more change the third digit
NODES, INTERVALS_MIN = (1, 8, 64), (5, 15, 60)
COSTS = {  # option and field of `Costs` → what it says
    "step_s": "seconds of an optimizer step",
    "blocked_s": "seconds for which a save holds training up",
    "write_s": "seconds that a save then takes in the background",
    "restart_s": "seconds from a failure to the next step: noticing, scheduling, importing, loading",
}
EXAMPLE_COSTS = "--step-s 4 --blocked-s 0.2 --write-s 30 --restart-s 240"


class PrintSchema(argparse.Action):
    """As `--version`: print and exit, whatever else is given or missing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(as_typed(json.dumps(config.json_schema(), indent=2, ensure_ascii=False)))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("check", __doc__)
    parser.add_argument("--config", required=True, help="YAML file, or a recipe that ships with phi3v-dist")
    parser.add_argument("--world_size", type=int, default=1, help="ranks that the job will have")
    parser.add_argument("--show-labels", type=int, metavar="N", help="print the first N samples, trained tokens marked")
    parser.add_argument(
        "--name", type=int, default=3, metavar="N", help="samples named of each kind cut or left out (default 3)"
    )
    parser.add_argument(
        "--schema", action=PrintSchema, nargs=0, help="print the JSON schema of the settings for editors"
    )
    goodput = parser.add_argument_group("goodput", "share of wall time that ends up in the weights, when things fail")
    goodput.add_argument("--goodput", action="store_true", help="only print the expected goodput; reads no data")
    goodput.add_argument("--goodput-of", type=Path, metavar="RUN", help="the same, with the costs that a run had")
    for name, what in COSTS.items():
        goodput.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="S", help=what)
    options.add_options(parser)
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    return parser


def run_command() -> None:
    arguments = build_parser().parse_intermixed_args()
    versions.require()  # before the imports that may fail for want of the right version, and take seconds
    if arguments.goodput or arguments.goodput_of:
        return show_goodput(config.load(arguments.config, arguments.overrides), costs_from(arguments))
    if options.is_asked(arguments):
        from phi3v_dist.cli.check_data import first_rows
        from phi3v_dist.planner import door

        return door.answer(arguments, first_rows)
    if given := [f"--{name.replace('_', '-')}" for name in COSTS if getattr(arguments, name) is not None]:
        raise ConfigError(f"{', '.join(given)}: only with --goodput or --goodput-of RUN")
    numbers = (("world_size", arguments.world_size, 1), ("show-labels", arguments.show_labels, 1))
    for option, value, least in (*numbers, ("name", arguments.name, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{option} is {value}: it must be at least {least}")

    from phi3v_dist import run
    from phi3v_dist.cli.check_data import name_outcomes, show_labels

    settings = config.load(arguments.config, arguments.overrides, lambda s: run.problems(s, arguments.world_size))
    train = run.Data.open(settings.data.train, settings)
    num_steps = run.count_steps(settings, run.plan(settings, train))
    for line in run.describe(settings, train, num_steps, arguments.world_size):
        print(line)
    name_outcomes("train", train, arguments.name)
    if settings.data.validation:
        name_outcomes("validation", run.Data.open(settings.data.validation, settings), arguments.name)
    if arguments.show_labels:
        show_labels(settings, train, arguments.show_labels)


def costs_from(arguments: argparse.Namespace) -> Costs:
    """What steps, saves and restarts take: as given, else as in the run that is named. Raises ConfigError."""
    given = {name: getattr(arguments, name) for name in COSTS if getattr(arguments, name) is not None}
    option = {name: f"--{name.replace('_', '-')}" for name in COSTS}
    wrong = [f"{option[name]} is {s}: it must be seconds, 0 or more" for name, s in given.items() if not 0 <= s < 1e9]
    if given.get("step_s") == 0:
        wrong.append("--step-s is 0: a step takes time")
    if arguments.goodput_of is None:
        missing = [f"  {option[name]}: {what}" for name, what in COSTS.items() if name not in given]
        if missing:
            lines = "\n".join(missing)
            wrong.append(
                f"--goodput needs to know what things take, and these are missing:\n{lines}\nGive them, for example "
                f"{EXAMPLE_COSTS}, or name a run that has them: --goodput-of runs/NAME"
            )
    if wrong:
        raise ConfigError(wrong)
    if arguments.goodput_of is None:
        return Costs(**given)
    return replace(costs_of(arguments.goodput_of), **given)


def show_goodput(settings: Settings, costs: Costs) -> None:
    """A table of nodes by time between checkpoints: goodput, and the minutes of a day that failures and saves take."""
    saves = settings.checkpoint
    console = plain_console()
    for what, seconds in (
        ("an optimizer step takes", costs.step_s),
        ("a save holds training up for", costs.blocked_s),
        ("and is written in", costs.write_s),
        ("from a failure to the next step", costs.restart_s),
        ("a node fails about every", saves.node_hours_between_failures * 3600.0),
    ):
        console.print(f"{what:>32}  {about(seconds)}")
    chosen = "chosen" if saves.every_steps is None else f"{saves.every_steps} steps"
    table = Table(
        title="goodput, and what a day loses, by time between checkpoints",
        caption=f"{NUM_FAILURES:,} failures simulated for each line, seed {SEED}", show_lines=True, min_width=76,
    )  # fmt: skip
    for column in ("nodes", "a failure\nevery", "this run\nsaves every", chosen, *(f"{m} min" for m in INTERVALS_MIN)):
        table.add_column(column, justify="right", style="bold" if column == chosen else None)
    for num_nodes in NODES:
        mean_s = saves.node_hours_between_failures * 3600 / num_nodes
        own_s = choose(costs.blocked_s, costs.write_s, mean_s).interval_s
        if saves.every_steps is not None:
            own_s = saves.every_steps * (costs.step_s + costs.between_s) + costs.blocked_s
        total_s = NUM_FAILURES * mean_s
        failures_s = poisson(mean_s, total_s, SEED)
        intervals_s = (own_s, *(60.0 * minutes for minutes in INTERVALS_MIN))
        found = [simulate(failures_s, costs, total_s, interval_s) for interval_s in intervals_s]
        cells = [f"{100 * each.frac:.2f} %\n{each.lost_min_per_day:.0f} min" for each in found]
        table.add_row(str(num_nodes), about(mean_s), about(own_s), *cells)
    console.print(table)


def main() -> None:
    """Entry point of `phi3v-check` and `launch/check.py`."""
    run_script(run_command, private=False)  # it writes indexes beside shards, and those are meant to be shared


if __name__ == "__main__":
    main()
