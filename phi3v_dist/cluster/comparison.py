"""Reports of several nodes, side by side → which nodes are not like the others.

What comes in: reports of one start. What goes out: entries. Surprise: there is no expected value anywhere. What most
nodes have is right, and where there is no majority a table says who has what, for people to choose.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median

from phi3v_dist.cluster.entries import ALIKE, COUNT, OK, PROBLEM, SHOWN, SPEED, WARNING, Entry, num_nodes, table
from phi3v_dist.cluster.report import Report

SLOW_FRAC, TOO_SLOW_FRAC = 0.7, 0.5  # of the median


def alike(own: Sequence[Report]) -> list[Entry]:
    """Nodes that differ from more than half of all; without such a majority, a table for people to choose from."""
    told = [report for report in own if report.facts]
    entries: list[Entry] = []
    for name in dict.fromkeys(name for report in told for name in report.facts):
        values = {report.host: report.facts.get(name, "unknown") for report in told}
        (most, count), *others = Counter(values.values()).most_common()
        if not others:
            continue
        if count * 2 <= len(told):
            text = "\n".join([f"{name} must be the same on all nodes, and found was", *table(values)])
            if name == "settings":
                text += _differing(told)
            entries.append(Entry(PROBLEM, ALIKE, tuple(values), text, is_common=True))
            continue
        differing: dict[str, list[str]] = defaultdict(list)
        for host, value in values.items():
            if value != most:
                differing[value].append(host)
        for value, its in differing.items():
            text = (
                f"{name} is {value}, but {most} on {count} of {num_nodes(len(told))}: install and copy the same there"
            )
            if name == "settings":
                text += _differing(told)
            entries.append(Entry(PROBLEM, ALIKE, tuple(its), text))
    if told and not entries:
        facts = told[0].facts
        shown = [f"{name} {facts[name]}" for name in ("torch", "deepspeed", "accelerator") if name in facts]
        entries.append(Entry(OK, ALIKE, tuple(report.host for report in told), ", ".join(shown)))
    return entries


def _differing(told: Sequence[Report]) -> str:
    """Which settings differ, with their values."""
    lines = []
    for key in dict.fromkeys(key for report in told for key in report.settings):
        values = {report.host: report.settings.get(key, "missing") for report in told}
        if len(set(values.values())) > 1:
            lines += [f"{key}:", *table(values)]
    return "".join(f"\n{line}" for line in lines[: 4 * SHOWN])


def gpu_counts(own: Sequence[Report]) -> list[Entry]:
    """A node without GPUs beside others that have some is unfit; one with fewer than most is only named."""
    counts = {report.host: report.num_gpus for report in own}
    if not any(counts.values()):
        return []
    none = tuple(host for host, count in counts.items() if not count)
    most, its = Counter(count for count in counts.values() if count).most_common(1)[0]
    entries = []
    if none:
        text = f"no GPU is seen here, and others see {most}: look for Xid errors in the kernel's log, or at its driver"
        entries.append(Entry(PROBLEM, COUNT, none, text))
    for fewer in sorted({count for count in counts.values() if 0 < count < most}):
        hosts = tuple(host for host, count in counts.items() if count == fewer)
        entries.append(Entry(WARNING, COUNT, hosts, f"{fewer} GPUs are seen here, and {most} on {num_nodes(its)}"))
    return entries


def speed(own: Sequence[Report]) -> list[Entry]:
    """Devices whose arithmetic is much slower than the others'; cores of a CPU are shared, so those are only named."""
    speeds = [each for report in own for each in report.speeds]
    if len(speeds) < 2:
        return []
    usual = median(speeds)
    entries, good = [], []
    for report in own:
        limit = SLOW_FRAC if report.has_gpus else TOO_SLOW_FRAC
        slow = [(each, number) for number, each in enumerate(report.speeds) if each < limit * usual]
        if not slow:
            good.append(report.host)
            continue
        worst, number = min(slow)
        what = f"GPU {number}" if report.has_gpus else "the CPU"
        level = PROBLEM if report.has_gpus and worst < TOO_SLOW_FRAC * usual else WARNING
        text = (
            f"{what} multiplies at {worst:.3g} TFLOP/s, {100 * worst / usual:.0f} % of the median {usual:.3g}: is it "
            "throttled, or shared with another job?"
        )
        entries.append(Entry(level, SPEED, (report.host,), text))
    if good:
        entries.append(Entry(OK, SPEED, tuple(good), f"median {usual:.3g} TFLOP/s"))
    return entries
