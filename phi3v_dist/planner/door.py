"""The planner's options of launch/check.py → its answer on the screen.

What comes in: parsed words. What goes out: lines for a person, or one JSON object. Surprise: neither shards nor weights
need be there. What is there is used: the lengths of the data give the row; without them it is one full of tokens.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

from phi3v_dist import config
from phi3v_dist.config import Settings
from phi3v_dist.data.plan import PlannedRow
from phi3v_dist.errors import ConfigError, Phi3VError
from phi3v_dist.planner.cost import Cluster
from phi3v_dist.planner.gpus import EFFICIENCY, gpu_named
from phi3v_dist.planner.row import RowShape, full_row, shape_of

NUM_STEPS_SEEN = 8  # of the plan, to find the row that stands for all
Rows = Callable[[Settings], tuple[list[PlannedRow], int | None]]  # first rows of the run, rows of an epoch


def answer(arguments: argparse.Namespace, rows: Rows) -> None:
    """Print the plan that was asked for.

    Raises:
        ConfigError: wrong words, or a configuration that cannot work.
    """
    if arguments.json:
        logging.disable(logging.INFO)  # a program reads what is printed
    settings = config.load(arguments.config, arguments.overrides)
    cluster = cluster_of(arguments)
    row, row_is, epoch_rows = typical_row(settings, rows)
    efficiency = EFFICIENCY if arguments.efficiency is None else arguments.efficiency
    from phi3v_dist.planner.plan import make_plan
    from phi3v_dist.planner.recommend import recommend, write_config

    changes: dict[str, object] = {}
    if arguments.recommend:
        plan, changes = recommend(settings, cluster, row, row_is, efficiency, epoch_rows)
        write_config(arguments.recommend, Path(arguments.config), arguments.overrides, changes)
    else:
        plan = make_plan(settings, cluster, row, row_is, efficiency, epoch_rows)
    if arguments.json:
        tree = json.loads(plan.to_json())
        print(json.dumps(tree | {"recommended": {key: str(value) for key, value in changes.items()}}))
        return
    if arguments.brief:
        print(plan.word)
        return
    for line in plan.lines():
        print(line)
    if arguments.recommend:
        words = " ".join(f"{key}={value}" for key, value in changes.items()) or "nothing changed"
        print(f"wrote    {arguments.recommend}: {words}")


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """Raises ConfigError for numbers and names that are none."""
    per_node = 8 if arguments.gpus_per_node is None else arguments.gpus_per_node
    wrong = [f"--{name} is {value}: it must be at least 1"
             for name, value in (("nodes", arguments.nodes), ("gpus-per-node", per_node)) if value < 1]  # fmt: skip
    if arguments.efficiency is not None and not 0 < arguments.efficiency <= 1:
        wrong.append(f"--efficiency is {arguments.efficiency}: it must be above 0 and at most 1")
    try:
        gpu = gpu_named(arguments.gpu or "h100-80")
    except ConfigError as error:
        wrong += error.problems
    if wrong:
        raise ConfigError(wrong)
    return Cluster(arguments.nodes, per_node, gpu)


def typical_row(settings: Settings, rows: Rows) -> tuple[RowShape, str, int | None]:
    """The row that stands for all, what it is, and rows of an epoch: the largest of the first steps, by what it takes.

    Where the data cannot be read yet: one document that fills the row.
    """
    length = settings.data.row_length_tokens
    try:
        first, epoch_rows = rows(settings)
    except Phi3VError as error:
        logging.info("the data is not known (%s): the plan is for rows full of tokens", error.problems[0][:100])
        return full_row(length, 0), f"a document of {length:,} tokens (the data was not read)", None
    words = f"as the longest of the first {len(first)} of the data, with the most crops of any"
    return shape_of(first), words, epoch_rows
