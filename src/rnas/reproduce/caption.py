"""What a reader has to know before comparing: images, seeds, and what was cut."""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter
from pathlib import Path
from typing import Any

from rnas import published as paper
from rnas.nas.methods.rnas import Settings
from rnas.planning import budgets
from rnas.report.words import CW_CAVEAT, count
from rnas.reproduce.plan import PUBLISHED_BOUNDS, Plan
from rnas.reproduce.results import bounds_exceeded, threats
from rnas.wording import apart, radius

WHAT = {
    "table1": "Robustness on CIFAR-10, adversarial (AT) and standard (ST) training",
    "table2": "Transfer to CIFAR-100, adversarial training",
    "table3": "Transfer to SVHN, adversarial training",
    "table4": "Transfer to Tiny-ImageNet, adversarial training",
    "table5": "Cells searched on Tiny-ImageNet directly, adversarial training",
    "fig1": (
        "AutoAttack accuracy against clean accuracy on CIFAR-10, adversarial training; area: parameters, but never "
        "less than a dot"
    ),
    "fig2": "Feature maps of VGG16 on CIFAR-10, clean and adversarial, standard (ST) and adversarial (AT) training",
    "fig3": "Distortion by layer of VGG16 and ResNet18, standard (ST) and adversarial (AT) training",
    "fig4": "The published cells of RNAS-H and RNAS-L",
    "fig5": "Clean (open) and PGD-20 (filled) accuracy against the bound H",
}


def caption(plan: Plan) -> list[str]:
    """The sentences under the plan's table or figure."""
    settings = plan.settings
    name = f"{'Table' if plan.kind == 'table' else 'Fig.'} {plan.number}"
    sentences = [f"{name} of the paper, reproduced. {WHAT[settings.what]}."]
    if settings.what == "fig4":
        return [*sentences, "Drawn from the published genotypes; nothing was trained."]
    found = threats(plan)
    sentences.append(_data(plan))
    if plan.kind == "table":
        sentences.append(
            "Accuracy in percent"
            + (f": mean ± standard deviation over {settings.seeds} seeds" if settings.seeds > 1 else ", one seed")
            + " [95 % Wilson interval: what the number of test images leaves open]; then the paper's figure and, in "
            "brackets, ours minus the paper's."
        )
    if settings.what in ("fig1", "fig5"):
        sentences.append("One seed." if settings.seeds == 1 else f"Means over {settings.seeds} seeds.")
    if found.images:
        attacked = " or ".join(radius(e, "linf") for e in found.eps)
        sentences.append(f"{' or '.join(map(count, found.images))} test images, l∞ attacks with ε = {attacked}.")
    sentences.append(_budget(plan))
    if plan.kind == "table":
        sentences.append(CW_CAVEAT)
    if settings.what == "fig5":
        sentences.append(
            "The published RNAS-H stands at H = 1e-4, RNAS-L at 1e-5; at every other H a cell was searched. The "
            "paper's text does not list the bounds of its figure: these are our choice."
        )
    if plan.kind == "table" and plan.number == 5:
        cells = "; ".join(f"{cell} under H = {bound}" for bound, cell in PUBLISHED_BOUNDS.items())
        sentences.append(f"The cells were searched: {cells}.")
    if over := bounds_exceeded(plan):
        listed = "; ".join("H = {}: F = {}".format(*apart(h, f)) for h, f in over)
        sentences.append(f"Searches that ended over their bound, so that it says little of their cells: {listed}.")
    if settings.what == "fig5":
        sentences.append("Bars: 95 % Wilson intervals.")
    if plan.distorts:
        sentences.append(
            "Networks of seed 0; PGD in eval mode. Layers without a mark: no distortion, or feature maps of "
            "a single pixel, which have none."
        )
    if found.warnings:
        warned = "; ".join(f"{text} ({n} of {found.networks} networks)" for text, n in found.warnings.items())
        sentences.append(f"The evaluations warn, as each run's evaluation.json says in full: {warned}.")
    return sentences


def _data(plan: Plan) -> str:
    settings = plan.settings
    note = f" ({settings.data_note})" if settings.data_note else ""
    shown = ", ".join(dict.fromkeys(Path(row.data).name for row in plan.rows))
    if settings.data is None:
        return f"Images: {shown}{note}."
    warning = "the paper's figures are of its own images, so differences from them mean little"
    return f"Images: {shown}{note}, given with --data in place of the paper's: {warning}."


WORDS = {
    "train.source.limit_per_class": "training images of a class",
    "train.source.image_size": "pixels a side",
    "search.space.cells": "cells while searching",
    "search.space.channels": "channels C while searching",
    "search.epochs": "search epochs",
    "search.warmup": "of them to warm up",
    "search.batch_size": "images in a batch of the search",
    "search.monitor": "images to measure F on",
    "search.projection_steps": "steps of a projection at most",
    "train.epochs": "training epochs",
    "train.cells": "cells",
    "train.channels": "channels C",
    "train.batch_size": "images in a batch",
    "train.drop_path": "drop-path",
    "evaluate.limit": "test images",
    "distortion.attack_steps": "steps of PGD",
}
"""What a budget may cut, in the order of a caption."""
_PAPER = {
    "train.source.limit_per_class": "all",
    "train.source.image_size": "the data set's own",
    "search.warmup": "a quarter",
    "search.projection_steps": "half an epoch",
    "evaluate.limit": "all",
}
"""What the paper's None means."""


def cuts(budget: budgets.Budget[Any], steps: Collection[str]) -> list[str]:
    """What `budget` changes of the paper's settings in `steps`: "8 training epochs instead of 600"."""
    whole = budgets.paper(Settings)
    values = [(path, attrgetter(path)(budget), attrgetter(path)(whole)) for path in WORDS]
    return [
        f"{value} {WORDS[path]} instead of {_PAPER[path] if usual is None else usual}"
        for path, value, usual in values
        if value != usual and path.split(".")[0] in steps
    ]


def _budget(plan: Plan) -> str:
    settings, budget = plan.settings, plan.budget()
    searched = any(path.name.startswith("search-") for path in plan.steps)
    steps = ("train", "distortion" if plan.distorts else "evaluate", *(("search",) if searched else ()))
    cut = cuts(budget, steps)
    if not cut:
        return "Budget paper: the settings of §5.1."
    text = f"Budget {settings.budget}, cut against §5.1: {'; '.join(cut)}."
    if budget.train.cells != budgets.paper(Settings).train.cells:
        keeps = ["RobNet-free keeps its 20 cells, each its own"] * any("RobNet-free" in p.name for p in plan.steps)
        if any(paper.find(row.model).kind == "hand-made" for row in plan.rows if row.runs and settings.what != "fig5"):
            keeps.append("hand-made networks keep their size")
        text += f" {'; '.join(keeps)}." if keeps else ""
    return text
