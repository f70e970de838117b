"""The sections of the page, each a function of what was read; None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rnas.errors import RnasError
from rnas.genotype import Cell, Genotype
from rnas.report import figures, tables
from rnas.report.compare import Comparison, compare_networks, shown_best
from rnas.report.drawing.cells import TITLES, draw_cell
from rnas.report.html import Html, el, join
from rnas.report.read import NetworkPart, Part, SearchPart
from rnas.report.words import CW_CAVEAT, CW_L2_CAVEAT, epochs, work_sentence
from rnas.wording import duration

CHAIN = (
    "One measure, of different networks on different images: those of the search on the images that it monitors, under "
    "its own attack; the trained one on test images. A bound that held for the supernet says nothing yet of the others."
)


class Section(NamedTuple):
    """A section of the page; `link` is its short name in the bar at the top."""

    anchor: str
    link: str
    heading: str
    content: Html


def sections(parts: Sequence[Part]) -> list[Section]:
    """Those that there is something for, in the order of the page."""
    searches = [p for p in parts if isinstance(p, SearchPart)]
    networks = [p for p in parts if isinstance(p, NetworkPart)]
    evaluated = [p for p in networks if p.evaluation is not None]
    found = (
        _results(evaluated),
        _architecture(searches, networks),
        _course(searches, networks),
        _alphas(searches),
        _training(networks),
        _distortion(networks),
        _examples(networks),
        _classes(evaluated),
        _settings(parts),
    )
    return [section for section in found if section]


def _results(evaluated: Sequence[NetworkPart]) -> Section | None:
    if not evaluated:
        return None
    published = sorted({n for p in evaluated if (n := tables.paper_table_number(p)) is not None})
    notes = [
        "The intervals are Wilson's, at 95 %: with other test images of the same kind, the figure could lie anywhere "
        "in them.",
        "An attack gives an upper bound: a stronger one may find what these missed. The union counts an image only if "
        "it withstands every attack that ε bounds.",
        "Chance is what always answering the largest class gets: a figure near it says nothing of robustness.",
    ]
    if published or any({"cw", "cw-l2"} & set(tables.attacks_of([p])) for p in evaluated):
        notes.append(CW_CAVEAT)
    if "cw-l2" in tables.attacks_of(evaluated):
        notes.append(CW_L2_CAVEAT)
    notes += [
        f"{p.name} was evaluated {len(p.kept)} times, with different settings: shown is {p.shown}."
        for p in evaluated
        if len(p.kept) > 1
    ]
    beside = el("div", el("h3", "How to read this"), *(el("p", note, class_="note") for note in notes))
    together = [p for p in evaluated if tables.same_test([p, evaluated[0]])]
    only = (
        None
        if together == list(evaluated)
        else f"Only {', '.join(p.name for p in together)}: the others' test differs."
    )
    chart = el("div", el("p", only, class_="note") if only else None, figures.accuracy_chart(together), class_="card")
    best, comparison = _compared(evaluated)
    trade_off = figures.trade_off_chart(evaluated) if tables.comparable(evaluated) else None
    if trade_off:
        beside = el("div", el("div", trade_off, class_="card"), beside)
    parts = [tables.results_table(evaluated, best), el("div", chart, beside, class_="beside")]
    if comparison:
        parts += [el("h3", "Compared image by image"), comparison]
    for number in published:
        note = (
            "The paper trained for 600 epochs at its full size on all images; compare only what was trained and "
            "evaluated like that."
        )
        members = [p for p in evaluated if tables.paper_table_number(p) == number]
        parts += [el("h3", "Beside the paper"), el("p", note, class_="note"), tables.paper_table(members, number)]
    return Section("results", "Results", "Results", join(*parts))


def _compared(evaluated: Sequence[NetworkPart], most: int = 6) -> tuple[dict[str, str], Html | None]:
    """Paired tests, where the evaluations are of the same images: for each attack the network that is shown to be the
    best, and the tests as a table, which pairs make too long for many networks."""
    if len(evaluated) < 2:
        return {}, None
    try:
        rows: list[Comparison] = compare_networks(evaluated)
    except RnasError as e:
        return {}, el("p", f"Not compared: {e}.", class_="note") if len(evaluated) <= most else None
    # A column holds bold figures only if all networks stand in it: of attacks that some did not face, no best is shown.
    faced = [set(tables.attacks_of([part])) for part in evaluated]
    everyone = {"clean", *set.intersection(*faced), *(("union",) if tables.comparable(evaluated) else ())}
    best = {attack: name for attack, name in shown_best(rows).items() if attack in everyone}
    return best, tables.comparison_table(rows) if len(evaluated) <= most else None


def _architecture(searches: Sequence[SearchPart], networks: Sequence[NetworkPart]) -> Section | None:
    """Every different architecture once, with the names of those that have it."""
    owners: dict[Genotype, list[Part]] = {}
    for part in (*searches, *networks):
        if isinstance(part, SearchPart | NetworkPart) and isinstance(part.genotype, Genotype):
            owners.setdefault(part.genotype, []).append(part)
    if not owners:
        return None
    blocks = []
    for genotype, parts in owners.items():
        names = ", ".join(part.name for part in parts)
        if len(owners) > 1:
            blocks.append(el("h3", names))
        for kind, cell in (("normal", genotype.normal), ("reduce", genotype.reduce)):
            blocks.append(_cell_figure(cell, kind, names))
    note = (
        "Read from left to right. A node adds up what its operations make of earlier states; "
        "the cell's output joins the channels of its nodes."
    )
    if any(g.reduce for g in owners):
        note += " ↓2: this operation halves height and width."
    return Section("cells", "Cells", "The cells", join(el("p", note), *blocks))


def _cell_figure(cell: Cell, kind: str, names: str) -> Html:
    drawing = draw_cell(cell, kind, names)
    # Never larger than life: a shallow cell beside a deep one has letters of the same size.
    svg = Html(
        drawing.svg(min_width=0.72 * drawing.width).replace('style="', f'style="max-width:{drawing.width:.0f}px;', 1)
    )
    label = f"{TITLES[kind]}, drawing"
    return el(
        "figure",
        el("figcaption", TITLES[kind]),
        el("div", svg, class_="scroll", tabindex=0, role="region", aria_label=label),
        class_="cell card",
    )


def _course(searches: Sequence[SearchPart], networks: Sequence[NetworkPart]) -> Section | None:
    def charts(part: SearchPart) -> Html | None:
        found = figures.search_charts(part)
        chain = tables.vulnerability_table(part, networks)
        if not found:
            return None
        below = [el("h3", "F from the bound to the trained network"), el("p", CHAIN, class_="note"), chain]
        return join(el("div", *found, class_="grid"), *(below if chain else ()))

    return _per_search(searches, "search", "Search", "The search", charts)


def _per_search(
    searches: Sequence[SearchPart], anchor: str, link: str, heading: str, make: Callable[[SearchPart], Html | None]
) -> Section | None:
    blocks: list[Html] = []
    for part in searches:
        content = make(part)
        if content:
            blocks += [el("h3", part.name)] if len(searches) > 1 else []
            blocks.append(content)
    return Section(anchor, link, heading, join(*blocks)) if blocks else None


def _alphas(searches: Sequence[SearchPart]) -> Section | None:
    def both(part: SearchPart) -> Html | None:
        if not part.strengths:
            return None
        blocks = []
        for kind in part.strengths:
            cell = getattr(part.genotype, kind, None)
            blocks += [el("h3", TITLES.get(kind, kind)), figures.alpha_grid(part, kind, cell)]
        return join(*blocks)

    found = _per_search(searches, "alpha", "Weights", "How the architecture weights moved", both)
    if not found:
        return None
    note = el(
        "p",
        "How much of each operation over the epochs (of most methods the softmax of α; a line ends where its operation "
        "is pruned), one chart for each edge: rows are the nodes that an edge enters, columns the "
        "states that it comes from. The cell keeps two edges of each node (framed), each with its strongest operation "
        "besides none.",
    )
    return found._replace(content=join(note, found.content))


def _training(networks: Sequence[NetworkPart]) -> Section | None:
    charts = figures.training_charts(networks)
    if not charts:
        return None
    times = [
        f"{p.name}: {epochs(len(p.epochs))} in {duration(sum(v for v in p.column('seconds') if v is not None))}"
        for p in networks
        if p.epochs
    ]
    content = join(el("p", "; ".join(times) + "."), el("div", *charts, class_="grid"))
    return Section("training", "Training", "Training", content)


def _distortion(networks: Sequence[NetworkPart]) -> Section | None:
    chart = figures.distortion_chart(networks)
    note = "How far an attack moves the features of each layer, from the first layer (top) to the last."
    if not chart:
        return None
    return Section("distortion", "Distortion", "Distortion by layer", join(el("p", note), chart))


def _examples(networks: Sequence[NetworkPart]) -> Section | None:
    blocks: list[Html] = []
    having = [p for p in networks if p.examples and len(p.examples.clean)]
    for part in having:
        assert part.examples is not None
        blocks += [el("h3", part.name)] if len(having) > 1 else []
        blocks.append(figures.example_figures(part, part.examples))
    return Section("examples", "Examples", "Examples", join(*blocks)) if blocks else None


def _classes(evaluated: Sequence[NetworkPart]) -> Section | None:
    charts, details = [], []
    for part in evaluated:
        rows = figures.class_rows(part)
        if rows:
            charts.append(figures.class_chart(part, rows))
            details.append(
                el(
                    "details",
                    el("summary", f"{part.name}: all {len(rows)} classes as a table"),
                    tables.class_table(rows),
                )
            )
    if not charts:
        return None
    return Section("classes", "Classes", "By class", join(el("div", *charts, class_="grid"), *details))


def _settings(parts: Sequence[Part]) -> Section | None:
    blocks: list[Html] = []
    commands = list(dict.fromkeys(p.environment.command for p in parts if p.environment))
    if commands:
        blocks += [el("h3", "The command that made it"), el("pre", el("code", "\n".join(commands)), tabindex=0)]
    if chosen := [sentence for p in parts if (sentence := work_sentence(p))]:
        blocks += [el("h3", "What was done"), *(el("p", sentence) for sentence in chosen)]
    groups = (
        ("Settings of the search", [p for p in parts if isinstance(p, SearchPart) and p.settings], "settings"),
        ("Settings of the training", [p for p in parts if isinstance(p, NetworkPart) and p.settings], "settings"),
        ("Environment", [p for p in parts if p.environment], "environment"),
    )
    for label, having, field in groups:
        if having:
            blocks.append(el("details", el("summary", label), tables.record_table(having, field, label)))
    if not blocks:
        return None
    return Section("settings", "Settings", "Settings and reproduction", join(*blocks))
