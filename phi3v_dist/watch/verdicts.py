"""What the watcher found → the few lines that a person reads at 3 a.m.

What comes in: actors that died, failed or hang. What goes out: a `Verdict`. Surprise: there is nothing to decide here;
everything was decided in blame.py and watcher.py, so that words can be changed without changing what happens.
"""

from collections.abc import Sequence
from pathlib import Path

from phi3v_dist.printable import printable
from phi3v_dist.watch.blame import Actor
from phi3v_dist.watch.checkpoint_names import goes_on
from phi3v_dist.watch.node_report import DIED, FAILED, HANG, Verdict
from phi3v_dist.watch.processes import STATES

NAMED = 4  # ranks in a line; of a thousand the rest is counted


def of_death(
    dead: Sequence[Actor], peaks_bytes: Sequence[int], machine_bytes: int, of_memory: bool, checkpoint: str | None
) -> Verdict:
    """machine_bytes: memory of the machine, 0 if not known. of_memory: the kernel has killed for want of memory
    meanwhile. checkpoint: the newest one, by name."""
    lines = []
    machine = f"; the machine has {_gib(machine_bytes)}" if machine_bytes else ""
    for actor, peak_bytes in list(zip(dead, peaks_bytes, strict=True))[:NAMED]:
        lines.append(f"died: {_who(actor)} is gone without a word, last in {_where(actor)}")
        lines.append(f"  it held up to {_gib(peak_bytes)} of memory{machine}")
    if of_memory:
        lines.append(
            "  killed by the kernel, probably memory: give the job more of it, or lower `data.num_workers` or "
            "`data.prefetch_rows`"
        )
    else:
        lines.append("  nothing says why: a signal from outside (scontrol, kill -9), or a crash in native code")
    return Verdict(DIED, [*lines, f"  all ranks are ended; {goes_on(checkpoint)}"], list(dead), of_memory)


def of_failure(actor: Actor, message: str) -> Verdict:
    said = [f"  {line}" for line in printable(message, keep="\n").splitlines()[:NAMED]]
    head = f"failed: {_who(actor)} ended with an error in {_where(actor)}"
    return Verdict(FAILED, [head, *said, "  all ranks are ended"], [actor])


def of_hang(
    guilty: Sequence[Actor], everyone: Sequence[Actor], absent: Sequence[str], stacks: Path, checkpoint: str | None
) -> Verdict:
    """absent: nodes that did not answer when asked where their ranks are. checkpoint: the newest one, by name."""
    lines = []
    for actor in guilty[:NAMED]:
        lines.append(
            f"hang: {_who(actor)} shows no life for {actor.silent_s:.0f} s in {_where(actor)} "
            f"(allowed: {actor.limit_s:.0f} s{', since it computes' if actor.progresses else ''}){_doing(actor)}"
        )
    if len(guilty) > NAMED:
        lines.append(f"hang: … and {len(guilty) - NAMED} more ranks in the same place")
    blamed = {(actor.rank, actor.lane) for actor in guilty}
    waiting = [actor for actor in everyone if (actor.rank, actor.lane) not in blamed and actor.overdue]
    if all(actor.waits for actor in guilty):
        lines.append(f"  {_deadlock(guilty, everyone)}")
    elif waiting:
        lines.append(f"  waiting for it: {_named(waiting)}")
    if absent:
        lines.append(f"  no answer from {', '.join(absent)}: see whether these nodes are up")
    lines += [f"  stacks of all ranks: {stacks.parent}/stacks-*.txt", f"  all ranks are ended; {goes_on(checkpoint)}"]
    return Verdict(HANG, lines, list(guilty))


def of_slow(actor: Actor) -> str:
    """A warning: this rank takes unusually long, but it works."""
    return (
        f"slow, not hung: {_who(actor)} shows no life for {actor.silent_s:.0f} s in {_where(actor)} (usual limit: "
        f"{actor.bound_s:.0f} s), but it computes{_doing(actor)}; it is ended after {actor.limit_s:.0f} s"
    )


def _deadlock(guilty: Sequence[Actor], everyone: Sequence[Actor]) -> str:
    """Every rank waits for the others."""
    places = {actor.where for actor in everyone if actor.lane == guilty[0].lane}
    if len(places) > 1:
        return f"all ranks wait for each other, at different places; they took different ways: {_named(everyone)}"
    return "all ranks wait for each other, at the same place: see the network between them (NCCL_DEBUG=INFO)"


def _named(actors: Sequence[Actor]) -> str:
    named = [f"rank {actor.rank} ({actor.where})" for actor in sorted(actors, key=lambda one: one.rank)[:NAMED]]
    more = f" and {len(actors) - NAMED} more" if len(actors) > NAMED else ""
    return ", ".join(named) + more


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def _who(actor: Actor) -> str:
    return f"rank {actor.rank} on {actor.host} (process {actor.pid})"


def _where(actor: Actor) -> str:
    return f"phase {actor.where}" + (f", at {actor.what}" if actor.what else "")


def _doing(actor: Actor) -> str:
    parts = [STATES.get(actor.state, ""), f"in {actor.place}" if actor.place else ""]
    if actor.kernel and actor.frozen:
        parts.append(f"kernel: {actor.kernel}")
    return "".join(f"; {part}" for part in parts if part)


def stack_text(actor: Actor, text: str) -> str:
    head = f"=== {_who(actor)}: {_where(actor)}, silent for {actor.silent_s:.0f} s ==="
    return f"{head}\n{text or '(no stack: the process is stopped, or deep in the kernel)'}\n"
