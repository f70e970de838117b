"""Figures that support their sentence: what is different never looks the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnas.report.compare import p_value
from rnas.report.drawing.charts import short
from rnas.wording import apart, duration


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((1.5, 0.7), ["1.5", "0.7"]),
        ((0.000118814, 0.000118798), ["0.00011881", "0.0001188"]),
        ((1.0000001, 1), ["1.0000001", "1"]),
        ((2.0, 2.0), ["2", "2"]),
    ],
)
def test_as_many_digits_as_it_takes(values: tuple[float, ...], texts: list[str]) -> None:
    assert apart(*values) == texts


@given(st.floats(1e-9, 1e6), st.floats(1e-9, 0.5))
def test_a_figure_over_its_bound_reads_as_more(bound: float, share: float) -> None:
    for form in (lambda v, n: f"{v:.{n}g}", short):
        over, under = apart(bound * (1 + share), bound, form=form)
        assert over != under


def test_a_p_value_stands_on_the_side_of_its_verdict() -> None:
    assert [p_value(p) for p in (0.05004, 0.0496, 0.5, 0.0004)] == ["0.05004", "0.0496", "0.500", "4e-4"]


def test_durations() -> None:
    shown = [duration(s) for s in (3.14, 59.96, 250, 7_500, 300_000)]
    assert shown == ["3.1 s", "1 min 0 s", "4 min 10 s", "2 h 5 min", "3 days 11 h"]
