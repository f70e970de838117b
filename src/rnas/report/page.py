"""The report: one HTML file that needs nothing else, made from run folders."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from rnas.errors import RnasError
from rnas.files import write_text
from rnas.report.drawing import theme
from rnas.report.html import Html, el
from rnas.report.read import Part, read_parts
from rnas.report.sections import sections
from rnas.report.top import top


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
    shown = sections(parts)
    links = (el("li", el("a", s.link, href=f"#{s.anchor}")) for s in shown)
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
            top(title, parts),
            *(el("section", el("h2", s.heading), s.content, id=s.anchor) for s in shown),
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
