"""Intervals for what was counted or measured."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927) among `n`; `share` may be a mean over seeds."""
    z2 = z * z
    centre, half = share + z2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided p-value of McNemar's exact test; 1 where the two never disagree."""
    if only_a + only_b == 0:
        return 1.0
    from scipy.stats import binomtest  # here, because it takes half a second

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_interval(only_a: int, only_b: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """An interval for the difference of two proportions on the same `n` images: Wald's, with one image added to each
    kind of disagreement (Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data")."""
    pa, pb = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    middle = pa - pb
    half = z * math.sqrt((pa + pb - middle**2) / (n + 2))
    return max(-1.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float], seed: int = 0, times: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values` (Efron and Tibshirani 1993)."""
    import numpy as np  # here, because most who ask for an interval do without

    given, random = np.asarray(values, np.float64), np.random.default_rng(seed)
    means = [given[random.integers(len(given), size=len(given))].mean() for _ in range(times)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """The p-values in their order, each corrected for all of them (Holm 1979)."""
    corrected, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = worst
    return corrected
