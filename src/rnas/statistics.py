"""Intervals for what was counted."""

from __future__ import annotations

import math


def wilson(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927) among `n`; `share` may be a mean over seeds."""
    z2 = z * z
    centre, half = share + z2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))
