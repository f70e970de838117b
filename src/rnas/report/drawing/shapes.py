"""A drawing is a list of shapes with colour roles. It becomes SVG by itself, and a PNG or PDF through matplotlib."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rnas.errors import RnasError
from rnas.files import replacing, write_text
from rnas.report.drawing import theme

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', Arial, sans-serif"
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """An open or filled path: a point to start at, then points to draw to; a step of three points is a cubic curve."""

    start: Point
    steps: tuple[tuple[Point, ...], ...]
    stroke: str | None = "ink"
    fill: str | None = None
    width: float = 1.5
    dash: tuple[float, ...] = ()


@dataclass(frozen=True)
class Box:
    """A rectangle with corners of radius `r`."""

    x: float
    y: float
    width: float
    height: float
    r: float = 0.0
    fill: str | None = None
    stroke: str | None = None
    line: float = 1.5


@dataclass(frozen=True)
class Dot:
    """A circle."""

    x: float
    y: float
    r: float
    fill: str | None = "ink"
    stroke: str | None = None
    line: float = 1.5


@dataclass(frozen=True)
class Text:
    """One line of text on its baseline. `_{k}` in it sets k as a subscript."""

    x: float
    y: float
    text: str
    size: float = 12.0
    fill: str = "ink"
    anchor: str = "start"  # start, middle, end
    bold: bool = False
    italic: bool = False


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of `pixels` (H,W,3), uint8, every pixel a sharp square."""

    x: float
    y: float
    width: float
    height: float
    pixels: NDArray[np.uint8]


Shape = Line | Box | Dot | Text | Picture


def polyline(points: Sequence[Point], **style: Any) -> Line:
    """Straight lines through `points`."""
    return Line(points[0], tuple((p,) for p in points[1:]), **style)


_LETTERS = {**dict.fromkeys("iljtf.,:;'|!()[] -·", 0.36), **dict.fromkeys("mwMW@%&", 0.9)}


def text_width(text: str, size: float) -> float:
    """About how wide `text` comes out, in the units of `size`: fonts differ, so leave some room."""
    plain = re.sub(r"_\{(.*?)\}", r"\1", text)
    return size * sum(_LETTERS.get(c, 0.7 if c.isupper() else 0.59) for c in plain)


@dataclass
class Drawing:
    """Shapes on a canvas of `width` times `height` units, y downwards. `title` and `description` are its text
    alternative; `data` is what a page's script shows when the reader points at it."""

    width: float
    height: float
    title: str
    description: str = ""
    shapes: list[Shape] = field(default_factory=list)
    data: dict[str, Any] | None = None

    def svg(self, standalone: bool = False, min_width: float | None = None) -> str:
        """The drawing as an <svg> element. `standalone` makes it a file of its own that follows the reader's light or
        dark preference; else the page's style sheet has the colours."""
        label = f"{self.title}. {self.description}".strip()
        attributes = {
            "viewBox": f"0 0 {_n(self.width)} {_n(self.height)}",
            "role": "img",
            "aria-label": label,
            "font-family": FONT if standalone else None,
            "xmlns": "http://www.w3.org/2000/svg" if standalone else None,
            "width": _n(self.width) if standalone else None,
            "height": _n(self.height) if standalone else None,
            "style": None if standalone else f"min-width:{_n(min_width)}px" if min_width else None,
            "data-chart": json.dumps(self.data, separators=(",", ":"), allow_nan=False) if self.data else None,
        }
        start = " ".join(f'{k}="{escape(v)}"' for k, v in attributes.items() if v is not None)
        css = f"<style>{theme.drawing_css({*_roles(self.shapes), 'surface'})}</style>" if standalone else ""
        ground = (
            _svg(Box(0, 0, self.width, self.height, fill="surface")) if standalone else ""
        )  # where letters turn light
        body = ground + "".join(map(_svg, self.shapes))
        return (
            f"<svg {start}><title>{escape(self.title)}</title><desc>{escape(self.description)}</desc>{css}{body}</svg>"
        )

    def save(self, path: FilePath) -> None:
        """Write the drawing to `path`, by its ending: .svg from here, .png and .pdf through matplotlib.

        RnasError for another ending or a folder that cannot be written to."""
        if path.suffix == ".svg":
            write_text(path, '<?xml version="1.0" encoding="UTF-8"?>\n' + self.svg(standalone=True) + "\n")
        elif path.suffix in (".png", ".pdf"):
            self._matplotlib(path)
        else:
            raise RnasError(f"cannot write a figure as {path.name}: its name must end in .svg, .png or .pdf")

    def _matplotlib(self, path: FilePath) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure((self.width / 100, self.height / 100), dpi=200)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        for z, shape in enumerate(self.shapes):
            _to_axes(shape, axes, z + 1)
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))  # pictures move them
        kind = path.suffix[1:]
        # without dates, the same drawing is the same file
        metadata = {"CreationDate": None} if kind == "pdf" else {}
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind, facecolor=theme.light("page"), metadata=metadata)


def moved(shape: Shape, dx: float, dy: float) -> Shape:
    """The same shape elsewhere."""
    if isinstance(shape, Line):
        steps = tuple(tuple((x + dx, y + dy) for x, y in step) for step in shape.steps)
        return replace(shape, start=(shape.start[0] + dx, shape.start[1] + dy), steps=steps)
    return replace(shape, x=shape.x + dx, y=shape.y + dy)


def arranged(drawings: Sequence[Drawing], columns: int, title: str) -> Drawing:
    """Drawings under their titles, row by row in `columns` columns."""
    wide, head, gap = max(d.width for d in drawings), 26.0, 14.0
    out = Drawing(columns * (wide + gap) - gap, 0.0, title, " ".join(f"{d.title}: {d.description}" for d in drawings))
    for start in range(0, len(drawings), columns):
        row = drawings[start : start + columns]
        for i, drawing in enumerate(row):
            x = i * (wide + gap)
            out.shapes.append(Text(x + 8, out.height + 17, drawing.title, 13, bold=True))
            out.shapes.extend(moved(shape, x, out.height + head) for shape in drawing.shapes)
        out.height += head + max(d.height for d in row) + gap
    return out


def png(pixels: NDArray[np.uint8]) -> bytes:
    """`pixels` (H,W,3) as the content of a PNG file."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=True)
    return data.getvalue()


def _roles(shapes: Sequence[Shape]) -> set[str]:
    return {role for s in shapes for role in (getattr(s, "fill", None), getattr(s, "stroke", None)) if role is not None}


def _n(value: float) -> str:
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _paint(fill: str | None, stroke: str | None, width: float) -> str:
    # The attributes are for programs without style sheets; in a page the classes win over them.
    classes = [f"f-{fill}"] * bool(fill) + [f"s-{stroke}"] * bool(stroke)
    out = f' class="{" ".join(classes)}" fill="{theme.light(fill) if fill else "none"}"'
    return out + (f' stroke="{theme.light(stroke)}" stroke-width="{_n(width)}"' if stroke else "")


def _svg(shape: Shape) -> str:
    match shape:
        case Line(start, steps, stroke, fill, width, dash):
            d = f"M{_n(start[0])} {_n(start[1])}" + "".join(
                ("C" if len(step) == 3 else "L") + " ".join(f"{_n(x)} {_n(y)}" for x, y in step) for step in steps
            )
            dashes = f' stroke-dasharray="{" ".join(map(_n, dash))}"' if dash else ""
            ends = ' stroke-linejoin="round" stroke-linecap="round"' if stroke else ""
            return f'<path d="{d}"{_paint(fill, stroke, width)}{dashes}{ends}/>'
        case Box(x, y, width, height, r, fill, stroke, line):
            place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
            corners = f' rx="{_n(r)}"' if r else ""
            return f"<rect {place}{corners}{_paint(fill, stroke, line)}/>"
        case Dot(x, y, r, fill, stroke, line):
            return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}"{_paint(fill, stroke, line)}/>'
        case Text(x, y, text, size, fill, anchor, bold, italic):
            style = (' font-weight="600"' if bold else "") + (' font-style="italic"' if italic else "")
            where = f'x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}"'
            side = "" if anchor == "start" else f' text-anchor="{anchor}"'
            return f"<text {where}{side}{_paint(fill, None, 0)}{style}>{_runs(text, size)}</text>"
        case Picture(x, y, width, height, pixels):
            place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
            source = "data:image/png;base64," + base64.b64encode(png(pixels)).decode()
            sharp = 'preserveAspectRatio="none" style="image-rendering:pixelated"'
            return f'<image {place} {sharp} href="{source}"/>'


def _runs(text: str, size: float) -> str:
    out = ""
    for i, part in enumerate(re.split(r"_\{(.*?)\}", text)):
        if i % 2 == 0:
            out += escape(part)
        else:  # lowered, then back on the line with an empty run
            down = _n(0.28 * size)
            out += f'<tspan dy="{down}" font-size="{_n(0.75 * size)}">{escape(part)}</tspan>'
            out += f'<tspan dy="-{down}">\u200b</tspan>'
    return out


def _to_axes(shape: Shape, axes: Any, z: int) -> None:
    from matplotlib import patches
    from matplotlib.path import Path

    def paint(fill: str | None, stroke: str | None, width: float) -> dict[str, Any]:
        return {
            "facecolor": theme.light(fill) if fill else "none",
            "edgecolor": theme.light(stroke) if stroke else "none",
            "linewidth": 0.72 * width,  # units of 1/100 inch to points
            "zorder": z,
        }

    match shape:
        case Line(start, steps, stroke, fill, width, dash):
            points, codes = [start], [int(Path.MOVETO)]
            for step in steps:
                points.extend(step)
                codes.extend([int(Path.CURVE4 if len(step) == 3 else Path.LINETO)] * len(step))
            style = (0, tuple(max(d / width, 0.1) for d in dash)) if dash else "solid"
            axes.add_patch(
                patches.PathPatch(Path(points, codes), linestyle=style, capstyle="round", **paint(fill, stroke, width))
            )
        case Box(x, y, width, height, r, fill, stroke, line):
            box = f"round,pad=0,rounding_size={r}" if r else "square,pad=0"
            axes.add_patch(patches.FancyBboxPatch((x, y), width, height, boxstyle=box, **paint(fill, stroke, line)))
        case Dot(x, y, r, fill, stroke, line):
            axes.add_patch(patches.Circle((x, y), r, **paint(fill, stroke, line)))
        case Text(x, y, text, size, fill, anchor, bold, italic):
            quiet = text.replace("\\", r"\\").replace("$", r"\$")
            axes.text(
                x,
                y,
                re.sub(r"(\w+)_\{(.*?)\}", r"$\1_{\2}$", quiet),
                fontsize=0.72 * size,
                color=theme.light(fill),
                ha={"start": "left", "middle": "center", "end": "right"}[anchor],
                va="baseline",
                fontweight="bold" if bold else "normal",
                fontstyle="italic" if italic else "normal",
                zorder=z,
            )
        case Picture(x, y, width, height, pixels):
            axes.imshow(pixels, extent=(x, x + width, y + height, y), interpolation="nearest", aspect="auto", zorder=z)
