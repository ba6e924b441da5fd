"""A table of all ranks' numbers → the statistics that the registry wants."""

import numpy as np
import pytest

from phi3v_dist.observe.columns import COLUMNS, MEASURED, line, reduce

RANKS = 200


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(7).lognormal(size=(RANKS, len(COLUMNS)))


def test_every_statistic_is_numpys_own(table):
    row = reduce(table)
    assert list(row) == [metric.name for metric in MEASURED]
    for metric in MEASURED:
        column = table[:, COLUMNS.index(metric.base)]
        statistic = {"p50": np.median, "p99": lambda values: np.percentile(values, 99)}.get(
            metric.reduction, lambda values, name=metric.reduction: getattr(np, name)(values)
        )
        assert row[metric.name] == pytest.approx(statistic(column), rel=1e-12), metric.name


def test_what_a_rank_did_not_measure_counts_for_nothing(table):
    place = COLUMNS.index("health/gemm_probe_tflops")
    table[3:, place] = np.nan
    row = reduce(table)
    assert row["health/gemm_probe_tflops/min"] == table[:3, place].min()
    assert row["health/gemm_probe_tflops/p50"] == np.median(table[:3, place])


def test_what_no_rank_measured_is_not_in_the_row(table):
    table[:, COLUMNS.index("gpu/temp_c")] = np.nan
    assert "gpu/temp_c/max" not in reduce(table)


def test_a_name_that_is_not_registered_is_refused():
    assert np.isnan(line({"time/step_s": 2.0})).sum() == len(COLUMNS) - 1
    with pytest.raises(AssertionError, match="time/sleep_s"):
        line({"time/sleep_s": 2.0})
