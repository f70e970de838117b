"""Drawings: cells whose labels never collide, places by least squares, charts' ticks."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from report_runs import GENOTYPE
from rnas.errors import RnasError
from rnas.genotype import OPERATIONS, Cell, Genotype
from rnas.published import genotype as published
from rnas.report import cells_drawing, draw_cells
from rnas.report.drawing.cells import PILL, describe_cell, draw_cell
from rnas.report.drawing.charts import (
    Bubble,
    Mark,
    Series,
    bubble_chart,
    dot_chart,
    line_chart,
    log_ticks,
    short,
    ticks,
)
from rnas.report.drawing.layout import spread
from rnas.report.drawing.shapes import Box, Dot, Line, Text, text_width


@st.composite
def cells(draw: st.DrawFn) -> Cell:
    nodes = []
    for i in range(draw(st.integers(1, 5))):
        edge = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, i + 1))
        nodes.append(tuple(draw(st.lists(edge, min_size=1, max_size=4))))
    last = len(nodes) + 1
    concat = draw(st.sets(st.integers(2, last), min_size=1))
    return Cell(tuple(nodes), tuple(sorted(concat)))


def along(line: Line, steps: int = 24) -> list[tuple[float, float]]:
    """Points on a line or curve."""
    points, (x, y) = [line.start], line.start
    for step in line.steps:
        controls = [(x, y), *step]
        for t in np.linspace(0, 1, steps):
            at = controls
            while len(at) > 1:  # de Casteljau
                at = [((1 - t) * a + t * c, (1 - t) * b + t * d) for (a, b), (c, d) in pairwise(at)]
            points.append(at[0])
        x, y = step[-1]
    return points


@settings(max_examples=40, deadline=None)
@given(cells(), st.sampled_from(["normal", "reduce"]))
def test_nothing_in_a_cell_overlaps(cell: Cell, kind: str) -> None:
    drawing = draw_cell(cell, kind)
    boxes = [(s.x, s.y, s.x + s.width, s.y + s.height) for s in drawing.shapes if isinstance(s, Box)]
    boxes += [(s.x - s.r, s.y - s.r, s.x + s.r, s.y + s.r) for s in drawing.shapes if isinstance(s, Dot)]
    operations = [s for s in drawing.shapes if isinstance(s, Box) and s.width == PILL]
    assert len(operations) == sum(map(len, cell.nodes))
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for line in (s for s in drawing.shapes if isinstance(s, Line)):
        for x, y in along(line):
            for left, top, right, bottom in boxes:
                assert not (left + 1 < x < right - 1 and top + 1 < y < bottom - 1), "a line runs through a box"
    assert min(min(left, top) for left, top, _, _ in boxes) >= 0
    assert max(right for _, _, right, _ in boxes) <= drawing.width
    assert max(bottom for _, _, _, bottom in boxes) <= drawing.height


@pytest.mark.parametrize("name", ["RNAS-L", "RNAS-H", "NASNet-A", "AmoebaNet-A", "PNAS", "AdvRush"])
def test_published_cells_fit_their_labels(name: str) -> None:
    found = published(name)
    assert isinstance(found, Genotype)
    drawing = cells_drawing(found, name)
    assert all(
        text_width(s.text, s.size) < PILL - 8 for s in drawing.shapes if isinstance(s, Text) and "conv" in s.text
    )


def test_cell_svg_is_a_file_of_its_own() -> None:
    svg = draw_cells(GENOTYPE, "a < b")
    root = ET.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"].startswith("a < b")
    assert "prefers-color-scheme:dark" in svg
    assert svg == draw_cells(GENOTYPE, "a < b")


def test_cell_in_words() -> None:
    text = describe_cell(GENOTYPE.normal)
    assert "Node 0 adds up dil conv 5×5 of the output of the cell before last and dil conv 5×5 of the output" in text
    assert "Node 1 adds up skip connect of node 0" in text


def test_figures_are_saved_by_their_ending(tmp_path: Path) -> None:
    drawing = cells_drawing(GENOTYPE, "The cells")
    for ending in ("svg", "png", "pdf"):
        drawing.save(tmp_path / f"cells.{ending}")
        assert (tmp_path / f"cells.{ending}").stat().st_size > 1000
    with Image.open(tmp_path / "cells.png") as image:
        assert image.size == (pytest.approx(2 * drawing.width, abs=2), pytest.approx(2 * drawing.height, abs=2))
    first = (tmp_path / "cells.pdf").read_bytes()
    drawing.save(tmp_path / "cells.pdf")
    assert (tmp_path / "cells.pdf").read_bytes() == first
    with pytest.raises(RnasError, match=r"\.svg, \.png or \.pdf"):
        drawing.save(tmp_path / "cells.gif")


def test_spread_is_least_squares() -> None:
    assert spread([0, 0, 10], [2, 2]) == pytest.approx([-1, 1, 10])
    assert spread([5, 1], [0]) == pytest.approx([3, 3])
    assert spread([5, 1], [0], [3, 1]) == pytest.approx([4, 4])


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.floats(0, 5))
def test_spread_keeps_distances_and_no_shift_is_better(wanted: list[float], room: float) -> None:
    places = spread(wanted, [room] * (len(wanted) - 1))
    assert all(b - a >= room - 1e-6 for a, b in pairwise(places))

    def cost(y: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(y, wanted, strict=True))

    for i in range(len(places)):  # moving a head or a tail of the row keeps it feasible, and must not help
        assert cost(places) <= cost([y - 1e-3 for y in places[: i + 1]] + places[i + 1 :]) + 1e-6
        assert cost(places) <= cost(places[:i] + [y + 1e-3 for y in places[i:]]) + 1e-6


def test_ticks_are_round() -> None:
    assert ticks(0, 1) == [0, 0.5, 1] or ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 47) == [20, 40]
    assert log_ticks(1e-5, 1e-2) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    assert len(log_ticks(1.1e-4, 2.9e-4)) >= 2


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.1234, "0.123"), (15, "15"), (1.5e-4, "1.5·10⁻⁴"), (1e-5, "10⁻⁵"), (-2e6, "-2·10⁶")]
)
def test_numbers_as_people_write_them(value: float, text: str) -> None:
    assert short(value) == text


def test_line_chart_leaves_gaps_and_names_lines() -> None:
    chart = line_chart(
        [1, 2, 3, 4], [Series("F", (1e-4, None, 2e-4, 0.0), "clean")], title="F", description="", log=True
    )
    dots = [s for s in chart.shapes if isinstance(s, Dot)]
    assert len(dots) == 2  # two single points; the zero has no place on a logarithmic axis
    assert "F" in [s.text for s in chart.shapes if isinstance(s, Text)]
    assert chart.data is not None
    assert chart.data["series"][0]["text"] == ["10⁻⁴", None, "2·10⁻⁴", "0"]


def test_dot_chart_places_values_in_proportion() -> None:
    rows = [("a", [Mark(0.0, "clean")]), ("b", [Mark(0.5, "clean", (0.4, 0.6))]), ("c", [Mark(1.0, "clean")])]
    chart = dot_chart(rows, title="", description="", span=(0.0, 1.0))
    x = [s.x for s in chart.shapes if isinstance(s, Dot)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1])


def test_bubbles_keep_their_labels_apart() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        points = draw.random((8, 3))
        bubbles = [Bubble(f"network {i}", x, y, size, "clean") for i, (x, y, size) in enumerate(points)]
        chart = bubble_chart(bubbles, title="", description="", across_name="x", up_name="y")
        labels = [s for s in chart.shapes if isinstance(s, Text) and s.text.startswith("network")]
        assert len(labels) == 8
        for a, b in combinations(labels, 2):
            apart = abs(a.y - b.y) > 10 or a.x + text_width(a.text, 12) < b.x or b.x + text_width(b.text, 12) < a.x
            assert apart, f"{a.text} lies on {b.text}"
        dots = [s for s in chart.shapes if isinstance(s, Dot)]
        shares = sorted(points[:, 2] / max(points[:, 2]))
        areas = sorted(dot.r**2 for dot in dots)
        for share, area in zip(shares, areas, strict=True):
            assert area / areas[-1] == pytest.approx(max(share, (3 / 14.5) ** 2))


def test_only_png_and_pdf_need_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys; import numpy as np; from pathlib import Path;"
        "from rnas.report.distortion import Maps, feature_figure;"
        "m = np.linspace(0, 1, 16, dtype=np.float32).reshape(1, 4, 4);"
        "feature_figure([Maps('layer', m, 1 - m)], 'maps').save(Path(sys.argv[1], 'maps.svg'));"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / "maps.svg").exists()
