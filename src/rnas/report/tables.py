"""The page's tables. Every one of results can be sorted by a click or a key on its headings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rnas import published as paper
from rnas.records.arrays import UNBOUNDED
from rnas.records.codec import encode
from rnas.records.schema import Figure
from rnas.report.compare import Comparison, p_value, points, verdict
from rnas.report.drawing.charts import percent, short
from rnas.report.html import Html, el
from rnas.report.read import NetworkPart, Part, SearchPart
from rnas.report.words import PAPER_TABLES, attack_name, count, threat, training
from rnas.wording import duration

NO_VALUE = "–"


def _head(*names: str, text: tuple[int, ...] = (0,)) -> Html:
    cells = (el("th", name, scope="col", class_="text" if i in text else None) for i, name in enumerate(names))
    return el("thead", el("tr", *cells))


def _card(table: Html, label: str) -> Html:
    """A table that scrolls by itself where it is too wide for the screen; `tabindex` lets the keyboard scroll it."""
    return el("div", table, class_="scroll card", tabindex=0, role="region", aria_label=label)


def attacks_of(networks: Sequence[NetworkPart]) -> list[str]:
    """The attacks of all evaluations, in the order in which they first appear."""
    names: dict[str, None] = {}
    for part in networks:
        names.update(dict.fromkeys(part.evaluation.attacks if part.evaluation else ()))
    return list(names)


def bounded(attacks: Sequence[str]) -> list[str]:
    """Those of `attacks` that ε bounds: a union is of them."""
    return [name for name in attacks if name not in UNBOUNDED]


def columns_of(networks: Sequence[NetworkPart]) -> list[str]:
    """What evaluations say, in the order of reading: clean, bounded attacks, their union, unbounded ones beside it."""
    attacks = attacks_of(networks)
    union = ["union"] if any(entry(part, "union") for part in networks) else []
    return ["clean", *bounded(attacks), *union, *(name for name in attacks if name in UNBOUNDED)]


def vulnerability_table(search: SearchPart, networks: Sequence[NetworkPart]) -> Html | None:
    """F from the bound to the networks that were trained of what the search found; None where nothing is known of it
    but the supernet's."""
    if not search.epochs:
        return None
    last = search.epochs[-1]
    rows: list[tuple[str, float | None, str]] = [
        ("Bound H", last.H, ""),
        ("Supernet", last.F_supernet, ""),
        ("Supernet without none", last.F_without_none, "its share given to the other operations of the edge"),
        ("Discretised cell", last.F_cell, "one-hot, with the supernet's weights"),
    ]
    for part in networks:
        f = part.evaluation.vulnerability if part.evaluation else None
        if f is not None and part.genotype is not None and part.genotype == search.genotype:
            low, high = (short(v) for v in f.interval)
            rows.append((part.name, f.value, f"trained; {low} to {high} (bootstrap, 95 %), {f.attack}, {f.n} images"))
    known = [(name, value, note) for name, value, note in rows if value is not None]
    if len(known) < 3:
        return None
    body = (
        el("tr", el("th", name, scope="row"), el("td", short(value)), el("td", note, class_="text"))
        for name, value, note in known
    )
    return _card(
        el("table", _head("", "F", "", text=(0, 2)), el("tbody", *body)), "F from the bound to the trained network"
    )


def chance(part: NetworkPart) -> float | None:
    """The accuracy of always answering the largest class of the evaluated images; None if nothing tells."""
    if part.labels is not None and len(part.labels):
        return float(np.unique(part.labels, return_counts=True)[1].max() / len(part.labels))
    return part.evaluation.chance if part.evaluation else None


def entry(part: NetworkPart, attack: str) -> Figure | None:
    """What the evaluation says of `attack`, `clean` or `union`, if anything."""
    return part.evaluation.figure(attack) if part.evaluation else None


def accuracy(part: NetworkPart, attack: str) -> float | None:
    """The accuracy under `attack`, of `clean` images or of the `union`; None if it was not measured."""
    found = entry(part, attack)
    return None if found is None else found.accuracy


def same_test(networks: Sequence[NetworkPart]) -> bool:
    """Whether all evaluations are of the same images under the same threat."""
    return all(_test_of(part) == _test_of(networks[0]) for part in networks)


def _test_of(part: NetworkPart) -> tuple[Any, ...]:
    e = part.evaluation
    return () if e is None else (e.images_sha256 or e.dataset, e.n, e.eps, e.norm)


def comparable(networks: Sequence[NetworkPart]) -> bool:
    """Whether accuracies under all attacks can be ranked: of the same test, by the same attacks."""
    return same_test(networks) and len({frozenset(attacks_of([part])) for part in networks}) <= 1


def paper_table_number(part: NetworkPart) -> int | None:
    """The table of the paper that this evaluation can stand beside: the same data, l∞ and ε = 8/255; None if none."""
    e = part.evaluation
    if e is None or e.norm != "linf" or not math.isclose(e.eps, 8 / 255, rel_tol=1e-3):
        return None
    return PAPER_TABLES.get(str(e.dataset))


def paper_row(part: NetworkPart) -> dict[str, float | str | None]:
    """The paper's row for this architecture on this data set, with the keys of its attacks; empty if it has none."""
    number = paper_table_number(part)
    if number is None:
        return {}
    known = {p.name: p.table_name or p.name for p in paper.architectures().values()}
    name = known.get(part.arch)
    row = next((row for row in paper.table(number) if row["model"] == name), {})
    prefix = ("st_" if training(part) == "standard" else "at_") if number == 1 else ""
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix) or key == "model"}


def results_table(networks: Sequence[NetworkPart], best: Mapping[str, str]) -> Html:
    """Networks by attacks: accuracy, its interval, the seconds, and the paper's figure where it has one. `best` names
    for an attack the network that a paired test shows to be better than all others."""
    attacks = attacks_of(networks)
    columns = columns_of(networks)
    alike = same_test(networks)
    rows = []
    for part in networks:
        published = paper_row(part)
        evaluation, known = part.evaluation, part.parameters
        assert evaluation is not None
        by_chance = chance(part)
        above = by_chance or 0.0  # what is no better than chance is the best of nothing
        cells = [
            _result(
                entry(part, c),
                published.get(c),
                best.get(c) == part.name and (accuracy(part, c) or 0.0) > above,
            )
            for c in columns
        ]
        what = _what(part) + ("" if alike else f" · {evaluation.dataset or 'images'} · {threat(evaluation)}")
        rows.append(
            el(
                "tr",
                el("th", part.name, el("small", what), scope="row", data_value=part.name),
                *cells,
                el("td", NO_VALUE if by_chance is None else percent(by_chance), data_value=by_chance or ""),
                el("td", count(evaluation.n), data_value=evaluation.n),
                el("td", NO_VALUE if known is None else count(known), data_value=known or ""),
            )
        )
    caption = "Accuracy with its 95 % Wilson interval"
    caption += (
        " and the seconds that the attack took."
        if any((e := entry(p, a)) and e.seconds is not None for p in networks for a in attacks)
        else "."
    )
    if best:
        caption += " Bold: better than every other network here, by the paired test."
    if "union" in columns:
        caption += " Union: images that withstand every attack here that ε bounds."
    caption += " Chance: always answering the largest class."
    table = el(
        "table",
        el("caption", caption),
        _head("Network", *(attack_name(c) for c in columns), "Chance", "Images", "Parameters"),
        el("tbody", *rows),
        data_sortable=True,
    )
    return _card(table, "Accuracy of every network under every attack")


def _what(part: NetworkPart) -> str:
    arch = "the cell found" if part.arch == "genotype" else part.arch
    kind = training(part)
    return f"{kind} training of {arch}" if kind else arch


def _result(found: Figure | None, published: float | str | None, best: bool) -> Html:
    if found is None:
        return el("td", NO_VALUE, data_value="")
    low_high = found.interval
    lines = [el("small", f"{100 * low_high[0]:.1f}–{100 * low_high[1]:.1f}")] if low_high else []
    if found.seconds is not None:
        lines.append(el("small", duration(found.seconds)))
    if isinstance(published, float):
        lines.append(el("small", f"paper {published:.1f}"))
    return el(
        "td", el("span", percent(found.accuracy), class_="best" if best else None), *lines, data_value=found.accuracy
    )


def paper_table(networks: Sequence[NetworkPart], number: int) -> Html:
    """The paper's table `number` with the measured networks among its rows."""
    prefix = "at_" if number == 1 else ""
    keys = ["clean", "fgsm", "pgd20", "pgd100", "cw", "aa"]
    rows = []
    for row in paper.table(number):
        values = [row.get(prefix + key) for key in keys]
        rows.append(_paper_cells(str(row["model"]), values, None))
    for part in networks:
        if training(part) != "standard":
            accuracies = [accuracy(part, key) for key in keys]
            rows.append(_paper_cells(part.name, [None if a is None else 100 * a for a in accuracies], "ours"))
    names = ["Clean", "FGSM", "PGD-20", "PGD-100", "C&W", "AutoAttack"]
    table = el(
        "table",
        el(
            "caption",
            f"Percent. The paper's Table {number} (adversarial training), and in colour the networks of this page.",
        ),
        _head("Network", *names),
        el("tbody", *rows),
        data_sortable=True,
    )
    return _card(table, f"The paper's Table {number} beside the networks of this page")


def _paper_cells(name: str, values: Sequence[Any], class_: str | None) -> Html:
    cells = (el("td", NO_VALUE if v is None else f"{v:.1f}", data_value="" if v is None else v) for v in values)
    return el("tr", el("th", name, scope="row"), *cells, class_=class_)


def comparison_table(rows: Sequence[Comparison]) -> Html:
    """Paired comparisons: differences with intervals and p-values."""
    pairs = {(r.a, r.b) for r in rows}
    one = len(pairs) == 1  # then the pair stands in the caption
    body = [
        el(
            "tr",
            *([] if one else [el("th", f"{r.a} − {r.b}", scope="row")]),
            el("th" if one else "td", attack_name(r.attack), class_="text", scope="row" if one else None),
            el("td", difference, data_value=r.difference),
            el("td", interval, data_value=r.interval[0]),
            el("td", str(r.only_a), data_value=r.only_a),
            el("td", str(r.only_b), data_value=r.only_b),
            el("td", p_value(r.p_holm), data_value=r.p_holm),
            el("td", verdict(r), class_="text"),
        )
        for r in rows
        for difference, interval in [points(r)]
    ]
    caption = (
        "Difference in percentage points with its 95 % interval for paired proportions (adjusted Wald, Bonett and "
        "Price 2012); images that only one of the two classifies correctly; p of McNemar's exact test, corrected for "
        f"all {len(rows)} rows together (Holm). An interval stands for its row alone: it can leave out 0 where the "
        "corrected test shows no difference."
    )
    if one:
        caption = f"{rows[0].a} minus {rows[0].b}. {caption}"
    names = ["Networks", "Attack", "Difference", "95 % interval", "Only first", "Only second", "p", "Verdict"][one:]
    head = _head(*names, text=(0, len(names) - 1) if one else (0, 1, 7))
    table = el("table", el("caption", caption), head, el("tbody", *body), data_sortable=True)
    return _card(table, "Paired comparisons")


def record_table(parts: Sequence[Part], field: str, label: str) -> Html:
    """The settings or environments of `parts`, one column each."""
    columns = [dict(_flatten(encode(getattr(part, field)))) for part in parts]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = (
        el("tr", el("th", key, scope="row"), *(el("td", column.get(key, NO_VALUE)) for column in columns))
        for key in keys
    )
    table = el("table", _head("Name", *(part.name for part in parts)), el("tbody", *rows), class_="settings")
    return el("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield prefix + key, value
        elif isinstance(value, list):
            yield prefix + key, " ".join(v if isinstance(v, str) else json.dumps(v) for v in value)
        else:
            yield prefix + key, json.dumps(value)


def class_table(rows: Sequence[tuple[str, int, float, float]]) -> Html:
    """Classes: images, clean and robust accuracy."""
    body = (
        el(
            "tr",
            el("th", name, scope="row"),
            el("td", str(n), data_value=n),
            el("td", percent(clean), data_value=clean),
            el("td", percent(robust), data_value=robust),
        )
        for name, n, clean, robust in rows
    )
    table = el("table", _head("Class", "Images", "Clean", "Under all attacks"), el("tbody", *body), data_sortable=True)
    return _card(table, "Accuracy of every class")
