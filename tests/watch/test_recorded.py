"""On the intervals of a real run no slow node is ended, and each hang is found in the time that docs/faults.md says.

recorded_intervals.json holds what each kind of work took in a run of two ranks on two cores that trained, evaluated
and saved, with prompts of 30 to 5,000 tokens; record_intervals.py makes it again. Larger models take longer in all that
computes: SIZES multiply these intervals.
"""

import json
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import pytest
from simulated import COMPUTES, FOREVER_S, SLEEPS, SPINS, STOPPED, WAITS, Simulation

from phi3v_dist.watch import watcher
from phi3v_dist.watch.beat_file import Lane
from phi3v_dist.watch.limits import UNTIMED, Bounds, Limits

RECORDED = [tuple(row) for row in json.loads((Path(__file__).parent / "recorded_intervals.json").read_text())]
SIZES = (1, 30, 100)  # 100: an optimizer step of about two minutes
SLOWER = 20
BOUNDS = Bounds()
TICK_S = 2.0  # between looks of the watcher in trials of hours, as long as time that does not pass may take
FOUND_S = 2.0  # after its limit a hang is found: a look of the watcher, and what it needs to observe


# What a slower processor makes slower, and a larger model, too.
COMPUTED = ("copy", "build", "losses", "vision", "prefill", "decode", "forward", "backward", "optimizer", "snapshot")
# The rest computes as well, except where a rank waits for a disk, or for the thread that writes to it.
OF_A_DISK = ("settle", "write", "flush", "commit", "prune", "remove")
PHASES = defaultdict(lambda: "evaluate") | {
    kind: kind for kind in ("start", "load", "data", "forward", "backward", "optimizer", "snapshot", "score")
}
PHASES |= {kind: kind for kind in ("write", "flush", "commit")} | {"settle": "snapshot", "remove": "prune"}
KINDS = sorted({kind for _, _, kind, _, _ in RECORDED} - {"start", "load", "idle"})
OF_THE_WRITER = {kind for _, lane, kind, _, _ in RECORDED if lane == "save"}


def scaled(kind: str, seconds: float, size: int) -> float:
    return seconds * size if kind in COMPUTED else seconds


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("onset", [0.0, 0.5, 0.9], ids=["from the beginning", "from the middle", "at the end"])
def test_a_node_that_is_twenty_times_slower_is_never_ended(size, onset):
    """A rank that computes may take its slow limit; one that waits for a disk shows no progress and has its own."""
    num_warned = 0
    for _, rows in groupby(RECORDED, lambda row: row[0]):
        rank, limits = list(rows), Limits(BOUNDS)
        for number, (_, _, kind, work, recorded_s) in enumerate(rank):
            seconds = scaled(kind, recorded_s, size) * (SLOWER if number >= onset * len(rank) else 1)
            limit_s = limits.limit_s(kind, work)
            allowed_s = limit_s if kind in OF_A_DISK else limits.slow_limit_s(limit_s)
            assert seconds < allowed_s, (number, kind, work)
            num_warned += seconds > limit_s
            limits.add(kind, work, seconds)
    if size > 1 and onset > 0:
        assert num_warned > 0, "the trial is hard enough: without a look at progress it would be ended"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function: two ranks that have done what was recorded, `size` times as slowly."""

    def make(size: int) -> Simulation:
        simulation = Simulation(tmp_path, monkeypatch, 2, BOUNDS)
        for rank in simulation.ranks:
            for _, _, kind, work, seconds in RECORDED:
                rank.heart.limits.add(kind, work, scaled(kind, seconds, size))
        return simulation

    return make


def begin(kind: str, number: int, simulation: Simulation, step: int) -> Lane:
    """A rank begins this kind of work, with as much of it as there ever was."""
    heart, lane = simulation.ranks[number].heart, "save" if kind in OF_THE_WRITER else "train"
    simulation.on_writer(number, kind in OF_THE_WRITER)
    work = max((row[3] for row in RECORDED if row[2] == kind), default=0)
    heart.enter(lane, PHASES[kind], step, "", kind, work)
    return heart.lanes[lane]


def culprit(kind: str, behaviour: str, simulation: Simulation, share: float = FOREVER_S):
    """Rank 1 begins this kind of work and does `behaviour` for a share of the limit of one that makes progress."""

    def script(heart):
        lane = begin(kind, 1, simulation, step=6)
        yield behaviour, share * lane.slow_bound_s

    return script


def victim(kind: str, simulation: Simulation):
    """Rank 0 waits for rank 1 at the next collective operation, training or saving, until that one ends."""

    def script(heart):
        begin("commit" if kind in OF_THE_WRITER else "optimizer", 0, simulation, step=6)
        while simulation.ranks[1].alive:
            yield WAITS, 1.0

    return script


def promised_s(kind: str, size: int) -> float:
    """docs/faults.md: 30 s, or ten times what this kind of work has usually taken; here, at most has ever taken."""
    if kind in UNTIMED:
        return BOUNDS.first_s
    longest_s = max(scaled(kind, seconds, size) for _, _, one, _, seconds in RECORDED if one == kind)
    return max(BOUNDS.hang_s, BOUNDS.hang_factor * longest_s)


@pytest.mark.fault(11)
@pytest.mark.parametrize(("size", "behaviour"), [(1, SLEEPS), (1, STOPPED), (100, SLEEPS)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hang_in_any_kind_of_work_is_found_in_time(job, kind, behaviour, size):
    simulation = job(size)
    began_s = simulation.now_s
    tick_s = TICK_S if size > 1 or kind in UNTIMED else watcher.TICK_S
    report = simulation.run(victim(kind, simulation), culprit(kind, behaviour, simulation), tick_s=tick_s)
    assert report.status == "hang"
    assert [(actor.rank, actor.kind) for actor in report.verdict.blamed] == [(1, kind)]
    assert simulation.ranks[1].died_s - began_s < promised_s(kind, size) + 2 * tick_s + FOUND_S
    assert size > 1 or kind in UNTIMED or promised_s(kind, size) == 30


@pytest.mark.fault(12)
@pytest.mark.parametrize("behaviour", [SLEEPS, STOPPED])
def test_ranks_that_hang_together_are_found_in_time(job, behaviour):
    simulation = job(1)
    began_s = simulation.now_s

    def script(heart):
        begin("backward", simulation.number_of(heart), simulation, step=6)
        yield behaviour, FOREVER_S

    report = simulation.run(script, script)
    assert report.status == "hang" and [actor.rank for actor in report.verdict.blamed] == [0, 1]
    assert max(rank.died_s for rank in simulation.ranks) - began_s < promised_s("backward", 1) + FOUND_S


@pytest.mark.fault(13)
@pytest.mark.parametrize("behaviour", [WAITS, SPINS])
def test_ranks_that_wait_for_each_other_are_found_in_time(job, behaviour):
    """Also where they burn processor time, as NCCL's do: the second look, a tenth later, tells that from work."""
    simulation = job(1)
    began_s = simulation.now_s

    def script(number: int, kind: str):
        def go_there(heart):
            begin(kind, number, simulation, step=6)
            yield behaviour, FOREVER_S

        return go_there

    report = simulation.run(script(0, "forward"), script(1, "backward"))
    assert report.status == "hang" and "took different ways" in " ".join(report.verdict.lines)
    assert max(rank.died_s for rank in simulation.ranks) - began_s < 1.1 * BOUNDS.hang_s + FOUND_S


@pytest.mark.fault(11)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNTIMED])
def test_an_endless_loop_is_found_after_the_longer_limit(job, kind):
    simulation = job(1)
    began_s = simulation.now_s
    report = simulation.run(victim(kind, simulation), culprit(kind, COMPUTES, simulation), tick_s=TICK_S)
    assert report.status == "hang" and [actor.rank for actor in report.verdict.blamed] == [1]
    took_s, limit_s = simulation.ranks[1].died_s - began_s, BOUNDS.slow_factor * promised_s(kind, 1)
    assert limit_s < took_s < limit_s + 2 * TICK_S + FOUND_S


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_rank_that_suddenly_computes_much_longer_is_warned_of_and_not_ended(job, kind, capfd):
    """Nine times its limit, which is ninety times what is usual."""
    simulation = job(30)
    report = simulation.run(victim(kind, simulation), culprit(kind, COMPUTES, simulation, share=0.9), tick_s=TICK_S)
    assert report.status == "ended" and report.verdict is None
    warnings = [line for line in capfd.readouterr().err.splitlines() if "slow, not hung: rank 1 on n0" in line]
    assert 1 < len(warnings) < 6, "when it begins, and each time that it has become twice as long"
    assert f"({kind})" in warnings[0] or f"phase {kind}" in warnings[0]


@pytest.mark.parametrize("onset", [0.0, 0.5], ids=["from the beginning", "from the middle"])
def test_a_whole_run_with_one_slow_node_is_not_ended(tmp_path, monkeypatch, onset):
    """Both ranks do the same, in step: rank 0 waits where rank 1 takes twenty times longer."""
    rows = [row for row in RECORDED if row[:2] == (1, "train")]
    simulation = Simulation(tmp_path, monkeypatch, 2, BOUNDS)

    def script(number: int):
        def train(heart):
            for row, (_, _, kind, work, recorded_s) in enumerate(rows):
                heart.enter("train", PHASES[kind], row, "", kind, work)
                seconds, slower = scaled(kind, recorded_s, 30), SLOWER if row >= onset * len(rows) else 1
                active = SLEEPS if kind in OF_A_DISK else COMPUTES
                yield active, seconds * (slower if number == 1 else 1)
                yield WAITS, seconds * (slower - 1) if number == 0 else 0.0

        return train

    began_s = simulation.now_s
    report = simulation.run(script(0), script(1), tick_s=TICK_S)
    assert report.status == "ended" and report.verdict is None
    assert [rank.outcome for rank in report.ranks] == ["done", "done"] and simulation.now_s - began_s > 1800


@pytest.mark.fault(11)
def test_a_hang_is_found_in_time_although_another_rank_is_slow(tmp_path, monkeypatch):
    """Rank 2, behind it, was slow itself before. The long silence of rank 1 does not put off the look at rank 2."""
    simulation = Simulation(tmp_path, monkeypatch, 3, BOUNDS)
    for rank in simulation.ranks:
        for kind in ("forward", "backward", "optimizer"):
            rank.heart.limits.add(kind, 0, 0.1)
    hung_s = []

    def is_slow(heart):
        begin("forward", 1, simulation, step=6)
        yield COMPUTES, 290.0

    def was_slow(heart):
        begin("backward", 2, simulation, step=5)
        yield COMPUTES, 40.0
        for _ in range(65):
            begin("backward", 2, simulation, step=5)
            yield COMPUTES, 2.0
        hung_s.append(simulation.now_s)
        begin("backward", 2, simulation, step=5)
        yield SLEEPS, FOREVER_S

    report = simulation.run(victim("optimizer", simulation), is_slow, was_slow)
    assert report.status == "hang" and [actor.rank for actor in report.verdict.blamed] == [2]
    assert simulation.ranks[2].died_s - hung_s[0] < BOUNDS.hang_s + FOUND_S
