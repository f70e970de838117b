"""Figures as people read them, the same in every line, sentence and table."""

from __future__ import annotations

from collections.abc import Callable

Form = Callable[[float, int], str]
"""Writes a value with so many digits."""


def digits(value: float, number: int = 3) -> str:
    """`value` with `number` significant digits: 0.123, 1.2e-05."""
    return f"{value:.{number}g}"


def apart(*values: float, form: Form = digits) -> list[str]:
    """The values as text, all with the same number of digits: three, or as many more as tell different values apart.

    For figures that a sentence sets against each other: 0.0001188 over its bound 0.0001187.
    """
    texts: list[str] = []
    for number in range(3, 18):
        texts = [form(value, number) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def duration(seconds: float) -> str:
    """3.1 s, 4 min 10 s, 2 h 5 min, 3 days 4 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} days {hours} h"


def roughly(seconds: float) -> str:
    """A time that is only roughly known: less than a minute, about 12 min, about 3.5 h, about 12 days."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.95 * unit or (name == "min" and seconds >= unit):
            return f"about {seconds / unit:.{0 if seconds >= 10 * unit or name == 'min' else 1}f} {name}"
    return "less than a minute"


def radius(eps: float, norm: str = "linf") -> str:
    """ε in pixel steps where it is a whole number of them."""
    steps = 255 * eps
    whole = abs(steps - round(steps)) < 1e-3 and norm == "linf"
    return f"{round(steps)}/255" if whole else f"{eps:.4g}"
