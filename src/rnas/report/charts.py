"""The page's charts: lines over epochs, and dots with intervals. Drawn for 360 pixels, so that a phone shows them as a
desk does; lines carry their names at their ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rnas.report.drawing import Box, Dot, Drawing, Point, Text, polyline, text_width
from rnas.report.spread import spread

WIDTH = 360.0
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Values = Sequence[float | None]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line of a chart; None leaves a gap."""

    name: str
    values: Values
    role: str
    dash: tuple[float, ...] = ()
    width: float = 1.8
    label: bool = True


def percent(value: float) -> str:
    """0.615 as 61.5 %, with a narrow space that does not break."""
    return f"{100 * value:.1f}\u202f%"


def short(value: float) -> str:
    """About three figures, as people write them: 0.123, 12.3, 1.2·10⁻⁴."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", "\u202f")
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(RAISED)}"
    return power if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}·{power}"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`; with few of them, also their twos and fives."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for marks in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
        found = [
            m * 10.0**p for p in powers for m in marks if low <= m * 10.0**p * 1.0001 and m * 10.0**p <= high * 1.0001
        ]
        if len(found) >= 3:
            step = math.ceil(len(found) / 6)
            return found[::step]
    return [low, high]


def line_chart(
    x: Sequence[int],
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    form: Format = short,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
    shade: tuple[float, str] | None = None,
    height: float = 230.0,
) -> Drawing:
    """Lines over epochs `x`. `shade` marks the epochs up to a number with a name, such as the warm-up."""
    series = [s for s in series if any(v is not None for v in s.values)]
    values = [v for s in series for v in s.values if v is not None and (v > 0 or not log)]
    bottom, top = _range(values, low, high, log)
    marks = log_ticks(bottom, top) if log else ticks(bottom, top)
    ends = [(s, *_last(s, log)) for s in series if s.label]
    ends = [(s, i, v) for s, i, v in ends if i >= 0]
    right = WIDTH - 8 - max((text_width(s.name, 12) for s, _, _ in ends), default=0) - 4
    left = 10 + max(text_width(form(m), 11) for m in marks)
    above, below = 12.0, height - 24.0
    first, last = x[0], max(x[-1], x[0] + 1)

    def across(epoch: float) -> float:
        return left + (epoch - first) / (last - first) * (right - left)

    def up(value: float) -> float:
        share = math.log(value / bottom) / math.log(top / bottom) if log else (value - bottom) / (top - bottom)
        return below - min(max(share, 0.0), 1.0) * (below - above)

    out = Drawing(WIDTH, height, title, description)
    if shade and shade[0] > first:
        edge = across(min(shade[0] + 0.5, last))
        out.shapes.append(Box(left, above - 4, edge - left, below - above + 4, fill="sunken"))
        if text_width(shade[1], 10.5) + 8 < edge - left:
            out.shapes.append(Text(left + 5, above + 7, shade[1], 10.5, "faint"))
    for mark in marks:
        out.shapes.append(polyline([(left, up(mark)), (right, up(mark))], stroke="rule", width=1))
        out.shapes.append(Text(left - 6, up(mark) + 4, form(mark), 11, "soft", "end"))
    for i, mark in enumerate(sorted({round(m) for m in ticks(first, last, 5)} & set(range(first, last + 1)))):
        out.shapes.append(
            Text(across(mark), height - 8, f"epoch {mark}" if i == 0 else str(mark), 11, "soft", "middle")
        )
    for s in series:
        for piece in _pieces(
            [
                (across(e), up(v)) if v is not None and (v > 0 or not log) else None
                for e, v in zip(x, s.values, strict=True)
            ]
        ):
            if len(piece) == 1:
                out.shapes.append(Dot(*piece[0], 2.4, s.role))
            else:
                out.shapes.append(polyline(piece, stroke=s.role, width=s.width, dash=s.dash))
    _label_ends(out, [(s, across(x[i]), up(v)) for s, i, v in ends], right, above, below)
    out.data = {
        "x": list(x),
        "left": round(across(first), 1),
        "right": round(across(x[-1]), 1),
        "top": above,
        "bottom": below,
        "series": [
            {"name": s.name, "role": s.role, "text": [None if v is None else form(v) for v in s.values]} for s in series
        ],
    }
    return out


def _range(values: Sequence[float], low: float | None, high: float | None, log: bool) -> tuple[float, float]:
    bottom = min(values, default=0.1) if low is None else low
    top = max(values, default=1.0) if high is None else high
    if log:
        room = (top / bottom) ** 0.06 if top > bottom else 1.5
        return bottom / room, top * room
    if top - bottom < 1e-12:
        bottom, top = bottom - (abs(bottom) * 0.1 or 0.5), top + (abs(top) * 0.1 or 0.5)
    room = 0.05 * (top - bottom)
    return bottom - (room if low is None else 0), top + (room if high is None else 0)


def _last(series: Series, log: bool) -> tuple[int, float]:
    """Where the line ends: position and value; -1 if there is nothing to see of it."""
    for i in range(len(series.values) - 1, -1, -1):
        v = series.values[i]
        if v is not None and (v > 0 or not log):
            return i, v
    return -1, 0.0


def _pieces(points: Sequence[Point | None]) -> list[list[Point]]:
    """The points, cut where one is missing."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    return [p for p in pieces if p]


def _label_ends(
    out: Drawing, ends: Sequence[tuple[Series, float, float]], right: float, above: float, below: float
) -> None:
    ends = sorted(ends, key=lambda end: end[2])
    places = spread([y for _, _, y in ends], [15.0] * (len(ends) - 1))
    if places:  # push back into the chart what pooling moved out of it
        shift = min(0.0, below - places[-1]) or max(0.0, above - places[0])
        places = [y + shift for y in places]
    for (s, _, _), y in zip(ends, places, strict=True):
        out.shapes.append(Text(right + 6, y + 4, s.name, 12, s.role))


@dataclass(frozen=True)
class Mark:
    """One dot of a dot chart, with an interval if there is one."""

    value: float
    role: str
    interval: tuple[float, float] | None = None
    hollow: bool = False


def dot_chart(
    rows: Sequence[tuple[str, Sequence[Mark | None]]],
    *,
    title: str,
    description: str,
    form: Format = percent,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
    width: float = WIDTH,
    join: bool = False,
    values: bool = False,
) -> Drawing:
    """Named rows of dots. Dots of one row stand below each other, or with `join` on one line, joined. `values` writes
    the value of every dot at the right."""
    marks = [m for _, row in rows for m in row if m]
    numbers = [v for m in marks for v in (m.value, *(m.interval or ())) if v > 0 or not log]
    bottom, top = _range(numbers, low, high, log)
    left = 10 + min(max((text_width(name, 12) for name, _ in rows), default=0.0), 0.42 * width)
    right = width - (28 + text_width("100.0 %", 12) if values else 16)
    pitch = 14.0

    def row_height(row: Sequence[Mark | None]) -> float:
        return 18.0 if join else 10 + pitch * len(row)

    height = 30 + sum(row_height(row) for _, row in rows)
    out = Drawing(width, height, title, description)

    def across(value: float) -> float:
        share = math.log(value / bottom) / math.log(top / bottom) if log else (value - bottom) / (top - bottom)
        return left + 6 + min(max(share, 0.0), 1.0) * (right - left - 6)

    ground = height - 24
    for tick in log_ticks(bottom, top) if log else ticks(bottom, top, 5):
        out.shapes.append(polyline([(across(tick), 4), (across(tick), ground)], stroke="rule", width=1))
        out.shapes.append(
            Text(across(tick), height - 8, form(tick).replace(".0\u202f%", "\u202f%"), 11, "soft", "middle")
        )
    y = 4.0
    for name, row in rows:
        middle = y + row_height(row) / 2
        out.shapes.append(Text(left - 4, middle + 4, _fit(name, left - 10), 12, "ink", "end"))
        shown = [m for m in row if m and (m.value > 0 or not log)]
        if join and len(shown) > 1:
            ends = sorted(across(m.value) for m in shown)
            out.shapes.append(polyline([(ends[0], middle), (ends[-1], middle)], stroke="rail", width=1.6))
        for i, mark in enumerate(row):
            if mark is None or (log and mark.value <= 0):
                continue
            at = middle if join else y + 5 + pitch * (i + 0.5)
            if mark.interval:
                lo, hi = (across(v) for v in mark.interval)
                out.shapes.append(polyline([(lo, at), (hi, at)], stroke=mark.role, width=2.2))
            fill, stroke = ("surface", mark.role) if mark.hollow else (mark.role, None)
            out.shapes.append(Dot(across(mark.value), at, 4.2, fill, stroke, 1.8))
            if values:
                out.shapes.append(Text(width - 8, at + 4, form(mark.value), 12, mark.role, "end"))
        y += row_height(row)
    return out


def _fit(text: str, room: float) -> str:
    """`text`, shortened to about `room` units at size 12."""
    if text_width(text, 12) <= room + 4:
        return text
    while text and text_width(text + "…", 12) > room:
        text = text[:-1]
    return text + "…"
