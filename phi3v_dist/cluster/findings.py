"""The reports of all nodes → which nodes are fit to train on, which are not and why, and what is no node's fault.

What comes in: reports, and the names of the nodes that should have given one. What goes out: `Findings`, and lines for
people. Surprise: what is wrong on every node is wrong with none of them. A missing shard would otherwise cost the job
all its nodes, one start after the other.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from phi3v_dist.cluster.comparison import alike, gpu_counts, speed
from phi3v_dist.cluster.entries import NETWORK, OK, PROBLEM, REPORT, SUM, WARNING, Entry, folded, num_nodes
from phi3v_dist.cluster.links import links
from phi3v_dist.cluster.report import CONFIGURATION, DATA, LAUNCH, Report
from phi3v_dist.errors import ConfigError, DataError, LaunchError, Phi3VError
from phi3v_dist.printable import printable

ERRORS: dict[str, type[Phi3VError]] = {CONFIGURATION: ConfigError, DATA: DataError, LAUNCH: LaunchError}


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
    beside = [*alike(own), *gpu_counts(own), *speed(own), *links(own, len(hosts))]
    return Findings(token, hosts, (*_missing(silent, len(hosts)), *_by_themselves(own), *beside))


def _missing(silent: tuple[str, ...], num_hosts: int) -> list[Entry]:
    """One node of two may well be down; more than one, and half of all, have something in common."""
    if len(silent) < 2 or 2 * len(silent) < num_hosts:
        text = "no report in time: down, frozen, without Python, or only late"
        return [Entry(PROBLEM, REPORT, silent, text)] if silent else []
    text = (
        f"{len(silent)} of {num_nodes(num_hosts)} gave no report in time, so it is not their fault: does the job's "
        "environment start Python there, and do they write to the same file system? If they start slowly (many "
        "nodes load one environment), give them more time: PHI3V_EXAMINE_S"
    )
    return [Entry(PROBLEM, REPORT, silent, text, is_common=True)]


def _by_themselves(own: Sequence[Report]) -> list[Entry]:
    """The nodes' own checks; a check that fails on all of them is the fault of none.

    A wrong sum over all is the fault of a node whose own links gave wrong sums, too, if there is one.
    """
    is_explained = any(check.name == NETWORK and check.problems for report in own for check in report.checks)
    names = dict.fromkeys(check.name for report in own for check in report.checks)
    entries: list[Entry] = []
    for name in names:
        its = [(report.host, check) for report in own for check in report.checks if check.name == name]
        if name == SUM and is_explained:
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
