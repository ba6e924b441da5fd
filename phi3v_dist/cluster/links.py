"""Who reached whom in the network probe → whose link it is that does not work.

What comes in: reports of one start, with MB/s to neighbours. What goes out: entries. Surprise: where no two nodes reach
each other within the time, that is only a warning. A first start of NCCL from a busy file server looks just so.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from phi3v_dist.cluster.comparison import SLOW_FRAC, TOO_SLOW_FRAC
from phi3v_dist.cluster.entries import LINKS, NETWORK, OK, PROBLEM, WARNING, Entry, folded
from phi3v_dist.cluster.report import Check, Report


def links(own: Sequence[Report], num_hosts: int) -> list[Entry]:
    """Who fell silent, whose edges failed, whose edges are all slow."""
    entries = []
    lost = tuple(report.host for report in own if not report.is_complete)
    if lost:
        text = "fell silent after examining itself, in the network probe: crashed, frozen, cut off or ended early"
        entries.append(Entry(PROBLEM, NETWORK, lost, text, is_common=len(lost) > 1 and 2 * len(lost) >= len(own)))
    done = [report for report in own if report.is_complete and not _network(report).problems]
    if num_hosts < 2 or len(done) < 2:
        return entries
    known_bad = {report.host for report in own} - {report.host for report in done}
    edges = {report.host: {to: mb for to, mb in report.edges.items() if to not in known_bad} for report in done}
    failed = {frozenset((host, to)) for host, its in edges.items() for to, mb in its.items() if not mb}
    worked = {frozenset((host, to)) for host, its in edges.items() for to, mb in its.items() if mb} - failed
    silent = {host for host, its in edges.items() if not its and not any(host in edge for edge in failed)}
    late = tuple(report.host for report in done if report.host in silent and not _network(report).warnings)
    if late and len(late) < len(edges):
        text = "no neighbour of it was there in the network probe"
        entries.append(Entry(WARNING, LINKS, late, text))
    if failed and not worked:
        advice = "check that the network lets them (firewall, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, names that "
        advice += "resolve to 127.0.1.1)"
        if failed <= {frozenset((report.host, to)) for report in done for to in report.timed_out}:
            text = (
                f"no two nodes could be tried in time, so nothing is known of the network; if training hangs, {advice}"
            )
            return [*entries, Entry(WARNING, LINKS, tuple(edges), text)]
        text = f"no two nodes could talk to each other: {advice}"
        return [*entries, Entry(PROBLEM, LINKS, tuple(edges), text, is_common=True)]
    for host, others in _blamed(failed, worked):
        entries.append(Entry(PROBLEM, LINKS, (host,), f"did not answer {folded(others)}: its link, or its neighbour's"))
    return entries + _slow_edges({r.host: r for r in done}, worked, edges)


def _network(report: Report) -> Check:
    return next((check for check in report.checks if check.name == NETWORK), Check(NETWORK))


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
