"""Everything that can be wrong, before a node is allocated: settings, shards, batch arithmetic, labels.

python launch/check.py --config launch/configs/quickstart.yaml --world_size 64
python launch/check.py --config launch/configs/quickstart.yaml --show-labels 3
python launch/check.py --config launch/configs/quickstart.yaml --goodput-of runs/quickstart
python launch/check.py --config launch/configs/quickstart.yaml --goodput --step-s 4 --blocked-s 0.2 --write-s 30 \\
    --restart-s 240                                 what failures will cost, by nodes and time between checkpoints
python launch/check.py --config launch/configs/quickstart.yaml --nodes 2 --gpu h100-80
                                                    what a step will take there; --recommend OUT.yaml, --json
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from phi3v_dist import config, run
from phi3v_dist.cli.app import plain_console, run_script
from phi3v_dist.config import Settings
from phi3v_dist.data import outcomes, preview
from phi3v_dist.data.order import Order
from phi3v_dist.data.plan import PlannedRow
from phi3v_dist.data.samples import BadSample
from phi3v_dist.errors import ConfigError
from phi3v_dist.planner import door
from phi3v_dist.survive.goodput import Costs, costs_of, poisson, simulate
from phi3v_dist.survive.interval import about, choose

ORDER_WINDOW = 1024  # positions looked up together
NUM_FAILURES, SEED = 1000, 0  # simulated for each number of nodes; more change the third digit
NODES, INTERVALS_MIN = (1, 8, 64), (5, 15, 60)
COSTS = {  # option and field of `Costs` → what it says
    "step_s": "seconds of an optimizer step",
    "blocked_s": "seconds for which a save holds training up",
    "write_s": "seconds that a save then takes in the background",
    "restart_s": "seconds from a failure to the next step: noticing, scheduling, importing, loading",
}
EXAMPLE_COSTS = "--step-s 4 --blocked-s 0.2 --write-s 30 --restart-s 240"


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--world_size", type=int, default=1, help="ranks that the job will have")
    parser.add_argument("--show-labels", type=int, metavar="N", help="print the first N samples, trained tokens marked")
    parser.add_argument(
        "--name", type=int, default=3, metavar="N", help="samples named of each kind cut or left out (default 3)"
    )
    goodput = parser.add_argument_group("goodput", "share of wall time that ends up in the weights, when things fail")
    goodput.add_argument("--goodput", action="store_true", help="only print the expected goodput; reads no data")
    goodput.add_argument("--goodput-of", type=Path, metavar="RUN", help="the same, with the costs that a run had")
    for name, what in COSTS.items():
        goodput.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="S", help=what)
    door.add_options(parser)
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.goodput or arguments.goodput_of:
        return show_goodput(config.load(arguments.config, arguments.overrides), costs_from(arguments))
    if door.is_asked(arguments):
        return door.answer(arguments, first_rows)
    if given := [f"--{name.replace('_', '-')}" for name in COSTS if getattr(arguments, name) is not None]:
        raise ConfigError(f"{', '.join(given)}: only with --goodput or --goodput-of RUN")
    numbers = (("world_size", arguments.world_size, 1), ("show-labels", arguments.show_labels, 1))
    for option, value, least in (*numbers, ("name", arguments.name, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{option} is {value}: it must be at least {least}")
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


def first_rows(settings: Settings) -> tuple[list[PlannedRow], int | None]:
    """Rows of the first steps as they will be trained, and how many an epoch has. Raises what `Data.open` does."""
    train = run.Data.open(settings.data.train, settings)
    steps = list(itertools.islice(run.plan(settings, train), door.NUM_STEPS_SEEN))
    rows = [row for step in steps for row in step.rows]
    tokens = sum(row.tokens for row in rows)
    usable = train.lengths.tokens[train.lengths.tokens <= settings.data.row_length_tokens]
    return rows, round(int(usable.sum()) * len(rows) / tokens) if tokens else None


def name_outcomes(side: str, data: run.Data, num_samples: int) -> None:
    """The first samples that were cut to fit, and those left out, with the reason."""
    policy = data.decoder.processor.fit_policy
    for outcome in [*outcomes.cut(data.lengths, policy), *outcomes.left_out(data.lengths, policy)]:
        print(f"\n{side}: {outcome}")
        for line in outcomes.names(outcome, data.table, data.lengths, num_samples):
            print(f"  {line}")
        if (more := len(outcome.sample_ids) - num_samples) > 0:
            print(f"  … and {more:,} more (--name {len(outcome.sample_ids)} names all)")


def show_labels(settings: Settings, train: run.Data, num_samples: int) -> None:
    """The first training samples of the run's order as they will be trained."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # words in any script
    console = plain_console(soft_wrap=True)
    lengths, processor = train.lengths, train.decoder.processor
    order = Order(train.table, settings.run.seed)
    fits = (lengths.tokens > 0) & (lengths.tokens <= settings.data.row_length_tokens)
    windows = (range(begin, begin + ORDER_WINDOW) for begin in range(0, order.num_samples, ORDER_WINDOW))
    stream = (i for window in windows for i in order.sample_ids(window.start, window.stop).tolist() if fits[i])
    ids = list(itertools.islice(stream, min(num_samples, int(fits.sum()))))
    console.print(Text(f"\nfirst {len(ids)} of {fits.sum():,} training samples: ") + preview.LEGEND)
    trained = tokens = 0
    for number, sample_id in enumerate(ids, start=1):
        console.rule(Text(f"{number}  {train.table.sample_name(sample_id)}"), align="left")
        try:
            example = train.decoder.example(sample_id, int(lengths.tokens[sample_id]))
        except BadSample as error:
            console.print(Text(f"cannot be used, and would be skipped in training: {error.reason}"))
            continue
        num_trained = int((example.labels != preview.IGNORE).sum())
        trained, tokens = trained + num_trained, tokens + len(example.labels)
        console.print(preview.render(example, processor.tokenizer))
        console.print(preview.trained_share(num_trained, len(example.labels)))
    console.rule()
    console.print(f"shown:    {preview.trained_share(trained, tokens)}")
    all_trained, all_tokens = int(lengths.label_tokens[fits].sum()), int(lengths.tokens[fits].sum())
    console.print(f"all data: {preview.trained_share(all_trained, all_tokens)}")


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
    """Entry point of the installed command."""
    run_script(run_command, private=False)  # it writes indexes beside shards, and those are meant to be shared


if __name__ == "__main__":
    main()
