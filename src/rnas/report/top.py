"""The top of the page: warnings, the result in two sentences, the figures of the main network."""

from __future__ import annotations

from collections.abc import Sequence

from rnas.report import tables
from rnas.report.drawing.charts import percent, short
from rnas.report.html import Html, el
from rnas.report.read import NetworkPart, Part, SearchPart
from rnas.report.words import attack_name, count, epochs, threat, training
from rnas.wording import apart


def top(title: str, parts: Sequence[Part]) -> Html:
    """The header of the page."""
    searches = [p for p in parts if isinstance(p, SearchPart)]
    networks = [p for p in parts if isinstance(p, NetworkPart)]
    evaluated = [p for p in networks if p.evaluation is not None]
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


def _search_sentence(part: SearchPart) -> str | None:
    F, H = (_last(part, key) for key in ("F", "H"))
    if F is None:
        return None
    f, h = apart(F, H, form=short) if H is not None else (short(F), "")
    if not part.finished:
        bound = f"; its bound is H = {h}" if H is not None else ""
        return f"After {epochs(len(part.epochs))} of the search the network vulnerability F is {f}{bound}."
    if H is None:
        return f"The search ended with a network vulnerability F of {f}, without a bound."
    if F <= H:
        return f"The search brought the network vulnerability F to {f}, under its bound H = {h}."
    return f"The search left the network vulnerability F at {f}, above its bound H = {h}."


def _last(part: SearchPart, *keys: str) -> float | None:
    return next((v for v in reversed(part.column(*keys)) if v is not None), None)


def _progress(searches: Sequence[SearchPart], networks: Sequence[NetworkPart]) -> str:
    parts = [*searches, *networks]
    return "; ".join(f"{p.name}: {epochs(len(p.epochs))}" for p in parts) + ". Nothing is evaluated yet."


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
