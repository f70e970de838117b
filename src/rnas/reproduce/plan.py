"""Which runs a table or a figure needs. Pure: settings in, settings out; nothing is read but the paper's figures.

A run's folder is named after its settings, so that what two tables share is run once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rnas import published as paper
from rnas.errors import RnasError
from rnas.nas.methods import load, names
from rnas.planning.budgets import BUDGETS, Budget
from rnas.settings import (
    PAPER_ATTACKS,
    Bound,
    Distortion,
    Evaluate,
    Reproduce,
    Search,
    Source,
    Train,
    flag_names,
    identity,
)

Step = Search | Train | Evaluate | Distortion
TABLE_DATA = {1: "cifar10", 2: "cifar100", 3: "svhn", 4: "tiny-imagenet", 5: "tiny-imagenet"}
ATTACKS = (*PAPER_ATTACKS, "aa")
AT, ST = "at", "st"
PUBLISHED_BOUNDS = {"1e-4": "RNAS-H", "1e-5": "RNAS-L"}
"""The bounds H under which the published cells were found (§5.1)."""


@dataclass(frozen=True)
class Row:
    """One row of a table, or point of a figure: a model on a data set, and the runs that fill it."""

    model: str
    """As the paper spells it; in Fig. 5 the bound H."""
    data: str
    runs: dict[str, tuple[Path, ...]]
    """at, st -> a folder for each seed."""
    reason: str | None = None
    """Why there are no runs."""


@dataclass
class Plan:
    """What is to be run, in order, and what of it goes where."""

    settings: Reproduce
    steps: dict[Path, Step] = field(default_factory=dict)
    """By a path that is the step's own: its folder, or in it what the step writes."""
    rows: list[Row] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """table or fig."""
        return self.settings.what[:-1]

    @property
    def number(self) -> int:
        """Of the table or figure."""
        return int(self.settings.what[-1])

    def budget(self, method: str = "rnas") -> Budget[Search]:
        """How much work, with the settings of a search method."""
        return BUDGETS[self.settings.budget](load(method).settings)

    @property
    def distorts(self) -> bool:
        """Whether it is a figure of distortions: its networks are not evaluated."""
        return self.settings.what in ("fig2", "fig3")


def make_plan(settings: Reproduce) -> Plan:
    """The runs that `settings.what` needs."""
    plan = Plan(settings)
    if settings.only is not None and plan.kind == "fig" and plan.number != 1:
        raise RnasError(f"{settings.what} has its own networks: leave out --only")
    if plan.kind == "table":
        _plan_table(plan, plan.number)
    elif plan.number == 1:
        _plan_table(plan, 1, (AT,))
    elif plan.distorts:
        _plan_distortion(plan)
    elif plan.number == 5:
        _plan_bounds(plan)
    return plan


def _plan_table(plan: Plan, number: int, trainings: tuple[str, ...] | None = None) -> None:
    """Tables 1 to 5: every row, adversarially trained; in Table 1 also with standard training."""
    trainings = trainings or ((AT, ST) if number == 1 else (AT,))
    data = _data(plan, TABLE_DATA[number])
    only = None if plan.settings.only is None else {paper.find(name).name for name in plan.settings.only}
    members = [paper.find(str(figures["model"])).name for figures in paper.table(number)]
    if only is not None and not only & set(members):
        raise RnasError(f"{plan.settings.what} has none of {', '.join(sorted(only))}: it has {', '.join(members)}")
    for figures in paper.table(number):
        model = str(figures["model"])
        published = paper.find(model)
        method = _method(published.name) if number == 5 and published.kind == "cell" else None
        reason = None
        if only is not None and published.name not in only:
            reason = "not among the architectures asked for (--only)"
        elif number == 5 and published.kind == "cell":
            if method is None:
                reason = f"its search method is not implemented (there are: {', '.join(names())})"
        elif published.source is None:
            reason = published.note
        runs: dict[str, tuple[Path, ...]] = {}
        if reason is None:
            for training in trainings:
                runs[training] = tuple(
                    _network(plan, _searched(plan, published.name, method, data, seed), data, training, seed)
                    for seed in range(plan.settings.seeds)
                )
        plan.rows.append(Row(model, data, runs, reason))


def _searched(plan: Plan, name: str, method: str | None, data: str, seed: int) -> str:
    """What to train: the published architecture itself, or the cell that `method` is yet to find."""
    if method is None:
        return name
    bound = next((bound for bound, cell in PUBLISHED_BOUNDS.items() if cell == name), "none")
    return str(_search(plan, method, bound, data, seed))


def _method(name: str) -> str | None:
    """The search method that finds the cells called `name`; None if it does not exist."""
    wanted = "rnas" if name in PUBLISHED_BOUNDS.values() else _letters(name.removesuffix("-free"))
    return next((m for m in names() if _letters(m) == wanted), None)


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.casefold())


def _plan_distortion(plan: Plan) -> None:
    """Fig. 2: VGG16, ST and AT. Fig. 3: ResNet18 too, and on CIFAR-100 as well."""
    architectures = ("VGG16",) if plan.number == 2 else ("VGG16", "ResNet18")
    sets = ("cifar10",) if plan.number == 2 else ("cifar10", "cifar100")
    for data in dict.fromkeys(_data(plan, name) for name in sets):
        for arch in architectures:
            runs: dict[str, tuple[Path, ...]] = {}
            for training in (ST, AT):
                folder = _trained(plan, arch, data, training, 0)
                runs[training] = (folder,)
                measured = folder / "distortion"
                plan.steps[measured] = replace(
                    plan.budget().distortion, networks=(str(folder),), out=measured, device=plan.settings.device
                )
            plan.rows.append(Row(arch, data, runs))


def _plan_bounds(plan: Plan) -> None:
    """Fig. 5: cells found on CIFAR-10 under each bound, trained on three data sets. Published cells stand where there
    are any, and so share their runs with the tables."""
    home = _data(plan, "cifar10")
    for data in dict.fromkeys(_data(plan, name) for name in ("cifar10", "cifar100", "svhn")):
        for bound in plan.settings.bounds:
            folders = []
            for seed in range(plan.settings.seeds):
                arch = _published_cell(bound) or str(_search(plan, "rnas", bound, home, seed))
                folders.append(_network(plan, arch, data, AT, seed, ("pgd20",)))
            plan.rows.append(Row(bound, data, {AT: tuple(folders)}))


def _published_cell(bound: str) -> str | None:
    """The published architecture that was found under `bound`, however it is written."""
    wanted = Bound.parse(bound)
    return next((cell for text, cell in PUBLISHED_BOUNDS.items() if Bound.parse(text) == wanted), None)


def _data(plan: Plan, name: str) -> str:
    return plan.settings.data or name


def _source(plan: Plan, source: Source, data: str) -> Source:
    """The images `data`, cut as the `source` of a budget says."""
    return replace(source, data=data, data_root=plan.settings.data_root)


def _search(plan: Plan, method: str, bound: str, data: str, seed: int) -> Path:
    """Adds a search to the plan, unless it is there; returns its folder."""
    budget = plan.budget(method).search
    bounded: dict[str, Any] = {"bound": bound} if "bound" in flag_names(type(budget)) else {}
    step = replace(
        budget,
        source=_source(plan, budget.source, data),
        method=method,
        seed=seed,
        device=plan.settings.device,
        resume=True,
        **bounded,
    )
    folder = _folder(plan, f"search-{method}-{bound}-{_short(data)}-s{seed}", step)
    plan.steps[folder] = replace(step, out=folder)
    return folder


def _trained(plan: Plan, arch: str, data: str, training: str, seed: int) -> Path:
    """Adds a training to the plan, unless it is there; returns its folder. `arch` is a name, or a search's folder."""
    budget = plan.budget().train
    name = Path(arch).name  # of a search: named after its settings
    step = replace(
        budget,
        arch=name,
        source=_source(plan, budget.source, data),
        standard=training == ST,
        cells=_depth(arch) or budget.cells,
        seed=seed,
        device=plan.settings.device,
        resume=True,
    )
    folder = _folder(plan, f"{name[:40]}-{_short(data)}-{training}-s{seed}", step)
    plan.steps[folder] = replace(step, arch=arch, out=folder)
    return folder


def _depth(arch: str) -> int | None:
    """The number of cells of an architecture whose cells all differ (RobNet-free); None for others."""
    found = next((p for p in paper.architectures().values() if p.name == arch and p.kind == "cell"), None)
    if found is None or found.source is None:
        return None
    return paper.genotype(arch).depth


def _network(plan: Plan, arch: str, data: str, training: str, seed: int, attacks: Sequence[str] | None = None) -> Path:
    """Adds the training and the evaluation of a network to the plan; returns its folder."""
    folder = _trained(plan, arch, data, training, seed)
    wanted = tuple(attacks or (ATTACKS if training == AT else ("fgsm",)))
    plan.steps[folder / "evaluation.json"] = replace(
        plan.budget().evaluate, run=folder, attacks=wanted, device=plan.settings.device, resume=True
    )
    return folder


def _short(data: str) -> str:
    """A data set's name in a folder's name."""
    return Path(data).stem


def _folder(plan: Plan, name: str, settings: Search | Train) -> Path:
    """A folder named after all that makes the run what it is; where the data lie is no part of that."""
    value = identity(settings)
    value["source"].pop("data_root")
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return plan.settings.out / "runs" / f"{name}-{digest[:8]}"
