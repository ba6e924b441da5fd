"""Variables of the launcher → numbers, or an error that names the variable; and this node's name.

What comes in: an environment. What goes out: whole numbers and a name. Surprise: a batch script that sets them by hand
may leave anything in them, so that a traceback of `int` would be what a person sees first.
"""

import os
import socket
from collections.abc import Mapping

from phi3v_dist.errors import LaunchError


def number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """From 0. Raises LaunchError when it is not a number, or is missing and has no default."""
    value = env.get(name, "" if default is None else str(default))
    if not (value.isascii() and value.isdecimal()):
        raise LaunchError(
            f"{name} is {value!r} although this process was started as one of several: check the launcher"
            if default is None
            else f"{name} is {value!r}, which is not a whole number: check the launcher, or unset it"
        )
    return int(value)


def host_name(env: Mapping[str, str] = os.environ) -> str:
    """This node, as Slurm calls it: its own name may be longer, or quite another in a cloud, and Slurm refuses that."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()
