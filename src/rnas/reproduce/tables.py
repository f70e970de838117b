"""A table as CSV (one line a figure, for programs), Markdown, LaTeX and HTML (for people)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from rnas.files import write_text
from rnas.report.html import Html, el
from rnas.report.page import document
from rnas.reproduce.results import Line, Value

NAMES = {"clean": "Clean", "fgsm": "FGSM", "pgd20": "PGD-20", "pgd100": "PGD-100", "cw": "C&W", "aa": "AutoAttack"}
CSV_FIELDS = (
    "model,training,attack,accuracy,std,low,high,seeds,images,paper,difference,parameters_M,paper_parameters_M,reason"
).split(",")


def write_table(lines: Sequence[Line], caption: Sequence[str], stem: Path) -> list[Path]:
    """Write `stem`.csv, .md, .tex and .html; returns the paths."""
    title = caption[0].split(" of the paper")[0]
    texts = {
        "csv": to_csv(lines),
        "md": to_markdown(lines, caption),
        "tex": to_latex(lines, caption),
        "html": to_html(lines, caption, title),
    }
    paths = [stem.parent / f"{stem.name}.{kind}" for kind in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text)
    return paths


def heading(column: str, both: bool) -> str:
    """`at_pgd20` as AT PGD-20, or without the training where there is only one."""
    training, _, key = column.partition("_")
    return f"{training.upper()} {NAMES[key]}" if both else NAMES[key]


def reasons(lines: Sequence[Line]) -> list[str]:
    """Why cells are empty; a cell's note is its reason's place in here, from 1."""
    return list(dict.fromkeys(v.reason for line in lines for v in line.values.values() if v.reason is not None))


def to_csv(lines: Sequence[Line]) -> str:
    """One line for each figure; accuracies in percent, what is unknown is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for line in lines:
        for column, v in line.values.items():
            training, _, attack = column.partition("_")
            low, high = v.interval or (None, None)
            accuracy = (v.mean, v.std, low, high)
            rest = (v.seeds or None, v.images or None, v.paper)
            numbers = (*map(_decimals, accuracy), *rest, _decimals(v.difference))
            sizes = (_decimals(line.parameters, 3), line.paper_parameters)
            row = (line.model, training, attack, *numbers, *sizes, v.reason)
            writer.writerow(["" if x is None else x for x in row])
    return out.getvalue()


def _decimals(number: float | None, digits: int = 2) -> str | None:
    return None if number is None else f"{number:.{digits}f}"


def _measured(v: Value) -> str:
    """84.1 ± 0.3 [83.4, 84.8]"""
    assert v.mean is not None
    assert v.interval is not None
    spread = f" ± {v.std:.1f}" if v.std is not None else ""
    return f"{v.mean:.1f}{spread} [{v.interval[0]:.1f}, {v.interval[1]:.1f}]"


def _beside(v: Value) -> str:
    """paper 85.16 (−1.1), as far as there is such."""
    if v.paper is None:
        return ""
    change = "" if v.difference is None else f" ({v.difference:+.1f})".replace("-", "−")
    return f"paper {v.paper:g}{change}"


def _size(line: Line) -> str:
    ours = "–" if line.parameters is None else f"{line.parameters:.2f} M"
    return ours if line.paper_parameters is None else f"{ours} (paper {line.paper_parameters:g} M)"


def _both(lines: Sequence[Line]) -> bool:
    return any(column.startswith("st_") for line in lines for column in line.values)


def to_markdown(lines: Sequence[Line], caption: Sequence[str]) -> str:
    """A GitHub table; under it the reasons of empty cells."""
    why, both = reasons(lines), _both(lines)
    header = ["Model", "Parameters", *(heading(c, both) for c in lines[0].values)]
    rows = [header, ["-", "-:", *["-:"] * len(lines[0].values)]]
    for line in lines:
        cells = [
            "<br>".join(t for t in (f"– ({why.index(v.reason) + 1})" if v.reason else _measured(v), _beside(v)) if t)
            for v in line.values.values()
        ]
        rows.append([line.model, _size(line), *cells])
    text = [" ".join(caption), "", *(f"| {' | '.join(c.replace('|', '/') for c in row)} |" for row in rows)]
    if why:
        text += ["", "Empty:", *(f"{i}. {reason}" for i, reason in enumerate(why, 1))]
    return "\n".join(text) + "\n"


def to_html(lines: Sequence[Line], caption: Sequence[str], title: str) -> str:
    """A page by itself; the table can be sorted."""
    why, both = reasons(lines), _both(lines)
    heads = [el("th", name, scope="col", class_="text" if i == 0 else None) for i, name in enumerate(("Model", "Size"))]
    heads += [el("th", heading(c, both), scope="col") for c in lines[0].values]
    rows = [
        el(
            "tr",
            el("th", line.model, scope="row", data_value=line.model),
            el("td", _size(line), data_value=line.parameters or ""),
            *(_html_cell(v, why) for v in line.values.values()),
        )
        for line in lines
    ]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *rows), data_sortable=True)
    button = el("button", "Theme: auto", id="theme", type="button", hidden=True)
    return document(
        title,
        el("nav", el("div", el("ul", el("li", el("a", "Table", href="#main"))), button, class_="wrap"), class_="bar"),
        el(
            "main",
            el("header", el("h1", title), *(el("p", sentence) for sentence in caption), class_="top"),
            el("div", table, class_="scroll card", tabindex=0, role="region", aria_label=title),
            el("ol", *(el("li", reason) for reason in why)) if why else Html(),
            class_="wrap",
            id="main",
        ),
    )


def _html_cell(v: Value, why: Sequence[str]) -> Html:
    beside = el("small", _beside(v)) if _beside(v) else None
    if v.mean is None:
        note = f" ({why.index(v.reason) + 1})" if v.reason else ""
        return el("td", f"–{note}", beside, data_value="", title=v.reason)
    spread = f" ± {v.std:.1f}" if v.std is not None else ""
    low, high = v.interval or (0.0, 0.0)
    return el("td", f"{v.mean:.1f}{spread}", el("small", f"{low:.1f}–{high:.1f}"), beside, data_value=v.mean)


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {c: "\\" + c for c in "&%$#_{}"}
_LATEX |= {"±": r"$\pm$", "−": "$-$", "∞": r"$\infty$", "ε": r"$\varepsilon$", "≤": r"$\le$", "κ": r"$\kappa$"}
_LATEX |= {"–": "--", "\u202f": r"\,", "·": r"$\cdot$", "→": r"$\to$", "§": r"\S "}


def latex(text: str) -> str:
    """`text` as LaTeX prints it."""
    return re.sub(".", lambda found: _LATEX.get(found[0], found[0]), text)


def to_latex(lines: Sequence[Line], caption: Sequence[str]) -> str:
    """A table* for a document with booktabs: under each figure the paper's."""
    why, both = reasons(lines), _both(lines)
    header = ["Model", "Params", *(heading(c, both) for c in lines[0].values)]
    out = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table*}",
        r"\centering\scriptsize",
        rf"\caption{{{latex(' '.join(caption))}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(map(latex, header)) + r" \\",
        r"\midrule",
    ]
    for line in lines:
        parameters = "–" if line.parameters is None else f"{line.parameters:.2f}M"
        ours = [line.model, parameters]
        theirs = ["", "" if line.paper_parameters is None else f"paper {line.paper_parameters:g}M"]
        open_left = ["", ""]
        for v in line.values.values():
            figure, _, interval = _measured(v).partition(" [") if v.mean is not None else ("", "", "")
            ours.append(figure or (f"– ({why.index(v.reason) + 1})" if v.reason else ""))
            open_left.append(f"[{interval}" if interval else "")
            theirs.append(_beside(v))
        out += [" & ".join(map(latex, cells)) + r" \\" for cells in (ours, open_left, theirs)]
    out += [r"\bottomrule", r"\end{tabular}"]
    if why:
        out.append(r"\\[1ex] " + latex(" ".join(f"({i}) {reason}." for i, reason in enumerate(why, 1))))
    return "\n".join([*out, r"\end{table*}"]) + "\n"
