"""The page's figures: what is drawn of a search, of networks, of images."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from rnas.genotype import Cell
from rnas.records.arrays import union
from rnas.records.schema import LayerDistortion
from rnas.report.drawing import theme
from rnas.report.drawing.cells import pretty, state_name
from rnas.report.drawing.charts import Bubble, Format, Mark, Series, bubble_chart, dot_chart, line_chart, percent, short
from rnas.report.drawing.shapes import Drawing, Text, png, polyline
from rnas.report.html import Html, el, join
from rnas.report.read import Examples, NetworkPart, SearchPart
from rnas.report.tables import accuracy, chance, columns_of, entry
from rnas.report.words import attack_name, threat
from rnas.wording import radius

DASH = (5.0, 4.0)


def figure(drawing: Drawing, caption: str, note: str) -> Html:
    """A drawing under its caption."""
    return el("figure", el("figcaption", caption, el("small", note)), Html(drawing.svg()))


def math_name(text: str) -> Html:
    """`c_{k-2}` with a real subscript."""
    parts = re.split(r"_\{(.*?)\}", text)
    return join(*(el("sub", part) if i % 2 else part for i, part in enumerate(parts)))


# --- a search -------------------------------------------------------------------------------------------------------


def search_charts(part: SearchPart) -> list[Html]:
    """The course of a search: F against H, accuracies, losses, the share of none, the projection."""
    x = part.numbers()
    if not x:
        return []
    phases = [e.phase for e in part.epochs]
    warm = max((e for e, phase in zip(x, phases, strict=True) if phase == "warmup"), default=0)
    shade = (float(warm), "warm-up") if warm else None
    charts: list[Html] = []

    def add(caption: str, note: str, series: list[Series], form: Format = short, log: bool = False) -> None:
        series = [s for s in series if any(v is not None for v in s.values)]
        if series:
            text = f"{note} {_ends(x, series, form)}"
            chart = line_chart(x, series, title=caption, description=text, form=form, log=log, shade=shade)
            charts.append(figure(chart, caption, note))

    add(
        "Network vulnerability F and its bound H",
        "Before each projection and after it, and of the discretised cell with the supernet's weights; logarithmic.",
        [
            Series("before", part.column("F_before"), "adversarial", (2.0, 3.0), 1.6),
            Series("F", part.column("F"), "clean", width=2.4),
            Series("cell", part.column("F_cell"), "series-3", DASH, 1.3),
            Series("H", part.column("H"), "bound", DASH, 1.6),
        ],
        log=True,
    )
    add(
        "Accuracy",
        "On images of both halves of the training data; dashed: the half that trains the weights.",
        [
            Series("clean", part.column("val", "clean_accuracy"), "clean", width=2.2),
            Series("adversarial", part.column("val", "adversarial_accuracy"), "adversarial", width=2.2),
            Series("clean, weights", part.column("train", "clean_accuracy"), "clean", DASH, 1.3, label=False),
            Series(
                "adversarial, weights",
                part.column("train", "adversarial_accuracy"),
                "adversarial",
                DASH,
                1.3,
                label=False,
            ),
        ],
        form=_percent,
    )
    add(
        "Losses",
        "Solid: on the images that a step trains on, for the weights θ and the architecture α. Dashed: measured after "
        "each epoch on the half that trains α, on clean and on adversarial images.",
        [
            Series("θ", part.column("theta_loss"), "series-3"),
            Series("α", part.column("alpha_loss"), "series-4"),
            Series("clean", part.column("val", "clean_loss"), "clean", DASH, 1.5),
            Series("adversarial", part.column("val", "adversarial_loss"), "adversarial", DASH, 1.5),
        ],
    )
    add(
        "Multiplier",
        "How hard the bound pushes: the multiplier λ of F ≤ H when a projection ends.",
        [Series("λ", part.column("multiplier"), "series-4", width=2.2)],
    )
    add(
        "How far the projection moved α",
        "‖α − αₚ‖ of each epoch.",
        [Series("distance", part.column("distance"), "series-3", width=2.2)],
    )
    add(
        "Share of none",
        "Mean weight of the operation none: it shrinks features, and so F, but is thrown away at the end.",
        [Series("none", part.column("none_share"), "soft", width=2.2)],
        form=_percent,
    )
    return charts


def _percent(value: float) -> str:
    return f"{100 * value:.3g}\u202f%"


def _ends(x: Sequence[int], series: Sequence[Series], form: Format) -> str:
    parts = []
    for s in series:
        known = [(e, v) for e, v in zip(x, s.values, strict=True) if v is not None]
        (first, start), (last, end) = known[0], known[-1]
        parts.append(f"{s.name} {form(start)} at epoch {first}, {form(end)} at epoch {last}")
    return "; ".join(parts) + "."


def alpha_grid(part: SearchPart, kind: str, cell: Cell | None) -> Html:
    """The weights of all operations over the epochs, one small chart for each edge, in a triangle: a row for each
    node, a column for each source. Edges that the cell keeps stand out."""
    weights = part.strengths[kind]
    nodes = round((math.sqrt(9 + 8 * weights.shape[1]) - 3) / 2)
    low, high = float(weights[weights > 0].min(initial=1)), float(weights.max())
    if high - low < 0.02:
        low, high = max(0.0, low - 0.01), min(1.0, high + 0.01)
    charts = [_alpha_legend(part.operations)]
    edge = 0
    for node in range(nodes):
        for source in range(node + 2):
            kept = [op for op, s in cell.nodes[node] if s == source] if cell and node < len(cell.nodes) else []
            charts.append(_alpha_figure(weights[:, edge], part.operations, source, node, kept, low, high))
            edge += 1
    return el("div", *charts, class_="alphas", style=f"--columns:{nodes + 1}")


def _alpha_legend(operations: Sequence[str]) -> Html:
    items = (
        el("li", el("span", style=f"border-color:var(--{_role(op)})", aria_hidden="true"), pretty(op))
        for op in operations
    )
    return el("ul", *items, class_="legend", style="grid-row:1;grid-column:3/-1")


def _role(operation: str) -> str:
    return operation if operation in theme.COLORS else "soft"


def _alpha_figure(
    weights: NDArray[np.float64],
    operations: Sequence[str],
    source: int,
    node: int,
    kept: Sequence[str],
    low: float,
    high: float,
) -> Html:
    width, height, left = 200.0, 84.0, 34.0
    last = len(weights) - 1
    end = weights[-1]
    strongest = operations[int(np.argmax(end))]
    name = f"{state_name(source)} → {node}"
    sources = ("the output of the cell before last", "the output of the last cell")
    plain = f"from {sources[source] if source < 2 else f'node {source - 2}'} to node {node}"
    ranked = sorted(zip(operations, end, strict=True), key=lambda pair: -pair[1])
    described = ", ".join(f"{pretty(op)} {_percent(float(w))}" for op, w in ranked)
    out = Drawing(width, height, f"Weights of the edge {plain}", f"At the end: {described}.")

    def up(w: float) -> float:
        return height - 8 - (w - low) / (high - low) * (height - 18)

    for mark in (low, high):
        out.shapes.append(polyline([(left, up(mark)), (width, up(mark))], stroke="rule", width=1))
        out.shapes.append(Text(left - 4, up(mark) + 4, f"{100 * mark:.0f} %", 10.5, "faint", "end"))
    order = sorted(range(len(operations)), key=lambda i: (operations[i] in kept, end[i]))
    for i in order:
        points = [
            (left + (width - left) * t / max(last, 1), up(float(w)))
            for t, w in enumerate(weights[:, i])
            if w > 0  # or else it is pruned: the line ends
        ]
        strong = operations[i] in kept or (not kept and operations[i] == strongest)
        dash = (2.0, 2.5) if operations[i] == "none" else ()
        if len(points) > 1:
            out.shapes.append(polyline(points, stroke=_role(operations[i]), width=2.6 if strong else 1.2, dash=dash))
    label = el("b", " + ".join(map(pretty, kept))) if kept else join(pretty(strongest))
    caption = el("figcaption", el("span", math_name(name)), el("span", label))
    place = f"grid-row:{node + 1};grid-column:{source + 1}"
    return el("figure", caption, Html(out.svg()), class_="kept" if kept else None, style=place)


# --- networks -------------------------------------------------------------------------------------------------------


def accuracy_chart(networks: Sequence[NetworkPart]) -> Html:
    """Every network of one test under every attack, with intervals, and chance."""
    rows: list[tuple[str, list[Mark | None]]] = []
    for name in columns_of(networks):
        marks = [_mark(part, name, theme.series(i)) for i, part in enumerate(networks)]
        if any(marks):
            rows.append((attack_name(name), marks))
    title = "Accuracy under every attack, with 95 % Wilson intervals"
    described = " ".join(
        f"{part.name}: "
        + ", ".join(f"{name} {percent(m.value)}" for name, marks in rows if (m := marks[i]) is not None)
        + "."
        for i, part in enumerate(networks)
    )
    by_chance = chance(networks[0])
    line = None if by_chance is None else (by_chance, f"chance {percent(by_chance)}")
    described += "" if line is None else f" Dashed: {line[1]}."
    chart = dot_chart(rows, title=title, description=described, span=(0.0, 1.0), width=400, values=True, line=line)
    keys = ((part.name, theme.series(i)) for i, part in enumerate(networks))
    return el("figure", _legend(keys) if len(networks) > 1 else None, Html(chart.svg()))


def _legend(networks: Iterable[tuple[str, str]]) -> Html:
    """Names beside their colours."""
    keys = (
        el("li", el("span", style=f"border-color:var(--{role})", aria_hidden="true"), name) for name, role in networks
    )
    return el("ul", *keys, class_="legend")


def _mark(part: NetworkPart, attack: str, role: str) -> Mark | None:
    found = entry(part, attack)
    return None if found is None else Mark(found.accuracy, role, found.interval)


def trade_off_chart(networks: Sequence[NetworkPart]) -> Html | None:
    """Robust against clean accuracy, bubbles by parameters (Fig. 1): for three networks and more of one test."""
    bubbles = []
    for i, part in enumerate(networks):
        clean, union = accuracy(part, "clean"), accuracy(part, "union")
        if clean is not None and union is not None:
            bubbles.append(Bubble(part.name, clean, union, float(part.parameters or 0), theme.series(i)))
    if len(bubbles) < 3:
        return None
    title = "Robust against clean accuracy"
    chart = bubble_chart(
        bubbles,
        title=title,
        description="; ".join(f"{b.name}: clean {percent(b.x)}, robust {percent(b.y)}" for b in bubbles) + ".",
        across_name="clean accuracy →",
        up_name="↑ accuracy under all attacks",
        form=_percent,
    )
    return figure(chart, title, "The larger a bubble, the more parameters the network has; the smallest are dots.")


def training_charts(networks: Sequence[NetworkPart]) -> list[Html]:
    """Loss and accuracy on the training images, all networks together."""
    trained = [(i, part) for i, part in enumerate(networks) if part.epochs]
    if not trained:
        return []
    x = sorted({e for _, part in trained for e in part.numbers()})

    def lines(keys: tuple[tuple[str, ...], ...]) -> list[Series]:
        out = []
        for i, part in trained:
            known: dict[int, float] = {}
            for key in keys:
                known |= {e: v for e, v in zip(part.numbers(), part.column(*key), strict=True) if v is not None}
            width = 2.0 + 2.0 * min(2, trained[-1][0] - i)  # a line below another shows at its sides
            out.append(Series(part.name, tuple(known.get(e) for e in x), theme.series(i), width=width))
        return [s for s in out if any(v is not None for v in s.values)]

    charts = []
    both = (("train", "clean_accuracy"), ("train", "adversarial_accuracy"))
    for caption, note, keys, form in (
        ("Training loss", "On the images that the network is trained on, clean or adversarial.", (("loss",),), short),
        ("Training accuracy", "On the same images: adversarial ones where training is adversarial.", both, _percent),
        ("Learning rate", "Along a cosine.", (("lr",),), short),
    ):
        series = lines(keys)
        if series:
            chart = line_chart(x, series, title=caption, description=f"{note} {_ends(x, series, form)}", form=form)
            charts.append(figure(chart, caption, note))
    return charts


Distorted = tuple[str, str, LayerDistortion]
"""A network's name, its colour, and its distortion.json."""


def distortion_drawings(networks: Sequence[Distorted]) -> list[tuple[Drawing, list[Distorted]]]:
    """Distortion by layer (Fig. 3), networks together where they have the same layers; with each drawing its
    networks. What has no distortion at all is not drawn."""
    groups: dict[tuple[tuple[str, ...], str], list[Distorted]] = {}
    for network in networks:
        layers = network[2].layers
        groups.setdefault((layers, _measured_by(network[2])), []).append(network)
    drawings = []
    for (layers, _), members in groups.items():
        rows = [(layer, [Mark(d.vulnerability[k], role) for _, role, d in members]) for k, layer in enumerate(layers)]
        if all(m.value <= 0 for _, marks in rows for m in marks):
            continue
        title = f"Distortion by layer of {', '.join(name for name, _, _ in members)}"
        described = "From the first layer to the last: " + "; ".join(
            f"{name} " + ", ".join(short(v) for v in d.vulnerability) for name, _, d in members
        )
        drawing = dot_chart(
            rows, title=title, description=described + ".", form=short, log=True, unit=_unit(members[0][2])
        )
        drawings.append((drawing, members))
    return drawings


def _unit(record: LayerDistortion) -> str:
    """What a distortion is measured in."""
    each = "" if record.reduction == "sum" else ", mean over the positions of a channel"
    return f"KL divergence in nats{each}"


def _measured_by(record: LayerDistortion) -> str:
    """Under which attack, and how, a distortion was measured: figures of others cannot share an axis."""
    attack = attack_name(record.attack) if record.attack else None
    return ", ".join(s for s in (attack, threat(record), record.reduction, record.features) if s)


def distortion_chart(networks: Sequence[NetworkPart]) -> Html | None:
    """Distortion by layer (Fig. 3), networks together where they have the same layers."""
    having = [(part.name, theme.series(i), part.distortion) for i, part in enumerate(networks) if part.distortion]
    if len({_measured_by(record) for _, _, record in having}) > 1:
        having = [(f"{name} ({_measured_by(record)})", role, record) for name, role, record in having]
    charts = [
        el("figure", _legend((name, role) for name, role, _ in members), Html(drawing.svg()))
        for drawing, members in distortion_drawings(having)
    ]
    return el("div", *charts, class_="grid") if charts else None


def class_rows(part: NetworkPart) -> list[tuple[str, int, float, float]]:
    """Of every class: name, images, clean accuracy, that under all bounded attacks. Empty if masks have no labels."""
    robust = union(part.masks)
    if part.labels is None or "clean" not in part.masks or robust is None:
        return []
    rows = []
    for k in np.unique(part.labels):
        here = part.labels == k
        name = part.classes[k] if 0 <= k < len(part.classes) else f"class {k}"
        rows.append((name, int(here.sum()), float(part.masks["clean"][here].mean()), float(robust[here].mean())))
    return rows


def class_chart(part: NetworkPart, rows: Sequence[tuple[str, int, float, float]], most: int = 24) -> Html:
    """Clean and robust accuracy of the classes, the least robust first; of many classes only those."""
    shown = sorted(rows, key=lambda row: row[3])[:most]
    marks = [
        (name, [Mark(robust, "adversarial"), Mark(clean, "clean", hollow=True)]) for name, _, clean, robust in shown
    ]
    caption = part.name if len(rows) <= most else f"{part.name}: the {most} least robust of {len(rows)} classes"
    described = "; ".join(
        f"{name} clean {percent(clean)}, robust {percent(robust)}" for name, _, clean, robust in shown
    )
    title = f"Accuracy by class, {caption}"
    chart = dot_chart(marks, title=title, description=described + ".", span=(0.0, 1.0), join=True)
    return figure(chart, caption, "Open: clean. Filled: under all attacks of the evaluation.")


def example_figures(part: NetworkPart, examples: Examples, most: int = 12) -> Html:
    """Images, their adversarial versions, and the difference on a diverging scale of ±ε."""
    clean = examples.clean / 255.0
    difference = (examples.adversarial - clean).mean(-1)  # over the channels
    bound = part.evaluation.eps if part.evaluation and part.evaluation.norm == "linf" else None
    scale = bound or float(np.abs(difference).max(initial=0.0)) or 1.0
    shown = radius(scale)

    def name(k: int) -> str:
        return part.classes[k] if 0 <= k < len(part.classes) else f"class {k}"

    figures = []
    for i in range(min(most, len(clean))):
        label, before, after = (
            int(a[i]) for a in (examples.label, examples.clean_prediction, examples.adversarial_prediction)
        )
        images = (
            _image(clean[i], f"Class {name(label)}, clean"),
            _image(examples.adversarial[i], f"The same image after {attack_name(examples.attack)}"),
            _image(diverging(difference[i] / scale), f"The difference, on a scale of -{shown} to +{shown}"),
        )
        caption = el(
            "figcaption",
            "Class ",
            el("b", name(label)),
            ": answer ",
            el("span", name(before), class_="right" if before == label else "wrong"),
            ", attacked ",
            el("span", name(after), class_="right" if after == label else "wrong"),
        )
        figures.append(el("figure", el("div", *images, class_="row"), caption))
    note = (
        f"Left: clean. Middle: after {attack_name(examples.attack)}. Right: how much the attack changed, mean of the "
        f"colours: blue is darker by up to {shown}{' = ε' if bound else ''}, white unchanged, red brighter."
    )
    large = " large" if min(clean.shape[1:3]) >= 48 else ""
    return join(el("p", note, class_="note"), el("div", *figures, class_=f"examples{large}"))


def diverging(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values (H,W) from -1 to 1 as colours (H,W,3): blue, white at 0, red. What is beyond stops at the ends."""
    share = np.clip(np.abs(values), 0, 1)[..., None]
    ends = np.where(values[..., None] < 0, [0.13, 0.40, 0.67], [0.70, 0.09, 0.17])
    return np.asarray(1 - share * (1 - ends), dtype=np.float64)


def _image(pixels: NDArray[np.float64], description: str) -> Html:
    """`pixels` (H,W,3) in [0,1] as an image inside the page."""
    data = png(np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8))
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return el("img", src=source, alt=description, width=pixels.shape[1], height=pixels.shape[0])
