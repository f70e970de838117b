"""The paper's tables and figures, from one command each: plan, estimate, run what is missing, write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rnas.console import Console
from rnas.data import load
from rnas.errors import RnasError
from rnas.files import write_text
from rnas.report.distortion import save
from rnas.reproduce.caption import caption
from rnas.reproduce.cost import Costs
from rnas.reproduce.execute import finished, run_missing
from rnas.reproduce.figures import draw
from rnas.reproduce.plan import Plan, make_plan
from rnas.reproduce.results import collect
from rnas.reproduce.tables import write_table
from rnas.settings import Reproduce, Search, Train
from rnas.wording import duration

__all__ = ["make_plan", "reproduce"]


def reproduce(settings: Reproduce, console: Console | None = None) -> list[Path]:
    """Show the plan with its cost, run what is missing, and write the table or figure; returns the files.

    With `settings.plan` only the plan. RnasError for bad input, before anything is run, and if no run succeeded.
    """
    console = console or Console(quiet=True)
    plan = make_plan(settings)
    for line in describe(plan, Costs(plan, console)):
        console.say(line)
    if settings.plan:
        return []
    for source in dict.fromkeys(step.source for step in plan.steps.values() if isinstance(step, Search | Train)):
        load(source.data, root=source.data_root, image_size=source.image_size)  # fails now, or not at all

    def show(failed: Mapping[Path, str]) -> None:
        if plan.kind == "table":
            write(plan, failed)

    failed = run_missing(plan, console, show)
    if failed and len(failed) == len(plan.steps):
        raise RnasError(f"no run of {settings.what} succeeded: {next(iter(failed.values()))}")
    files = write(plan, failed)
    for path in files:
        console.say(f"wrote {path}")
    return files


def write(plan: Plan, failed: Mapping[Path, str]) -> list[Path]:
    """Write what is known by now: tableN.{csv,md,tex,html}, or figN.{svg,png} and figN.md, its caption."""
    stem = plan.settings.out / plan.settings.what
    sentences = caption(plan)
    if plan.kind == "table":
        return write_table(collect(plan, failed), sentences, stem)
    drawing = draw(plan, failed)
    drawing.description = f"{' '.join(sentences)} {drawing.description}"
    files = save(drawing, stem)
    note = stem.parent / f"{stem.name}.md"
    write_text(note, f"![{plan.settings.what}]({stem.name}.svg)\n\n{' '.join(sentences)}\n")
    return [*files, note]


def describe(plan: Plan, costs: Costs) -> list[str]:
    """The plan for people: every step with its state and its estimated time, then the sum of what is left."""
    lines, left = [], 0.0
    for path, step in plan.steps.items():
        done = finished(step)
        seconds = 0.0 if done else costs.seconds(step)
        left += seconds
        kind = type(step).__name__.lower()
        name = path if kind in ("search", "train") else path.parent
        lines.append(f"{kind:<10}  {name.name:<64}  {'done' if done else f'about {duration(seconds)}'}")
    empty = [f"{row.model}: stays empty, {row.reason}" for row in plan.rows if row.reason is not None]
    total = f"{plan.settings.what} at budget {plan.settings.budget}: {len(lines)} steps, about {duration(left)} left"
    return [*lines, *dict.fromkeys(empty), f"{total} on this device (estimated from a few timed passes)"]
