"""Paired bootstrap over units (texts, prompts): is a difference more than the noise of the sample?

Two variants see the same units, so units are drawn together; what makes a text hard for both
cancels.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.stats import t as student

LEAST_UNITS = 5
N_RESAMPLES = 10_000
BLOCK = 1000  # resamples at once, so that thousands of units fit in memory


@dataclass(frozen=True)
class Interval:
    """`value` of the sample and the bounds that hold it at the level; no bounds: too few units."""

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)


def tail_share(level: float, n: int) -> float:
    """The percentile of each tail, wider than `(1 - level) / 2` where units are few.

    Percentile intervals of small samples are too narrow by `sqrt((n - 1) / n)` and by the normal
    in place of Student's t (Hesterberg, arXiv 1411.5279, section 3.3: expanded percentiles).
    """
    quantile = student.ppf((1 - level) / 2, n - 1) * np.sqrt(n / (n - 1))
    return NormalDist().cdf(float(quantile))


def ratio_difference(
    a: np.ndarray, b: np.ndarray, *, level: float = 0.95, seed: int = 0
) -> Interval:
    """`sum(b_top) / sum(b_bottom) - sum(a_top) / sum(a_bottom)`.

    `a, b [n, 2]`: (top, bottom) of each unit, in the same order; a mean is a ratio with 1 below.
    """
    value = float(_ratio(b.sum(0)) - _ratio(a.sum(0)))
    n = len(a)
    if n < LEAST_UNITS:
        return Interval(value, None, None)
    if np.array_equal(a, b):
        return Interval(0.0, 0.0, 0.0)
    rng = np.random.default_rng(seed)
    differences = np.concatenate(
        [_resampled(a, b, rng, BLOCK) for _ in range(N_RESAMPLES // BLOCK)]
    )
    tail = tail_share(level, n)
    low, high = np.nanquantile(differences, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _resampled(a, b, rng, count):
    drawn = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=count).astype(float)
    return _ratio(drawn @ b) - _ratio(drawn @ a)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]
