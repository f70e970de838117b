"""A genotype's cells as graphs, in a layered layout of our own (Sugiyama et al. 1981).

Operations are boxes with places of their own, so that no label lies on a line or on another label. Whatever passes a
layer gets a place in it too: a state that is used further on runs past the layers between as one rail, from which the
edges branch off.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rnas.genotype import Cell, Genotype
from rnas.report.drawing.layout import spread
from rnas.report.drawing.shapes import Box, Dot, Drawing, Line, Point, Text, moved

# what it is, which state it belongs to, which of its operations or which layer
Key = tuple[str, int, int]
PILL = 122.0
"""Width of an operation's box."""
STATE = 17.0
"""Radius of a node."""
BEND = {True: 62.0, False: 40.0}
"""Room for the lines that enter a layer of operations, and one of nodes."""
TITLES = {"normal": "Normal cell", "reduce": "Reduction cell"}


def pretty(operation: str) -> str:
    """`dil_conv_5x5` as people write it."""
    return re.sub(r"(\d)x(\d)", r"\1×\2", operation.replace("_", " "))


def state_name(state: int) -> str:
    """The paper's names: the outputs of the two cells before, then the cell's own nodes from 0."""
    return ("c_{k-2}", "c_{k-1}")[state] if state < 2 else str(state - 2)


@dataclass
class _Graph:
    """Vertices by layer, from top to bottom, and the lines between neighbouring layers."""

    layers: list[list[Key]] = field(default_factory=list)
    lines: list[tuple[Key, Key]] = field(default_factory=list)
    height: dict[Key, float] = field(default_factory=dict)
    y: dict[Key, float] = field(default_factory=dict)

    def add(self, layer: int, key: Key, height: float) -> None:
        while len(self.layers) <= layer:
            self.layers.append([])
        if key not in self.height:
            self.layers[layer].append(key)
            self.height[key] = height


def _graph(cell: Cell) -> _Graph:
    depth = {0: 0, 1: 0}
    for i, edges in enumerate(cell.nodes):
        depth[i + 2] = 1 + max((depth[source] for _, source in edges), default=0)
    out = 2 * max(depth.values()) + 1
    graph = _Graph()
    for state in (0, 1):
        graph.add(0, ("state", state, 0), 2 * STATE)

    def reach(state: int, layer: int) -> Key:
        """The end in `layer` of the rail that `state` runs on."""
        at: Key = ("state", state, 0)
        for i in range(2 * depth[state] + 1, layer + 1):
            rail = ("rail", state, i)
            if rail not in graph.height:
                graph.add(i, rail, 10.0)
                graph.lines.append((at, rail))
            at = rail
        return at

    for i, edges in enumerate(cell.nodes):
        state = i + 2
        graph.add(2 * depth[state], ("state", state, 0), 2 * STATE)
        for j, (_, source) in enumerate(edges):
            pill = ("pill", state, j)
            graph.add(2 * depth[state] - 1, pill, 26.0)
            graph.lines.append((reach(source, 2 * depth[state] - 2), pill))
            graph.lines.append((pill, ("state", state, 0)))
    for state in cell.concat:
        reach(state, out)
    return graph


def _neighbours(graph: _Graph) -> tuple[dict[Key, list[Key]], dict[Key, list[Key]]]:
    before: dict[Key, list[Key]] = {key: [] for key in graph.height}
    after: dict[Key, list[Key]] = {key: [] for key in graph.height}
    for a, b in graph.lines:
        after[a].append(b)
        before[b].append(a)
    return before, after


def _cost(layers: Sequence[Sequence[Key]], after: dict[Key, list[Key]]) -> tuple[int, int, float]:
    """Crossings, then nodes above ones with smaller numbers, then the total of how far lines climb."""
    crossings, climb = 0, 0.0
    for left, right in pairwise(layers):
        place = {key: i for i, key in enumerate(right)}
        ends = [(i, place[b]) for i, a in enumerate(left) for b in after[a]]
        crossings += sum((a - c) * (b - d) < 0 for k, (a, b) in enumerate(ends) for c, d in ends[:k])
        climb += sum(abs((a + 0.5) / len(left) - (b + 0.5) / len(right)) for a, b in ends)
    turned = sum(
        a[0] == b[0] == "state" and a[1] > b[1] for layer in layers for i, b in enumerate(layer) for a in layer[:i]
    )
    return crossings, turned, climb


def _sort(graph: _Graph, starts: int = 24, sweeps: int = 8) -> None:
    """Order every layer for few crossings: barycentre sweeps from several seeded starts; the best one stays.

    The inputs keep their order, c_{k-2} above c_{k-1}."""
    before, after = _neighbours(graph)
    draw = random.Random(0)
    best, cost = [list(layer) for layer in graph.layers], _cost(graph.layers, after)
    for start in range(starts):
        layers = [list(layer) for layer in graph.layers]
        if start:
            for layer in layers[1:]:
                draw.shuffle(layer)
        for sweep in range(sweeps):
            forth = sweep % 2 == 0
            order = range(1, len(layers)) if forth else range(len(layers) - 2, 0, -1)
            for i in order:
                near = layers[i - 1] if forth else layers[i + 1]
                place = {key: j for j, key in enumerate(near)}
                sides = before if forth else after
                centre = {
                    key: sum(place[n] for n in sides[key]) / len(sides[key]) if sides[key] else float(j)
                    for j, key in enumerate(layers[i])
                }
                layers[i].sort(key=lambda key: centre[key])
            found = _cost(layers, after)
            if found < cost:
                best, cost = [list(layer) for layer in layers], found
    graph.layers = best


def _place(graph: _Graph, sweeps: int = 240) -> None:
    """Heights: every vertex as near as the order allows to the mean of its neighbours, long rails straight."""
    before, after = _neighbours(graph)
    gap = 9.0

    def pull(a: Key, b: Key) -> float:
        rails = (a[0] == "rail") + (b[0] == "rail")
        return (1.0, 2.0, 24.0)[rails]

    for layer in graph.layers:
        top = 0.0
        for key in layer:
            graph.y[key] = top + graph.height[key] / 2
            top += graph.height[key] + gap
        for key in layer:
            graph.y[key] -= (top - gap) / 2
    for sweep in range(sweeps):
        for layer in graph.layers if sweep % 2 == 0 else graph.layers[::-1]:
            near = {key: [(n, pull(key, n)) for n in before[key] + after[key]] for key in layer}
            weights = [sum(w for _, w in near[key]) or 1e-6 for key in layer]
            wanted = [
                sum(graph.y[n] * w for n, w in near[key]) / weight if near[key] else graph.y[key]
                for key, weight in zip(layer, weights, strict=True)
            ]
            room = [(graph.height[a] + graph.height[b]) / 2 + gap for a, b in pairwise(layer)]
            graph.y.update(zip(layer, spread(wanted, room, weights), strict=True))


@functools.lru_cache(64)
def _layout(cell: Cell) -> _Graph:
    graph = _graph(cell)
    _sort(graph)
    _place(graph)
    return graph


def describe_cell(cell: Cell) -> str:
    """The cell in words: what every node adds up."""
    names = ["the output of the cell before last", "the output of the last cell"]
    names += [f"node {i}" for i in range(len(cell.nodes))]
    sums = [
        f"Node {i} adds up {' and '.join(f'{pretty(operation)} of {names[source]}' for operation, source in edges)}."
        for i, edges in enumerate(cell.nodes)
    ]
    return " ".join([*sums, f"The output joins the channels of {', '.join(names[node] for node in cell.concat)}."])


def draw_cell(cell: Cell, kind: str, title: str | None = None) -> Drawing:
    """One cell as a graph from left to right. `kind`: `normal`, or `reduce`, where edges from the inputs halve the
    image (marked ↓2)."""
    graph = _layout(cell)
    out = len(graph.layers) - 1
    left, right = [0.0] * (out + 1), [0.0] * (out + 1)
    x = 8.0
    for i in range(out + 1):
        width = 52.0 if i == 0 else 22.0 if i == out else PILL if i % 2 else 2 * STATE
        x += 0.0 if i == 0 else BEND[i % 2 == 1]
        left[i], right[i] = x, x + width
        x += width
    margin = 12.0
    ends = [graph.y[key] for key in graph.layers[out]]
    high, low = min(ends) - 20, max(ends) + 20  # the output's box
    top = min(high, *(graph.y[k] - graph.height[k] / 2 for k in graph.y)) - margin
    bottom = max(low, *(graph.y[k] + graph.height[k] / 2 for k in graph.y)) + margin
    label = f"{TITLES.get(kind, kind)}{f' of {title}' if title else ''}"
    drawing = Drawing(x + 40, bottom - top, label, describe_cell(cell))
    layer_of = {key: i for i, layer in enumerate(graph.layers) for key in layer}

    def at(key: Key, side: list[float]) -> Point:
        return side[layer_of[key]], graph.y[key] - top

    rails: list[Line] = []
    edges: list[Line] = []
    boxes: list[Box | Dot | Text | Line] = []
    for a, b in graph.lines:
        colour = "rail"
        if b[0] == "pill":
            colour = cell.nodes[b[1] - 2][b[2]][0]
        elif a[0] == "pill":
            colour = cell.nodes[a[1] - 2][a[2]][0]
        (x0, y0), (x1, y1) = at(a, right), at(b, left)
        bend = (x0 + x1) / 2
        curve = Line((x0, y0), (((bend, y0), (bend, y1), (x1, y1)),), stroke=colour, width=1.8)
        (rails if colour == "rail" else edges).append(curve)
    for layer in graph.layers:
        for key in layer:
            (x0, y), (x1, _) = at(key, left), at(key, right)
            match key:
                case ("rail", _, i):
                    end = x1 if i < out else x0
                    rails.append(Line((x0, y), (((end, y),),), stroke="rail", width=1.8))
                case ("pill", state, j):
                    operation, source = cell.nodes[state - 2][j]
                    boxes.append(Box(x0, y - 13, x1 - x0, 26, 13, fill="surface", stroke=operation, line=1.6))
                    mark = "  ↓2" if kind == "reduce" and source < 2 else ""
                    boxes.append(Text((x0 + x1) / 2, y + 4.2, pretty(operation) + mark, 12.0, "ink", "middle"))
                case (_, state, _) if state < 2:
                    boxes.append(Box(x0, y - STATE, x1 - x0, 2 * STATE, 8, fill="sunken", stroke="soft", line=1.4))
                    boxes.append(Text((x0 + x1) / 2, y + 4, state_name(state), 14.0, "ink", "middle", italic=True))
                case (_, state, _):
                    boxes.append(Dot((x0 + x1) / 2, y, STATE, fill="surface", stroke="ink", line=1.6))
                    boxes.append(Text((x0 + x1) / 2, y + 5, state_name(state), 14.5, "ink", "middle", bold=True))
    high, low = high - top, low - top
    boxes.append(Box(left[out], high, 22, low - high, 7, fill="sunken", stroke="soft", line=1.4))
    middle = (high + low) / 2
    boxes.append(Line((right[out], middle), (((right[out] + 14, middle),),), stroke="rail", width=1.8))
    boxes.append(Text(right[out] + 18, middle + 4, "c_{k}", 14.0, "ink", italic=True))
    drawing.shapes = [*rails, *edges, *boxes]
    return drawing


def cells_drawing(genotype: Genotype, title: str | None = None) -> Drawing:
    """Both cells in one drawing, the normal one above."""
    parts = [("normal", draw_cell(genotype.normal, "normal")), ("reduce", draw_cell(genotype.reduce, "reduce"))]
    width = max(part.width for _, part in parts) + 32
    y = 22.0
    out = Drawing(width, 0, title or "The cells", " ".join(f"{p.title}: {p.description}" for _, p in parts))
    if title:
        out.shapes.append(Text(16, y + 6, title, 18, bold=True))
        y += 30
    for kind, part in parts:
        out.shapes.append(Text(16, y + 10, TITLES[kind], 14, "soft", bold=True))
        y += 22
        out.shapes.extend(moved(shape, 16, y) for shape in part.shapes)
        y += part.height + 14
    out.height = y
    return out


def draw_cells(genotype: Genotype, title: str | None = None) -> str:
    """Both cells as an SVG file's text, which turns dark where the reader prefers it."""
    return cells_drawing(genotype, title).svg(standalone=True)
