"""What every rank measured of a window → one row of numbers: the registry's statistics over the ranks.

What comes in: a table, a line for each rank and a column for each of the registry's names that ranks measure. What goes
out: `{name/statistic: number}`. Surprise: a number that a rank did not measure is NaN and left out of the statistic;
one that no rank measured is left out of the row.
"""

from collections.abc import Callable, Mapping

import numpy as np

from phi3v_dist.observe.registry import REGISTRY, Metric

MEASURED: tuple[Metric, ...] = tuple(metric for metric in REGISTRY if metric.reduction != "run")
COLUMNS: tuple[str, ...] = tuple(dict.fromkeys(metric.base for metric in MEASURED))
_PLACE = {name: place for place, name in enumerate(COLUMNS)}

Sorted = np.ndarray  # one column, ascending, without NaN, at least one number

STATISTICS: Mapping[str, Callable[[Sorted], float]] = {
    "sum": lambda column: float(column.sum()),
    "min": lambda column: float(column[0]),
    "mean": lambda column: float(column.mean()),
    "p50": lambda column: _quantile(column, 0.5),
    "p99": lambda column: _quantile(column, 0.99),
    "max": lambda column: float(column[-1]),
}


def line(measured: Mapping[str, float]) -> np.ndarray:
    """One rank's line of the table. Raises AssertionError for a name that the registry does not have."""
    assert measured.keys() <= _PLACE.keys(), f"not in the registry: {sorted(measured.keys() - _PLACE.keys())}"
    return np.array([measured.get(name, np.nan) for name in COLUMNS])


def column(table: np.ndarray, name: str) -> np.ndarray:
    """[ranks]"""
    return table[:, _PLACE[name]]


def reduce(table: np.ndarray) -> dict[str, float]:
    """[ranks, columns] → the statistics that the registry wants."""
    ordered = np.sort(np.ascontiguousarray(table.T), axis=1)  # NaN comes last
    counts = np.count_nonzero(~np.isnan(ordered), axis=1).tolist()
    return {
        metric.name: STATISTICS[metric.reduction](ordered[place, : counts[place]])
        for metric in MEASURED
        if counts[place := _PLACE[metric.base]]
    }


def _quantile(column: Sorted, share: float) -> float:
    """Between the two nearest ranks, as numpy's default."""
    place = share * (len(column) - 1)
    low = int(place)
    high = min(low + 1, len(column) - 1)
    return float(column[low] + (place - low) * (column[high] - column[low]))
