"""The normal distribution as all implementations compute it, so that they agree.

Quantile: Abramowitz and Stegun 26.2.23, an error of at most 4.5e-4. Tail: the Chebyshev fit of
erfc by Press et al. (Numerical Recipes), a relative error of at most 1.2e-7 however far out.
"""

QUANTILE_TOP = (2.515517, 0.802853, 0.010328)
QUANTILE_BOTTOM = (1.432788, 0.189269, 0.001308)
ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806,
    0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277,
)  # fmt: skip
LOG_ROOT_2_PI = 0.9189385332046727
LOG_2 = 0.6931471805599453
LEAST_VISITED = 0.5
"""Rows: the largest of n scores lies at about the quantile of `1 - 0.5 / n`."""
REACH = 10.0
"""Standard deviations: of a cluster, no more and no less is to be found beyond."""

TINY = 1e-12
"""Variances below count as none."""
