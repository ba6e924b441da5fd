"""Who is to blame, case by case: who hangs, who only waits, and when nobody hangs at all."""

from dataclasses import replace

import pytest

from phi3v_dist.watch.blame import SAVE, TRAIN, Actor, judge
from phi3v_dist.watch.node_report import left_early

BOUND_S = 30.0


def actor(rank: int, phase: str, position: tuple[int, int], silent_s: float, **facts) -> Actor:
    known = {"host": f"n{rank}", "pid": 1, "lane": TRAIN, "step": position[0], "what": "", "bound_s": BOUND_S}
    return Actor(rank=rank, phase=phase, position=position, silent_s=float(silent_s), **known | facts)


def writer(rank: int, phase: str, position: tuple[int, int], silent_s: float, **facts) -> Actor:
    return actor(rank, phase, position, silent_s, lane=SAVE, **facts)


@pytest.mark.parametrize(("state", "limit_s"), [("R", 300.0), ("D", 300.0), ("T", BOUND_S), ("t", BOUND_S)])
def test_a_stopped_rank_has_the_short_limit_although_it_was_seen_to_progress(state: str, limit_s: float) -> None:
    one = actor(0, "forward", (5, 1), 100, state=state, progresses=True, slow_bound_s=300.0)
    assert one.limit_s == limit_s and one.overdue == (limit_s == BOUND_S)


def waiting(rank: int, phase: str, position: tuple[int, int], silent_s: float, **facts) -> Actor:
    return actor(rank, phase, position, silent_s, waits=True, **facts)


CASES = {
    # name: (actors, ranks to blame)
    "a collective operation, the last rank is on its way": (
        [waiting(0, "forward", (5, 2), 40), actor(1, "data", (5, 1), 40, bound_s=300.0)], []),
    "a collective operation, the last rank has just come": (
        [waiting(0, "forward", (5, 2), 40), waiting(1, "forward", (5, 2), 1)], []),
    "a collective operation, the last rank hangs on its way": (
        [waiting(0, "forward", (5, 2), 400), actor(1, "data", (5, 1), 301, bound_s=300.0)], [1]),
    "evaluation, one rank has more batches than the others": (
        [waiting(0, "evaluate", (8, 7), 40), waiting(1, "evaluate", (8, 7), 40), actor(2, "evaluate", (8, 9), 3)], []),
    "evaluation, most ranks have no batch at all": (
        [waiting(0, "optimizer", (8, 5), 90), waiting(1, "snapshot", (8, 6), 90), actor(2, "evaluate", (8, 9), 3)],
        []),
    "evaluation, the rank with more batches hangs": (
        [waiting(0, "evaluate", (8, 7), 90), waiting(1, "evaluate", (8, 7), 90), actor(2, "evaluate", (8, 9), 31)],
        [2]),
    "evaluation, the rank with more batches hangs while others wait for the scores": (
        [waiting(0, "score", (8, 8), 90, bound_s=600.0), actor(1, "evaluate", (8, 9), 31)], [1]),
    "all ranks in one collective operation, for too long": (
        [waiting(rank, "backward", (6, 3), 31) for rank in range(3)], [0, 1, 2]),
    "all ranks in a collective operation, at different places": (
        [waiting(0, "forward", (5, 2), 31), waiting(1, "evaluate", (5, 3), 31)], [0]),
    "all ranks wait, and one of them not too long yet": (
        [waiting(0, "forward", (5, 2), 31), waiting(1, "forward", (5, 3), 20)], [0]),
    "training waits for the writer, who writes": (
        [actor(0, "snapshot", (8, 5), 40), writer(0, "write", (4, 3), 2)], []),
    "training waits for the writer, who hangs": (
        [actor(0, "snapshot", (8, 5), 40), writer(0, "write", (4, 3), 40), actor(1, "forward", (9, 1), 1)], [0]),
    "a writer waits for a slower one": (
        [writer(0, "commit", (4, 3), 40, waits=True), writer(1, "write", (4, 2), 5), actor(1, "data", (9, 1), 1)],
        []),
    "a writer waits for one that hangs": (
        [writer(0, "commit", (4, 3), 40, waits=True), writer(1, "write", (4, 2), 35), actor(1, "data", (9, 1), 1)],
        [1]),
    "a writer at work is no reason to stand still": (
        [actor(0, "forward", (8, 2), 40), writer(0, "write", (4, 3), 2)], [0]),
    "a frozen process before those that wait": (
        [waiting(0, "forward", (5, 2), 31), actor(1, "forward", (5, 2), 31, state="T")], [1]),
    "a frozen process that seems to wait, and others at work": (
        [waiting(0, "forward", (5, 2), 31, state="T"), actor(1, "forward", (5, 2), 3)], [0]),
    "nobody is silent for too long": (
        [actor(0, "forward", (5, 2), 29), waiting(1, "forward", (5, 2), 29)], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_right_ranks_are_blamed(name):
    actors, ranks = CASES[name]
    assert sorted(one.rank for one in judge(actors)) == ranks
    assert sorted(one.rank for one in judge(actors[::-1])) == ranks, "whatever the order"


def test_of_two_lanes_the_one_that_hangs_is_named():
    stuck = writer(0, "write", (4, 3), 40)
    assert judge([actor(0, "snapshot", (8, 5), 40), stuck]) == [stuck]


def test_a_frozen_process_is_named_with_all_that_it_has_in_hand():
    frozen = actor(1, "forward", (5, 2), 31, state="T")
    idle_writer = writer(1, "write", (4, 2), 3, state="T")
    assert judge([waiting(0, "forward", (5, 2), 31), frozen, idle_writer]) == [frozen, idle_writer]
    assert judge([replace(frozen, silent_s=3.0), idle_writer]) == []


def test_the_step_of_a_load_is_its_checkpoints_and_a_stop_in_it_is_one_before_the_first_step():
    loads = actor(0, "load", (4, 1), 1)
    assert loads.where == "load, checkpoint of step 4" and left_early("stopped", loads.where)
    assert actor(0, "forward", (4, 1), 1).where == "forward, step 4" and not left_early("stopped", "forward, step 4")
