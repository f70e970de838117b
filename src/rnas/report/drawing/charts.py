"""The page's charts: lines over epochs, and dots with intervals. Drawn for 360 pixels, so that a phone shows them as a
desk does; lines carry their names at their ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from rnas.report.drawing.layout import spread
from rnas.report.drawing.shapes import Box, Dot, Drawing, Point, Text, polyline, text_width

WIDTH, HEIGHT = 360.0, 230.0
PITCH = 14.0
"""Between dots of one row."""
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line of a chart; None leaves a gap."""

    name: str
    values: tuple[float | None, ...]
    role: str
    dash: tuple[float, ...] = ()
    width: float = 1.8
    label: bool = True


def percent(value: float) -> str:
    """0.615 as 61.5 %, with a narrow space that does not break."""
    return f"{100 * value:.1f}\u202f%"


def short(value: float, digits: int = 3) -> str:
    """About three figures, or `digits`, as people write them: 0.123, 12.3, 1.2·10⁻⁴."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.{digits - 3}f}".replace(",", "\u202f")
    mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
    power = f"10{str(int(exponent)).translate(RAISED)}"
    return power if float(mantissa) == 1 else f"{mantissa.removesuffix('.0')}·{power}"


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


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, drawn from pixel `start` to pixel `end`."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of `value`; values outside stop at the ends."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def shows(self, value: float | None) -> TypeGuard[float]:
        """Whether there is a value, and it has a place on the axis."""
        return value is not None and (value > 0 or not self.log)

    def ticks(self, about: int) -> list[float]:
        """Round values on the axis."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, about)


def _axis(values: Iterable[float | None], log: bool, start: float, end: float) -> Axis:
    """An axis that shows all `values`, with a little room around them."""
    known = [v for v in values if v is not None and (v > 0 or not log)]
    low, high = min(known, default=0.1), max(known, default=1.0)
    if log:
        room = (high / low) ** 0.06 if high > low else 1.5
        return Axis(low / room, high * room, log, start, end)
    if high - low < 1e-12:
        low, high = low - (0.1 * abs(low) or 0.5), high + (0.1 * abs(high) or 0.5)
    room = 0.05 * (high - low)
    return Axis(low - room, high + room, log, start, end)


def line_chart(
    x: Sequence[int],
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    form: Format = short,
    log: bool = False,
    shade: tuple[float, str] | None = None,
) -> Drawing:
    """Lines over epochs `x`. `shade` marks the epochs up to a number with a name, such as the warm-up."""
    out = Drawing(WIDTH, HEIGHT, title, description)
    up = _axis((v for s in series for v in s.values), log, HEIGHT - 24.0, 12.0)
    names = {s: _fit(s.name, 0.36 * WIDTH) for s in series if s.label}
    left = 10 + max(text_width(form(mark), 11) for mark in up.ticks(4))
    right = WIDTH - 12 - max((text_width(name, 12) for name in names.values()), default=0)
    across = Axis(x[0], max(x[-1], x[0] + 1), False, left, right)
    if shade and shade[0] > x[0]:
        edge = across(shade[0] + 0.5)
        out.shapes.append(Box(left, up.end - 4, edge - left, up.start - up.end + 4, fill="sunken"))
    for mark in up.ticks(4):
        out.shapes.append(polyline([(left, up(mark)), (right, up(mark))], stroke="rule", width=1))
        out.shapes.append(Text(left - 6, up(mark) + 4, form(mark), 11, "soft", "end"))
    if shade and shade[0] > x[0] and (width := text_width(shade[1], 10.5)) + 8 < edge - left:
        out.shapes.append(Box(left + 3, up.end - 2, width + 4, 12, fill="sunken"))  # no grid line strikes it through
        out.shapes.append(Text(left + 5, up.end + 7, shade[1], 10.5, "faint"))
    for i, epoch in enumerate(sorted({round(mark) for mark in across.ticks(5)} & {*range(x[0], x[-1] + 1)})):
        name = f"epoch {epoch}" if i == 0 else str(epoch)
        out.shapes.append(Text(across(epoch), HEIGHT - 8, name, 11, "soft", "middle"))
    for s in series:
        points = [(across(e), up(v)) if up.shows(v) else None for e, v in zip(x, s.values, strict=True)]
        for piece in _pieces(points):
            if len(piece) == 1:
                out.shapes.append(Dot(*piece[0], 2.4, s.role))
            else:
                out.shapes.append(polyline(piece, stroke=s.role, width=s.width, dash=s.dash))
    ends = [(name, s.role, up(last)) for s, name in names.items() if (last := _last(s, up)) is not None]
    _label_ends(out, ends, right + 6, up)
    out.data = {
        "x": list(x),
        "left": round(across(x[0]), 1),
        "right": round(across(x[-1]), 1),
        "top": up.end,
        "bottom": up.start,
        "series": [
            {"name": s.name, "role": s.role, "text": [None if v is None else form(v) for v in s.values]} for s in series
        ],
    }
    return out


def _last(series: Series, axis: Axis) -> float | None:
    """The value where the line ends; None if there is nothing to see of it."""
    return next((v for v in reversed(series.values) if axis.shows(v)), None)


def _pieces(points: Sequence[Point | None]) -> list[list[Point]]:
    """The points, cut where one is missing."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    return [p for p in pieces if p]


def _label_ends(out: Drawing, ends: Sequence[tuple[str, str, float]], x: float, axis: Axis) -> None:
    """Names (with role and height) at the right of their lines, apart from each other."""
    ends = sorted(ends, key=lambda end: end[2])
    places = spread([y for _, _, y in ends], [15.0] * (len(ends) - 1))
    if places:  # push back into the chart what was moved out of it
        shift = min(0.0, axis.start - places[-1]) or max(0.0, axis.end - places[0])
        places = [y + shift for y in places]
    for (name, role, _), y in zip(ends, places, strict=True):
        out.shapes.append(Text(x, y + 4, name, 12, role))


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
    span: tuple[float, float] | None = None,
    width: float = WIDTH,
    join: bool = False,
    values: bool = False,
    unit: str = "",
    line: tuple[float, str] | None = None,
) -> Drawing:
    """Named rows of dots, from one end of `span` to the other (by default, what the dots need). Dots of one row stand
    below each other, or with `join` on one line, joined. `values` writes the value of every dot at the right,
    `unit` what they are measured in below the axis. `line` marks a value with a name."""
    left = 10 + min(max((text_width(name, 12) for name, _ in rows), default=0.0), 0.42 * width)
    right = width - (28 + text_width("100.0 %", 12) if values else 16)
    marks = [mark for _, row in rows for mark in row if mark]
    across = _axis((v for m in marks for v in (m.value, *(m.interval or ()))), log, left + 6, right)
    if span:
        across = Axis(*span, log, left + 6, right)
    heights = [18.0 if join else 10 + PITCH * len(row) for _, row in rows]
    top = 18.0 if line else 4.0
    out = Drawing(width, 26 + top + sum(heights), title, description)
    for tick in across.ticks(5):
        out.shapes.append(polyline([(across(tick), top), (across(tick), out.height - 24)], stroke="rule", width=1))
        name = form(tick).replace(".0\u202f%", "\u202f%")
        out.shapes.append(Text(across(tick), out.height - 8, name, 11, "soft", "middle"))
    if line:
        at, name = across(line[0]), line[1]
        out.shapes.append(polyline([(at, 4), (at, out.height - 24)], stroke="soft", width=1.2, dash=(4, 3)))
        right_of_it = at + 4 + text_width(name, 11) < right
        out.shapes.append(
            Text(at + (4 if right_of_it else -4), 12, name, 11, "soft", "start" if right_of_it else "end")
        )
    y = top
    for (name, row), height in zip(rows, heights, strict=True):
        middle = y + height / 2
        out.shapes.append(Text(left - 4, middle + 4, _fit(name, left - 10), 12, "ink", "end"))
        ends = [across(m.value) for m in row if m and across.shows(m.value)]
        if join and len(ends) > 1:
            out.shapes.append(polyline([(min(ends), middle), (max(ends), middle)], stroke="rail", width=1.6))
        for i, mark in enumerate(row):
            if mark and across.shows(mark.value):
                at = middle if join else y + 5 + PITCH * (i + 0.5)
                _draw_mark(out, mark, across, at)
                if values:
                    out.shapes.append(Text(width - 8, at + 4, form(mark.value), 12, mark.role, "end"))
        y += height
    if unit:
        out.height += 16
        out.shapes.append(Text(width - 8, out.height - 6, unit, 11, "soft", "end"))
    return out


def _draw_mark(out: Drawing, mark: Mark, across: Axis, y: float) -> None:
    if mark.interval:
        low, high = (across(v) for v in mark.interval)
        out.shapes.append(polyline([(low, y), (high, y)], stroke=mark.role, width=2.2))
    fill, stroke = ("surface", mark.role) if mark.hollow else (mark.role, None)
    out.shapes.append(Dot(across(mark.value), y, 4.2, fill, stroke, 1.8))


@dataclass(frozen=True)
class Bubble:
    """A named point; `size` is proportional to its area."""

    name: str
    x: float
    y: float
    size: float
    role: str


SPOT = 3.0
"""Radius of the smallest bubble: what is less could not be seen."""


def bubble_chart(
    bubbles: Sequence[Bubble],
    *,
    title: str,
    description: str,
    across_name: str,
    up_name: str,
    form: Format = percent,
    width: float = 460.0,
    height: float = 340.0,
) -> Drawing:
    """Named bubbles by two figures, as the paper's Fig. 1."""
    largest = max((b.size for b in bubbles), default=1.0) or 1.0
    radius = {b: max(SPOT, 14.5 * math.sqrt(max(b.size, 0.0) / largest)) for b in bubbles}
    up = _axis((b.y for b in bubbles), False, height - 44.0, 30.0)
    left = 12 + max(text_width(form(t), 11) for t in up.ticks(5))
    across = _axis((b.x for b in bubbles), False, left + 16, width - 20)
    out = Drawing(width, height, title, description)
    for tick in up.ticks(5):
        out.shapes.append(polyline([(left, up(tick)), (width - 4, up(tick))], stroke="rule", width=1))
        out.shapes.append(Text(left - 6, up(tick) + 4, form(tick), 11, "soft", "end"))
    for tick in across.ticks(5):
        out.shapes.append(Text(across(tick), height - 24, form(tick), 11, "soft", "middle"))
    out.shapes.append(Text(4, 12, up_name, 11.5, "soft"))
    out.shapes.append(Text(width - 4, height - 6, across_name, 11.5, "soft", "end"))
    places = {b: (across(b.x), up(b.y)) for b in bubbles}
    for b in sorted(bubbles, key=lambda b: -radius[b]):
        out.shapes.append(Dot(*places[b], radius[b], b.role, "surface", 1.2))
    taken = [(x - radius[b], y - radius[b], x + radius[b], y + radius[b]) for b, (x, y) in places.items()]
    for b in bubbles:
        name = _fit(b.name, 120)
        x, y = _label_place(places[b], radius[b], text_width(name, 12), taken, width, height - 40)
        taken.append((x, y - 10, x + text_width(name, 12), y + 3))
        out.shapes.append(Text(x, y, name, 12, b.role))
    return out


Area = tuple[float, float, float, float]  # left, top, right, bottom


def _label_place(
    centre: Point, radius: float, length: float, taken: Sequence[Area], width: float, height: float
) -> Point:
    """Where a label of `length` beside a bubble hides least: the first of the places round it, nearest first, that
    covers least of what is `taken`."""
    (x, y), best, least = centre, centre, math.inf
    for distance in (4.0, 12.0, 22.0):
        reach = radius + distance
        for turn in (0, 4, 2, 6, 1, 7, 3, 5):  # right, left, below, above, then the corners
            dx, dy = math.cos(turn * math.pi / 4), math.sin(turn * math.pi / 4)
            at = (x + reach * dx - length * (1 - dx) / 2, y + reach * dy + 4)
            area = (at[0], at[1] - 10, at[0] + length, at[1] + 3)
            hidden = sum(_common(area, other) for other in taken)
            outside = (
                max(0.0, -area[0]) + max(0.0, area[2] - width) + max(0.0, 16 - area[1]) + max(0.0, area[3] - height)
            )
            if hidden + 100 * outside < least - 1e-9:
                best, least = at, hidden + 100 * outside
    return best


def _common(a: Area, b: Area) -> float:
    """The area that two rectangles share."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, wide) * max(0.0, high)


def _fit(text: str, room: float) -> str:
    """`text`, shortened to about `room` units at size 12."""
    if text_width(text, 12) <= room + 4:
        return text
    while text and text_width(text + "…", 12) > room:
        text = text[:-1]
    return text + "…"
