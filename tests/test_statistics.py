"""Intervals where the answer is known."""

import math

import numpy as np
import pytest

from rnas.statistics import bootstrap, holm


def test_bootstrap_of_equal_values_is_that_value() -> None:
    assert bootstrap([3.0] * 7) == (3.0, 3.0)


def test_bootstrap_of_many_values_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).exponential(size=2000)
    low, high = bootstrap(values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert bootstrap(values.tolist()) == (low, high), "the same every time"


def test_holm() -> None:
    """Holm (1979): the smallest p times their number, the next times one less, never falling, at most 1."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
