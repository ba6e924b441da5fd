"""Slurm's short form of many host names → the names.

What comes in: `node[01-03,7],login`. What goes out: node01, node02, node03, node7, login. Surprise: `scontrol show
hostnames` does the same, but inside a container there is no scontrol.
"""

import itertools
import math
import re

from phi3v_dist.errors import LaunchError

MAX_NAMES = 1 << 16  # more than Slurm itself takes; a slip must not fill the memory

_NAME = re.compile(r"(?:[^][,\s]|\[[^][\s]*\])+")  # commas within brackets do not end a name
_PART = re.compile(r"\[([^][]*)\]|([^][]+)")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def expand(text: str) -> list[str]:
    """In the order given, with numbers as wide as they are written. Later brackets of a name count faster.

    Raises:
        LaunchError: this is no list of hosts, or one of more than `MAX_NAMES`.
    """
    names = _NAME.findall(text)
    if re.sub(_NAME, "", text).strip(","):
        raise LaunchError(f"{text!r} is not a list of hosts such as node[01-03,7],login")
    hosts: list[str] = []
    for name in names:
        parts = [[plain] if plain else _choices(inside, text) for inside, plain in _PART.findall(name)]
        if len(hosts) + math.prod(len(part) for part in parts) > MAX_NAMES:
            raise LaunchError(f"{text!r} stands for more than {MAX_NAMES} hosts")
        hosts += ("".join(chosen) for chosen in itertools.product(*parts))
    return hosts


def _choices(inside: str, text: str) -> list[str]:
    """What stands in brackets, such as 01-03,7 → 01, 02, 03, 7."""
    numbers: list[str] = []
    for one in inside.split(","):
        found = _RANGE.fullmatch(one)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if found is None or last < first:
            raise LaunchError(f"{text!r} is not a list of hosts: {one!r} is not a number or a range such as 01-03")
        if last - first >= MAX_NAMES:
            raise LaunchError(f"{text!r} stands for more than {MAX_NAMES} hosts")
        numbers += (str(value).zfill(len(found[1])) for value in range(first, last + 1))
    return numbers
