"""What a reader has to know before comparing: images, seeds, and what was cut."""

from __future__ import annotations

from pathlib import Path

from rnas import published as paper
from rnas.report.words import CW_CAVEAT, count
from rnas.reproduce.budgets import BUDGETS, cuts
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


def _budget(plan: Plan) -> str:
    settings = plan.settings
    searched = any(path.name.startswith("search-") for path in plan.steps)
    last = "distortion" if plan.distorts else "evaluate"
    parts = ("source", *(("space", "search") if searched else ()), "train", last)
    cut = cuts(settings.budget, tuple(p for p in parts if p in BUDGETS[settings.budget]))
    if not cut:
        return "Budget paper: the settings of §5.1."
    text = f"Budget {settings.budget}, cut against §5.1: {'; '.join(cut)}."
    if "cells" in BUDGETS[settings.budget].get("train", {}):
        keeps = ["RobNet-free keeps its 20 cells, each its own"] * any("RobNet-free" in p.name for p in plan.steps)
        if any(paper.find(row.model).kind == "hand-made" for row in plan.rows if row.runs and settings.what != "fig5"):
            keeps.append("hand-made networks keep their size")
        text += f" {'; '.join(keeps)}." if keeps else ""
    return text
