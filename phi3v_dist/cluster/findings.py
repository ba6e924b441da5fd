"""The reports of all nodes → which nodes are fit to train on, which are not and why, and what is no node's fault.

What comes in: reports, and the names of the nodes that should have given one. What goes out: `Findings`, and lines for
people. Surprise: what is wrong on every node is wrong with none of them. A missing shard would otherwise cost the job
all its nodes, one start after the other.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from phi3v_dist.cluster.report import CONFIGURATION, DATA, LAUNCH, Report
from phi3v_dist.errors import ConfigError, DataError, LaunchError, Phi3VError
from phi3v_dist.printable import printable

OK, WARNING, PROBLEM = "ok", "warning", "PROBLEM"
ERRORS: dict[str, type[Phi3VError]] = {CONFIGURATION: ConfigError, DATA: DataError, LAUNCH: LaunchError}
SLOW_FRAC, TOO_SLOW_FRAC = 0.7, 0.5  # of the median
SHOWN = 6  # node names, values or settings in one line
ALIKE, SPEED, NETWORK, SUM, LINKS, REPORT = (
    "alike",
    "speed",
    "network",
    "sum",
    "links",
    "report",
)  # what only a look at all nodes can tell


@dataclass(frozen=True)
class Entry:
    """One thing that was looked at, on the nodes of which it holds. is_common: it is the fault of none of them."""

    level: str
    check: str
    hosts: tuple[str, ...]
    text: str
    kind: str = LAUNCH
    is_common: bool = False


@dataclass(frozen=True)
class Findings:
    """What the preflight of one start came to."""

    token: str
    hosts: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def bad(self) -> dict[str, list[str]]:
        """Node → the reasons not to use it."""
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.level == PROBLEM and not entry.is_common:
                for host in entry.hosts:
                    found.setdefault(host, []).append(f"{entry.check}: {entry.text}")
        return {host: found[host] for host in self.hosts if host in found}

    @property
    def good(self) -> list[str]:
        bad = self.bad
        return [host for host in self.hosts if host not in bad]

    @property
    def common(self) -> list[Entry]:
        """Problems that no choice of nodes would mend."""
        return [entry for entry in self.entries if entry.level == PROBLEM and entry.is_common]

    @property
    def warnings(self) -> list[str]:
        return [f"{folded(e.hosts)}: {e.check}: {e.text}" for e in self.entries if e.level == WARNING]

    @property
    def exit_code(self) -> int:
        """0; that of a common problem, settings before data before launch; or that of a launch with bad nodes."""
        codes = [ERRORS[entry.kind].exit_code for entry in self.common]
        return min(codes, default=LaunchError.exit_code if self.bad else 0)

    def lines(self) -> list[str]:
        """For people: the worst last, where the eye is."""
        order = (OK, WARNING, PROBLEM)
        entries = sorted(self.entries, key=lambda entry: (order.index(entry.level), entry.is_common))
        width = max([len(entry.check) for entry in entries], default=0)
        lines = []
        for entry in entries:
            where = "" if set(entry.hosts) == set(self.hosts) else f"{folded(entry.hosts)}: "
            text = printable(f"{where}{entry.text}", keep="\n").replace("\n", "\n" + " " * (width + 13))
            lines.append(f"  {entry.level:8} {entry.check:{width}}  {text}")
        good, bad = self.good, self.bad
        ending = f"{num_nodes(len(good))} of {len(self.hosts)} fit to train on"
        if bad:
            ending += f"; not {folded(bad)}"
        if self.common:
            ending = "no choice of nodes mends what is wrong: change the settings, the data or the launch"
        return [*lines, printable(ending)]


def summarize(reports: Iterable[Report], hosts: Sequence[str], token: str) -> Findings:
    """Judge the nodes of one start by what they reported.

    Args:
        reports: any; those of other starts and other nodes are passed over.
        hosts: that should have reported.
    """
    hosts = tuple(dict.fromkeys(hosts))
    own = [report for report in reports if report.token == token and report.host in set(hosts)]
    if not own:
        text = (
            f"none of {num_nodes(len(hosts))} reported: can the run folder be written, and does the job's environment "
            "start Python on the nodes? See the log of the preflight"
        )
        return Findings(token, hosts, (Entry(PROBLEM, REPORT, hosts, text, is_common=True),))
    silent = tuple(host for host in hosts if host not in {report.host for report in own})
    entries = [*_missing(silent), *_by_themselves(own), *_alike(own), *_speed(own), *_network(own, len(hosts))]
    return Findings(token, hosts, tuple(entries))


def _missing(silent: tuple[str, ...]) -> list[Entry]:
    return [Entry(PROBLEM, REPORT, silent, "no report in time: down, frozen, or without Python")] if silent else []


def _by_themselves(own: Sequence[Report]) -> list[Entry]:
    """The nodes' own checks; a check that fails on all of them is the fault of none.

    A sum over all that broke off is the fault of the node that fell silent in it, if one did.
    """
    names = dict.fromkeys(check.name for report in own for check in report.checks)
    entries: list[Entry] = []
    for name in names:
        its = [(report.host, check) for report in own for check in report.checks if check.name == name]
        if name == SUM and not all(report.is_complete for report in own):
            its = [(host, replace(check, problems=(), warnings=check.problems)) for host, check in its]
        failed = [(host, check) for host, check in its if check.problems]
        on_all = len(failed) == len(its) == len(own) and (len(own) > 1 or failed[0][1].kind != LAUNCH)
        if on_all:
            host, check = failed[0]
            text = "\n".join(check.problems) + (f"\n(so on {host}; all nodes have such a problem)" * (len(own) > 1))
            entries.append(Entry(PROBLEM, name, tuple(h for h, _ in failed), text, check.kind, is_common=True))
        found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for host, check in its:
            for text in () if on_all else check.problems:
                found[PROBLEM, text, check.kind].append(host)
            for text in check.warnings:
                found[WARNING, text, LAUNCH].append(host)
        entries += [Entry(level, name, tuple(on), text, kind) for (level, text, kind), on in found.items()]
        good = [(host, check.detail) for host, check in its if not check.problems and not check.warnings]
        if good:
            text = good[0][1]
            if any(detail != text for _, detail in good):
                text += f" on {good[0][0]}, and the like on the others"
            entries.append(Entry(OK, name, tuple(host for host, _ in good), text))
    return entries


def _alike(own: Sequence[Report]) -> list[Entry]:
    """Nodes that differ from more than half of all; without such a majority, a table for people to choose from."""
    told = [report for report in own if report.facts]
    entries: list[Entry] = []
    for name in dict.fromkeys(name for report in told for name in report.facts):
        values = {report.host: report.facts.get(name, "unknown") for report in told}
        (most, count), *others = Counter(values.values()).most_common()
        if not others:
            continue
        if count * 2 <= len(told):
            text = "\n".join([f"{name} must be the same on all nodes, and found was", *_table(values)])
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
            lines += [f"{key}:", *_table(values)]
    return "".join(f"\n{line}" for line in lines[: 4 * SHOWN])


def _table(values: dict[str, str]) -> list[str]:
    """One line per value, the most frequent first."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for host, value in values.items():
        hosts[value].append(host)
    ordered = sorted(hosts.items(), key=lambda entry: -len(entry[1]))
    lines = [f"  {value} on {num_nodes(len(its))}: {folded(its)}" for value, its in ordered[:SHOWN]]
    return lines + ([f"  and {len(ordered) - SHOWN} other values"] if len(ordered) > SHOWN else [])


def _speed(own: Sequence[Report]) -> list[Entry]:
    """Devices whose arithmetic is much slower than the others'; cores of a CPU are shared, so those are only named."""
    speeds = [speed for report in own for speed in report.speeds]
    if len(speeds) < 2:
        return []
    usual = median(speeds)
    entries, good = [], []
    for report in own:
        limit = SLOW_FRAC if report.has_gpus else TOO_SLOW_FRAC
        slow = [(speed, number) for number, speed in enumerate(report.speeds) if speed < limit * usual]
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


def _network(own: Sequence[Report], num_hosts: int) -> list[Entry]:
    """Who fell silent, whose edges failed, whose edges are all slow."""
    entries = []
    lost = tuple(report.host for report in own if not report.is_complete)
    if lost:
        text = "fell silent after it had examined itself, in the network probe: crashed, frozen or cut off"
        entries.append(Entry(PROBLEM, NETWORK, lost, text, is_common=len(lost) == len(own) > 1))
    done = [report for report in own if report.is_complete and not _failed_network(report)]
    if num_hosts < 2 or len(done) < 2:
        return entries
    known_bad = {report.host for report in own} - {report.host for report in done}
    edges = {report.host: {to: mb for to, mb in report.edges.items() if to not in known_bad} for report in done}
    failed = {frozenset((host, to)) for host, its in edges.items() for to, mb in its.items() if not mb}
    worked = {frozenset((host, to)) for host, its in edges.items() for to, mb in its.items() if mb} - failed
    late = tuple(host for host, its in edges.items() if not its and not any(host in edge for edge in failed))
    if late and len(late) < len(edges):
        text = "no neighbour of it was there in the network probe: it came too late, or its neighbours are bad"
        entries.append(Entry(WARNING, LINKS, late, text))
    if failed and not worked:
        hosts = tuple(edges)
        text = (
            "no two nodes could talk to each other: check that the network lets them (firewall, NCCL_SOCKET_IFNAME or "
            "GLOO_SOCKET_IFNAME, names that resolve to 127.0.1.1)"
        )
        return [*entries, Entry(PROBLEM, LINKS, hosts, text, is_common=True)]
    for host, others in _blamed(failed, worked):
        entries.append(Entry(PROBLEM, LINKS, (host,), f"did not answer {folded(others)}: its link, or its neighbour's"))
    return entries + _slow_edges({r.host: r for r in done}, worked, edges)


def _failed_network(report: Report) -> bool:
    return any(check.name == NETWORK and check.problems for check in report.checks)


def _blamed(failed: set[frozenset[str]], worked: set[frozenset[str]]) -> list[tuple[str, list[str]]]:
    """The fewest nodes that explain all failed edges, roughly: those that reached nobody, and most edges, first."""
    reached = {host for edge in worked for host in edge}
    left, found = set(failed), []
    while left:
        counts = Counter(host for edge in left for host in sorted(edge))
        worst = max(counts, key=lambda host: (host not in reached, counts[host], host))
        its = {edge for edge in left if worst in edge}
        found.append((worst, sorted(host for edge in its for host in edge - {worst})))
        left -= its
    return found


def _slow_edges(
    reports: dict[str, Report], worked: set[frozenset[str]], edges: dict[str, dict[str, float]]
) -> list[Entry]:
    """A node is as fast as the best of its edges: a slow neighbour cannot make all of them slow."""
    best = {
        host: max((mb for to, mb in its.items() if {host, to} in worked), default=0.0) for host, its in edges.items()
    }
    best = {host: speed for host, speed in best.items() if speed}
    if not best:
        return []
    usual = median(best.values())
    entries, good = [], []
    for host, speed in best.items():
        if speed >= (SLOW_FRAC if reports[host].has_gpus else TOO_SLOW_FRAC) * usual:
            good.append(host)
            continue
        level = PROBLEM if reports[host].has_gpus and speed < TOO_SLOW_FRAC * usual else WARNING
        text = f"{speed:,.0f} MB/s on the best of its links, {100 * speed / usual:.0f} % of the median {usual:,.0f}"
        entries.append(Entry(level, LINKS, (host,), text))
    return [*entries, Entry(OK, LINKS, tuple(good), f"median {usual:,.0f} MB/s between neighbours")]


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
