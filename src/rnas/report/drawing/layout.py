"""Places in a given order, as near as possible to where they are wanted: for labels and for layers of a graph."""

from __future__ import annotations

from collections.abc import Sequence


def spread(wanted: Sequence[float], room: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The y that minimises Σ w·(y - wanted)² with y[i+1] - y[i] ≥ room[i].

    Subtracting the sums of `room` turns it into isotonic regression, which pooling neighbours solves exactly
    (Ayer et al. 1955)."""
    weights = [1.0] * len(wanted) if weights is None else weights
    offset, offsets = 0.0, []
    for i in range(len(wanted)):
        offset += room[i - 1] if i else 0.0
        offsets.append(offset)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, members
    for value, shift, weight in zip(wanted, offsets, weights, strict=True):
        mean, total, members = value - shift, weight, 1
        while blocks and blocks[-1][0] > mean:
            other, w, m = blocks.pop()
            mean, total, members = (mean * total + other * w) / (total + w), total + w, members + m
        blocks.append((mean, total, members))
    pooled = [mean for mean, _, members in blocks for _ in range(members)]
    return [mean + shift for mean, shift in zip(pooled, offsets, strict=True)]
