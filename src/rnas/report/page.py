"""The report: one HTML file that needs nothing else, made from run folders."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from rnas.errors import RnasError
from rnas.files import write_text
from rnas.genotype import Cell, Genotype
from rnas.report import figures, tables
from rnas.report.compare import Comparison, compare_networks, shown_best
from rnas.report.drawing import theme
from rnas.report.drawing.cells import TITLES, draw_cell
from rnas.report.drawing.charts import percent, short
from rnas.report.html import Html, el, join
from rnas.report.read import NetworkPart, Part, SearchPart, read_parts
from rnas.report.words import CW_CAVEAT, CW_L2_CAVEAT, attack_name, count, threat, training, work_sentence
from rnas.wording import apart, duration


class Section(NamedTuple):
    """A section of the page; `link` is its short name in the bar at the top."""

    anchor: str
    link: str
    heading: str
    content: Html


def write_report(runs: Sequence[Path | str], out: Path | str, title: str | None = None) -> None:
    """Write the page about `runs` (folders of rnas run, search or train, in any number) to `out`.

    RnasError, and nothing written, if a folder is missing, holds no run or is damaged."""
    if not runs:
        raise RnasError("report needs the folder of at least one run")
    folders, out = [Path(run) for run in runs], Path(out)
    parts = read_parts(folders)
    if out.is_dir():
        raise RnasError(f"{out} is a folder: --out names the page's file")
    if out.exists() and out.suffix.lower() not in (".html", ".htm"):
        raise RnasError(f"{out} would be overwritten: expected the name of a new file, such as report.html")
    write_text(out, page(parts, title or ", ".join(folder.resolve().name for folder in folders)))


def page(parts: Sequence[Part], title: str) -> str:
    """The whole page as text. The same parts give the same page."""
    searches = [p for p in parts if isinstance(p, SearchPart)]
    networks = [p for p in parts if isinstance(p, NetworkPart)]
    evaluated = [p for p in networks if p.evaluation is not None]
    sections = [
        s
        for s in (
            _results(evaluated),
            _architecture(searches, networks),
            _course(searches),
            _alphas(searches),
            _training(networks),
            _distortion(networks),
            _examples(networks),
            _classes(evaluated),
            _settings(parts),
        )
        if s
    ]
    links = (el("li", el("a", s.link, href=f"#{s.anchor}")) for s in sections)
    bar = el(
        "nav",
        el("div", el("ul", *links), el("button", "Theme: auto", id="theme", type="button", hidden=True), class_="wrap"),
        class_="bar",
        aria_label="Sections",
    )
    return document(
        title,
        el("a", "Skip to the results", class_="skip", href="#main"),
        bar,
        el(
            "main",
            _top(title, searches, networks, evaluated),
            *(el("section", el("h2", s.heading), s.content, id=s.anchor) for s in sections),
            class_="wrap",
            id="main",
        ),
        el("footer", el("div", _made_by(parts), class_="wrap")),
    )


def document(title: str, *content: Html) -> str:
    """A page with our style and script, which sorts tables; it loads nothing from elsewhere."""
    script = files("rnas.report").joinpath("page.js").read_text(encoding="utf-8")
    style = files("rnas.report").joinpath("page.css").read_text(encoding="utf-8") + theme.page_css()
    # Nothing from the network, no script but ours.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{title} · rnas"),
        el("style", Html(style)),
    )
    body = el("body", *content, el("script", Html(script)))
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def _made_by(parts: Sequence[Part]) -> str:
    versions = sorted({str(p.settings["rnas"]) for p in parts if "rnas" in p.settings})
    return f"Made by rnas {', '.join(versions)}." if versions else "Made by rnas."


# --- the top --------------------------------------------------------------------------------------------------------


def _top(
    title: str, searches: Sequence[SearchPart], networks: Sequence[NetworkPart], evaluated: Sequence[NetworkPart]
) -> Html:
    main = main_network(evaluated)
    about = []
    if main and main.evaluation and tables.same_test(evaluated):
        tested = main.evaluation
        about = [tested.dataset or "", threat(tested), f"{count(tested.n)} test images"]
    sentences = [*_result_sentences(main, evaluated), *(s for s in map(_search_sentence, searches[:1]) if s)]
    if not sentences:
        sentences = [_progress(searches, networks)]
    return el(
        "header",
        el("h1", title),
        el("p", " · ".join(a for a in about if a), class_="meta") if about else None,
        _warnings(searches, networks),
        el("p", " ".join(sentences), class_="lead"),
        _tiles(main, searches, main.name if len(evaluated) > 1 else "") if main else None,
        class_="top",
    )


def main_network(evaluated: Sequence[NetworkPart]) -> NetworkPart | None:
    """The network that the headline is about: the most robust one, adversarially trained if there is such. Where these
    were not attacked alike, none is, and it is the first."""
    trained = _candidates(evaluated)
    if not tables.comparable(trained):
        return trained[0]
    return max(trained, key=lambda p: (robust(p) or ("", 0.0))[1], default=None)


def _candidates(evaluated: Sequence[NetworkPart]) -> list[NetworkPart]:
    return [p for p in evaluated if training(p) != "standard"] or list(evaluated)


def robust(part: NetworkPart) -> tuple[str, float] | None:
    """The attack that tells most about the network, and its accuracy: the union, else the worst."""
    union = tables.accuracy(part, "union")
    if union is not None:
        return "union", union
    found = {a: tables.accuracy(part, a) for a in tables.bounded(tables.attacks_of([part]))}
    known = {a: v for a, v in found.items() if v is not None}
    worst = min(known, key=lambda a: known[a], default=None)
    return None if worst is None else (worst, known[worst])


def _result_sentences(main: NetworkPart | None, evaluated: Sequence[NetworkPart]) -> list[str]:
    clean = tables.accuracy(main, "clean") if main else None
    if not main or clean is None:
        return []
    worst = robust(main)
    names = [attack_name(a) for a in tables.bounded(tables.attacks_of([main]))]
    kind = {"standard": "trained on clean images", None: "evaluated"}.get(training(main), "trained adversarially")
    candidates = _candidates(evaluated)
    alike = tables.comparable(candidates)
    network = f"The network {kind}" if len(evaluated) < 3 and alike else main.name
    if len(evaluated) >= 3 and alike and len(candidates) > 1:
        network += f", the one of {len(candidates)} that keeps most,"
    out = f"{network} classifies {percent(clean)} of the clean images correctly"
    if worst:
        under = "under every attack tried" if worst[0] == "union" else f"under {attack_name(worst[0])}"
        tried = f" ({', '.join(names)})" if worst[0] == "union" else ""
        out += f", and keeps {percent(worst[1])} {under}{tried}"
    sentences = [out + "."]
    others = [p for p in evaluated if training(p) == "standard" and p is not main and tables.same_test([p, main])]
    if len(others) == 1 and (kept := robust(others[0])) and (c := tables.accuracy(others[0], "clean")):
        same = others[0].genotype == main.genotype and others[0].arch == main.arch
        who = "The same architecture" if same else others[0].name
        sentences.append(f"{who}, trained on clean images, classifies {percent(c)} and keeps {percent(kept[1])}.")
    return sentences


def _epochs(n: int) -> str:
    return "one epoch" if n == 1 else f"{n} epochs"


def _search_sentence(part: SearchPart) -> str | None:
    F, H = (_last(part, key) for key in ("F", "H"))
    if F is None:
        return None
    f, h = apart(F, H, form=short) if H is not None else (short(F), "")
    if not part.finished:
        bound = f"; its bound is H = {h}" if H is not None else ""
        return f"After {_epochs(len(part.epochs))} of the search the network vulnerability F is {f}{bound}."
    if H is None:
        return f"The search ended with a network vulnerability F of {f}, without a bound."
    if F <= H:
        return f"The search brought the network vulnerability F to {f}, under its bound H = {h}."
    return f"The search left the network vulnerability F at {f}, above its bound H = {h}."


def _last(part: SearchPart, *keys: str) -> float | None:
    return next((v for v in reversed(part.column(*keys)) if v is not None), None)


def _progress(searches: Sequence[SearchPart], networks: Sequence[NetworkPart]) -> str:
    parts = [*searches, *networks]
    return "; ".join(f"{p.name}: {_epochs(len(p.epochs))}" for p in parts) + ". Nothing is evaluated yet."


def _tiles(main: NetworkPart, searches: Sequence[SearchPart], name_of_main: str) -> Html:
    """The figures of `main`; its name stands on each, where there are other networks on the page."""
    attacks = tables.attacks_of([main])
    shown = ["clean", *([a for a in ("pgd20", "aa") if a in attacks] or attacks[:1])]
    if tables.accuracy(main, "union") is not None and len(tables.bounded(attacks)) > 1:
        shown.append("union")
    tiles = []
    for name in shown:
        found = tables.entry(main, name)
        if found is None:
            continue
        label = {"clean": "Clean accuracy", "union": "Under all attacks"}.get(name, f"Under {attack_name(name)}")
        interval = found.interval
        note = f"interval {100 * interval[0]:.1f}–{100 * interval[1]:.1f}" if interval else ""
        note = " · ".join(text for text in (name_of_main, note) if text)
        role = "clean" if name == "clean" else "adversarial"
        tiles.append(_tile(label, percent(found.accuracy), note, role))
    if len(searches) == 1:
        F, H = (_last(searches[0], key) for key in ("F", "H"))
        if F is not None and H:
            share, f, h = apart(F / H, 1.0, form=lambda v, n: f"{v:.{n - 1}f}")[0], *apart(F, H, form=short)
            note = " · ".join(text for text in (searches[0].name if name_of_main else "", f"{f} of {h}") if text)
            tiles.append(_tile("Vulnerability F / bound H", share, note, None))
    return el("dl", *tiles, class_="figures")


def _tile(label: str, value: str, note: str, role: str | None) -> Html:
    return el("div", el("dt", label), el("dd", el("b", value, class_=role), el("span", note)))


def _warnings(searches: Sequence[SearchPart], networks: Sequence[NetworkPart]) -> Html | None:
    texts = [f"{p.name}: {w}" for p in networks for w in (p.evaluation.warnings if p.evaluation else ())]
    for p in (*searches, *networks):
        texts += [f"{p.name}: {warning}" for warning in p.warnings]
    texts += [
        f"{p.name}: the search is not finished; the cell is that of epoch {p.numbers()[-1]}."
        for p in searches
        if p.epochs and not p.finished
    ]
    for p in networks:
        planned = p.settings.get("epochs")
        if p.epochs and isinstance(planned, int) and len(p.epochs) < planned:
            texts.append(f"{p.name}: the training is not finished; it is at epoch {p.numbers()[-1]} of {planned}.")
    for p in searches:
        if p.epochs and p.epochs[-1].at_chance:
            right, by_chance = (_last(p, *keys) for keys in (("val", "clean_accuracy"), ("chance",)))
            texts.append(
                f"{p.name}: the supernet classifies {percent(right or 0.0)} of the validation images correctly, which "
                f"is not shown to be above chance ({percent(by_chance or 0.0)}): its cell and its F say little."
            )
    evaluated = [p for p in networks if p.evaluation is not None]
    if not tables.same_test(evaluated):
        texts.append(
            "The networks were not tested alike: the table says with each on which images and under which threat. "
            "Figures of different tests cannot be compared, and none is marked as the best."
        )
    if not texts:
        return None
    items = (el("li", text) for text in texts)
    return el("div", el("h2", "Read with care"), el("ul", *items), class_="warnings", role="note")


# --- the sections ---------------------------------------------------------------------------------------------------


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


def _course(searches: Sequence[SearchPart]) -> Section | None:
    def charts(part: SearchPart) -> Html | None:
        found = figures.search_charts(part)
        return el("div", *found, class_="grid") if found else None

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
        f"{p.name}: {_epochs(len(p.epochs))} in {duration(sum(v for v in p.column('seconds') if v is not None))}"
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
