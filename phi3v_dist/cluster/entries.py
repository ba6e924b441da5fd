"""What was found on nodes, in one line each, and how their names are written.

What comes in: names of nodes, values by node. What goes out: `Entry`s and words for people. Surprise: one line may
stand for hundreds of nodes, so that the table of a job stays as short as that of a machine.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from phi3v_dist.cluster.report import LAUNCH

OK, WARNING, PROBLEM = "ok", "warning", "PROBLEM"
SHOWN = 6  # node names, values or settings in one line
# Checks of every node that are judged together, and what only a look at all nodes can tell.
NETWORK, SUM, ALIKE, COUNT, SPEED, LINKS, REPORT = (
    "network",
    "sum",
    "alike",
    "number of GPUs",
    "speed",
    "links",
    "report",
)


@dataclass(frozen=True)
class Entry:
    """One thing that was looked at, on the nodes of which it holds. is_common: it is the fault of none of them."""

    level: str
    check: str
    hosts: tuple[str, ...]
    text: str
    kind: str = LAUNCH
    is_common: bool = False


def num_nodes(count: int) -> str:
    return f"{count} node{'s' if count != 1 else ''}"


def folded(hosts: Iterable[str]) -> str:
    """`node[1-3,7], login`; long lists end in `…`."""
    numbers: dict[tuple[str, int], list[int]] = defaultdict(list)  # by prefix and number of digits
    words = []
    parts = [(host, re.fullmatch(r"(.*?)(\d{1,9})", host, re.ASCII)) for host in sorted(set(hosts))]
    filled = {match[1] for _, match in parts if match and match[2].startswith("0")}
    for host, match in parts:
        if match:
            numbers[match[1], len(match[2]) if match[1] in filled else 0].append(int(match[2]))
        else:
            words.append(host)
    for (prefix, width), its in sorted(numbers.items()):
        ranges: list[list[int]] = []
        for number in sorted(its):
            if ranges and number == ranges[-1][-1] + 1:
                ranges[-1][1:] = [number]
            else:
                ranges.append([number])
        texts = ["-".join(f"{number:0{width}d}" for number in each) for each in ranges[:SHOWN]]
        more = ["…"] if len(ranges) > SHOWN else []
        one = len(ranges) == 1 and len(ranges[0]) == 1
        words.append(f"{prefix}{texts[0]}" if one else f"{prefix}[{','.join(texts + more)}]")
    return ", ".join(words[:SHOWN]) + (", …" if len(words) > SHOWN else "")


def table(values: dict[str, str]) -> list[str]:
    """One line per value, the most frequent first."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for host, value in values.items():
        hosts[value].append(host)
    ordered = sorted(hosts.items(), key=lambda entry: -len(entry[1]))
    lines = [f"  {value} on {num_nodes(len(its))}: {folded(its)}" for value, its in ordered[:SHOWN]]
    return lines + ([f"  and {len(ordered) - SHOWN} other values"] if len(ordered) > SHOWN else [])
