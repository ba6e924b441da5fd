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

Values = np.ndarray  # one column without NaN, at least one number

STATISTICS: Mapping[str, Callable[[Values], float]] = {
    "sum": lambda values: float(values.sum()),
    "min": lambda values: float(values.min()),
    "mean": lambda values: float(values.mean()),
    "p50": lambda values: _quantile(values, 0.5),
    "p99": lambda values: _quantile(values, 0.99),
    "max": lambda values: float(values.max()),
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
    columns = np.ascontiguousarray(table.T)
    known = {name: values[~np.isnan(values)] for name, values in zip(COLUMNS, columns, strict=True)}
    return {
        metric.name: STATISTICS[metric.reduction](known[metric.base]) for metric in MEASURED if len(known[metric.base])
    }


def _quantile(values: Values, share: float) -> float:
    """Between the two nearest ranks, as numpy's default."""
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    nearest = np.partition(values, (low, high))
    return float(nearest[low] + (place - low) * (nearest[high] - nearest[low]))
