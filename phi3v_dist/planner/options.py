"""The planner's options on the command line, which are parsed before torch is loaded."""

import argparse
from pathlib import Path

from phi3v_dist.errors import ConfigError
from phi3v_dist.planner.gpus import EFFICIENCY, GPUS

OPTIONS = ("nodes", "gpus_per_node", "gpu", "recommend", "json", "efficiency", "brief")


def add_options(parser: argparse.ArgumentParser) -> None:
    planner = parser.add_argument_group("plan", "memory, time and network of a cluster, without a GPU or weights")
    planner.add_argument("--nodes", type=int, metavar="N", help="print the plan for so many nodes")
    planner.add_argument("--gpus-per-node", type=int, metavar="N", help="default 8")
    planner.add_argument("--gpu", metavar="NAME", help=f"default h100-80; known: {', '.join(GPUS)}")
    planner.add_argument("--efficiency", type=float, metavar="X", help=f"share of peak FLOPs; default {EFFICIENCY:g}")
    planner.add_argument("--recommend", type=Path, metavar="OUT", help="write a config with which it fits")
    planner.add_argument("--brief", action="store_true", help="print one line")
    planner.add_argument("--json", action="store_true", help="print the plan as one JSON object, and nothing else")


def is_asked(arguments: argparse.Namespace) -> bool:
    """Whether a plan is wanted. Raises ConfigError for its options without --nodes."""
    given = [f"--{name.replace('_', '-')}" for name in OPTIONS if getattr(arguments, name)]
    if arguments.nodes is None and given:
        raise ConfigError(f"{', '.join(given)}: only with --nodes N")
    return arguments.nodes is not None
