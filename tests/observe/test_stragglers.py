"""Own times of all ranks → who is slow, in what, and when that is said."""

import logging

import numpy as np
import pytest

from phi3v_dist.observe.stragglers import MOST_NODES, PATIENCE, Stragglers

STEP_S = 1.0
STEPS = (11, 20)


def watch(num_ranks: int) -> Stragglers:
    hosts = [f"node-{rank}" for rank in range(num_ranks)]
    stragglers = Stragglers(hosts, [host.replace("-", "_") for host in hosts])
    stragglers.look((1, 10), np.zeros(num_ranks), np.zeros(num_ranks), STEP_S)  # the first window names nobody
    return stragglers


def look(stragglers: Stragglers, compute_s: list[float], data_s: list[float] | None = None) -> dict[str, float]:
    return stragglers.look(STEPS, np.array(data_s or [0.0] * len(compute_s)), np.array(compute_s), STEP_S)


def test_scores_are_the_median_ranks_own_time_over_a_ranks_own():
    row = look(watch(4), [0.4, 0.5, 0.3, 0.6], [0.1, 0.0, 0.2, 0.2])
    assert row["health/straggler_ratio"] == pytest.approx(0.8 / 0.5)
    assert row["health/straggler_score_min"] == pytest.approx(0.5 / 0.8)
    assert (row["health/slowest_rank"], row["health/slow_ranks"]) == (3, 1)
    assert row["node/node_3/own_s"] == pytest.approx(0.8) and row["node/node_0/own_s"] == pytest.approx(0.5)


@pytest.mark.parametrize(("data_s", "what"), [([0.0, 0.4], "loading data"), ([0.4, 0.4], "computing")])
def test_a_rank_that_is_a_little_slow_is_named_when_it_stays_so_and_with_what_it_is_slow_in(caplog, data_s, what):
    stragglers = watch(2)
    compute_s = [0.9, 1.3 - data_s[1] + data_s[0]] if what == "computing" else [0.9, 0.85]
    for said in [0] * (PATIENCE - 1) + [1, 1]:
        row = look(stragglers, compute_s, data_s)
        assert row["health/slow_ranks"] == 1 and 0.7 < row["health/straggler_score_min"] < 0.85
        assert len(caplog.records) == said
    assert f"rank 1 on node-1 is slow in {what}" in caplog.text and "(steps 11 to 20)" in caplog.text


@pytest.mark.fault(14)
def test_it_is_said_again_only_when_the_rank_kept_up_in_between(caplog):
    stragglers = watch(4)
    with caplog.at_level(logging.WARNING):
        for slow_s, said in ((0.9, 1), (0.9, 1), (0.5, 1), (0.9, 2)):
            assert look(stragglers, [0.5, 0.5, 0.5, slow_s])["health/straggler_ratio"] == pytest.approx(slow_s / 0.5)
            assert len(caplog.records) == said
    assert "rank 3 on node-3 is slow" in caplog.text


@pytest.mark.parametrize(
    "own_s",
    [[0.5, 0.52, 0.55, 0.56], [0.01, 0.01, 0.01, 0.04], [0.05, 0.05, 0.05, 0.12]],
    ids=["a little slower", "in a step of which nobody works", "less than a tenth of the step"],
)
def test_small_differences_are_no_stragglers(caplog, own_s):
    stragglers = watch(4)
    for _ in range(PATIENCE + 1):
        assert look(stragglers, own_s)["health/slow_ranks"] == 0
    assert not caplog.records


def test_in_the_first_window_nobody_is_slow(caplog):
    stragglers = Stragglers(["a", "b"], ["a", "b"])
    assert look(stragglers, [0.1, 9.0])["health/slow_ranks"] == 0 and not caplog.records


def test_a_thousand_slow_ranks_are_not_a_thousand_lines(caplog):
    look(watch(4096), [0.5] * 3096 + [1.0] * 1000)
    assert len(caplog.records) == 9 and "992 more ranks are slow" in caplog.text


def test_of_many_nodes_none_has_a_number_of_its_own_and_one_rank_has_none_to_compare_with():
    row = look(watch(MOST_NODES + 1), [0.5] * (MOST_NODES + 1))
    assert not [name for name in row if name.startswith("node/")]
    assert look(Stragglers(["a"], ["a"]), [0.5]) == {}
