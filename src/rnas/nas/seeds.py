"""Searches that differ in their seed alone: how far they agree tells a method from luck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from operator import attrgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rnas.console import Console
from rnas.data import Dataset
from rnas.files import write_json
from rnas.genotype import Architecture, agreement
from rnas.nas.search import search
from rnas.records.folder import read_events
from rnas.records.layout import SEEDS
from rnas.records.schema import SearchEpoch
from rnas.settings import Search

Announce = Callable[[Dataset], None]
FIGURES = {
    "F": "F",
    "clean_accuracy": "val.clean_accuracy",
    "adversarial_accuracy": "val.adversarial_accuracy",
}
"""Of the supernet on the validation half, after the last epoch."""


@dataclass(frozen=True)
class Summary:
    """A figure over all seeds."""

    mean: float
    spread: float | None
    """Standard deviation of one seed (n - 1); None for a single one."""


def search_seeds(settings: Search, console: Console, announce: Callable[[Search], Announce]) -> str:
    """Search with `settings.seeds` seeds from `settings.seed` on, each in a folder of its own; writes seeds.json beside
    them and returns its table. What is finished is not done again with `resume`. RnasError as `search`."""
    seeds = range(settings.seed, settings.seed + (settings.seeds or 1))
    found: list[Architecture] = []
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        one = replace(settings, seed=seed, seeds=None, out=settings.out / f"seed-{seed}")
        console.say(f"seed {seed}:")
        found.append(search(one, console, announce=announce(one)))
        rows.append({"seed": seed, **figures(one.out), "genotype": found[-1].to_json()})
    summaries = {name: summary([row[name] for row in rows if row[name] is not None]) for name in FIGURES}
    pairs = [agreement(a, b) for a, b in combinations(found, 2)]
    agreeing = summary(pairs)
    write_json(
        settings.out / SEEDS,
        {
            "method": settings.method,
            "seeds": rows,
            **{name: vars(s) if s else None for name, s in summaries.items()},
            "agreement": None if agreeing is None else {"mean": agreeing.mean, "least": min(pairs), "most": max(pairs)},
        },
    )
    return table(rows, summaries, agreeing)


def figures(folder: Path) -> dict[str, float | None]:
    """Those of a search, from its log; None where it has no epoch."""
    epochs, _ = read_events(folder, SearchEpoch)
    return {name: attrgetter(path)(epochs[-1]) if epochs else None for name, path in FIGURES.items()}


def summary(values: list[float]) -> Summary | None:
    return Summary(mean(values), stdev(values) if len(values) > 1 else None) if values else None


def table(rows: list[dict[str, Any]], summaries: dict[str, Summary | None], agreeing: Summary | None) -> str:
    """For people: a line for each seed, then the mean and the spread."""

    def line(name: object, values: dict[str, float | None]) -> str:
        F, clean, adversarial = (values[key] for key in FIGURES)
        cells = ("-" if F is None else f"{F:.2e}", *("-" if v is None else f"{v:.1%}" for v in (clean, adversarial)))
        return f"{name!s:>6}  {cells[0]:>9}  {cells[1]:>7}  {cells[2]:>11}"

    lines = [f"{'seed':>6}  {'F':>9}  {'clean':>7}  {'adversarial':>11}", *(line(row["seed"], row) for row in rows)]
    lines.append(line("mean", {name: s.mean if s else None for name, s in summaries.items()}))
    lines.append(line("spread", {name: s.spread if s else None for name, s in summaries.items()}))
    if agreeing is not None:
        lines.append(f"two seeds choose {agreeing.mean:.1%} of edges and operations alike, on average")
    return "\n".join(lines)
