"""One metric's numbers, sample by sample → the metric, its 95 % interval, and how far two models are apart.

What comes in: a column with a number for each sample, or none. What goes out: floats. Surprise: two models that have
answered the same samples are compared pair by pair. A hard sample is hard for both, so the interval of the difference
is far narrower than those of the two figures let one think; overlapping intervals say nothing.

Intervals are the 2.5th and 97.5th percentile of 1,000 resamples of the samples, drawn with a fixed seed (Efron, 1979:
https://doi.org/10.1214/aos/1176344552). Below 20 samples they would be far too narrow, so there are none. Where all
values of a share are the same, resampling cannot vary: Wilson's interval says what so many samples leave possible
(https://doi.org/10.1080/01621459.1927.10502953).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

MIN_SAMPLES = 20
NUM_RESAMPLES = 1000
CHUNK = 1 << 22  # numbers looked at together, for memory
Z = 1.959964  # of a normal distribution, 2.5 % lie above

Statistic = Literal["mean", "share", "median"]


@dataclass(frozen=True)
class Column:
    """One number a sample.

    values: NaN where a sample has none; with weights, their 0 says so.
    statistic: "share" is a mean of what is so or not, `whole` (1, or 100 for percent) or 0.
    weights: of a mean, such as the label tokens of each sample; None: all alike.
    """

    values: Float[np.ndarray, " samples"]
    statistic: Statistic = "mean"
    whole: float = 1.0
    weights: Float[np.ndarray, " samples"] | None = None

    @property
    def known(self) -> np.ndarray:
        """[samples] whether it has a number that counts. A loss that is not finite counts, and shows in the mean."""
        return ~np.isnan(self.values) if self.weights is None else np.asarray(self.weights > 0)

    def of(self, rows: np.ndarray) -> "Column":
        """The same for some samples, by a mask or by their numbers."""
        return replace(self, values=self.values[rows], weights=None if self.weights is None else self.weights[rows])

    def value(self) -> float | None:
        """The metric; None: no sample has a number."""
        rows = np.flatnonzero(self.known)
        return float(self._statistic(rows[None])[0]) if len(rows) else None

    def interval(self) -> tuple[float, float] | None:
        """(low, high) of 95 %; None: too few samples."""
        own = self.of(self.known)
        if len(own.values) < MIN_SAMPLES:
            return None
        if self.statistic == "share" and (own.values == own.values[0]).all():
            unseen = self.whole * _possible_frac(len(own.values))
            return max(0.0, own.values[0] - unseen), min(self.whole, own.values[0] + unseen)
        return _percentiles(np.concatenate([own._statistic(rows) for rows in _resamples(len(own.values))]))

    def minus(self, other: "Column") -> tuple[float, tuple[float, float] | None] | None:
        """How much higher this is than another of the same samples, and the interval of that; over the samples that
        have a number in both."""
        both = self.known & other.known
        one, two = self.of(both), other.of(both)
        if (mine := one.value()) is None or (theirs := two.value()) is None:
            return None
        if both.sum() < MIN_SAMPLES:
            return mine - theirs, None
        if self.statistic == "share" and np.ptp(one.values - two.values) == 0:
            unseen = self.whole * _possible_frac(int(both.sum()))  # pairs that would have differed by one more or less
            difference = mine - theirs
            return difference, (max(-self.whole, difference - unseen), min(self.whole, difference + unseen))
        resamples = [one._statistic(rows) - two._statistic(rows) for rows in _resamples(int(both.sum()))]
        return mine - theirs, _percentiles(np.concatenate(resamples))

    def _statistic(self, rows: Int[np.ndarray, "resamples samples"]) -> Float[np.ndarray, " resamples"]:
        values = self.values[rows]
        if self.statistic == "median":
            return np.asarray(np.median(values, axis=1))
        if self.weights is None:
            return np.asarray(values.mean(axis=1))
        weights = self.weights[rows]
        return np.asarray((values * weights).sum(axis=1) / weights.sum(axis=1))


def _resamples(num_samples: int) -> Iterator[Int[np.ndarray, "resamples samples"]]:
    """The numbers of the samples drawn, the same for every column of this length."""
    generator = np.random.default_rng(seed=0)
    together = max(1, CHUNK // num_samples)
    for begun in range(0, NUM_RESAMPLES, together):
        yield generator.integers(num_samples, size=(min(together, NUM_RESAMPLES - begun), num_samples))


def _percentiles(resamples: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    low, high = np.percentile(resamples, (2.5, 97.5))
    return float(low), float(high)


def _possible_frac(num_samples: int) -> float:
    """The upper end of Wilson's interval for something that none of so many samples had."""
    return Z**2 / (num_samples + Z**2)
