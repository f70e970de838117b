"""The whole pipeline of `rnas run`: search, train, evaluate, report, export, side by side in one folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rnas.console import Console
from rnas.errors import RnasError
from rnas.evaluation import EVALUATION, check_attacks, evaluate_run
from rnas.export import export
from rnas.nets.derived import check_image_size
from rnas.nets.saved import load_model
from rnas.report import write_report
from rnas.runs import Run as Folder
from rnas.search import GENOTYPE, search
from rnas.settings import PAPER_ATTACKS, Evaluate, Perturbation, Run, Search, SearchSpace, Train
from rnas.steps import choose_device, load_data
from rnas.train import train


@dataclass(frozen=True)
class Budget:
    """How much work a run does."""

    search: Search
    train: Train
    evaluate: Evaluate


def run(settings: Run, console: Console | None = None) -> Path:
    """Run the pipeline in `settings.out`; returns the path of the report.

    What an earlier call with the same settings finished is not done again (`resume`). RnasError for bad input, before
    anything is written.
    """
    console = console or Console(quiet=True)
    out = settings.out
    data = load_data(settings.source, settings.seed)
    budget = plan(settings, len(data.train))
    check_image_size(data.image_size, 8, 4, "the search")
    check_attacks(budget.evaluate.attacks)
    folder = Folder.open(out, settings, resume=settings.resume, device=str(choose_device(settings.device)))
    if not (out / "search" / GENOTYPE).exists():
        search(budget.search, console)
    jobs = {"train": budget.train}
    if settings.source.data == "digits":  # the demo shows what adversarial training is worth
        jobs["train-standard"] = replace(budget.train, out=out / "train-standard", standard=True)
    for name, job in jobs.items():
        if not (out / name / "model.json").exists():
            train(job, console)
        if not (out / name / EVALUATION).exists():
            evaluate_run(replace(budget.evaluate, run=out / name), console)
    model, meta = load_model(out / "train")
    export(model, meta, "onnx", out / "model.onnx", tuple(meta["image_size"]))
    report = folder.folder / "report.html"
    write_report([out], report)
    console.say(f"report: {report}\nmodel: {out / 'model.onnx'}")
    return report


# What each budget changes in the paper's settings (§5.1).
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {  # digits at 16x16: what a few minutes of two cores can do
        "space": {"cells": 3, "channels": 8},
        "attack": {"attack_steps": 4},
        "search": {
            "bound": "0.5x",
            "epochs": 5,
            "warmup": 3,
            "batch_size": 64,
            "lr": 0.05,
            "alpha_lr": 0.01,
            "projection_steps": 30,
            "projection_lr": 0.4,
            "monitor": 64,
        },
        "train": {"cells": 3, "channels": 8, "epochs": 8, "batch_size": 64, "drop_path": 0.0},
        "evaluate": {"attacks": ("fgsm", "pgd20", "cw")},
    },
    "small": {  # own images on a CPU
        "space": {"cells": 5, "channels": 8},
        "attack": {},
        "search": {
            "bound": "0.5x",
            "epochs": 8,
            "batch_size": 64,
            "lr": 0.025,
            "alpha_lr": 3e-3,
            "projection_steps": 40,
            "projection_lr": 0.4,
        },
        "train": {"cells": 5, "channels": 16, "epochs": 20, "batch_size": 64, "drop_path": 0.0},
        "evaluate": {"attacks": ("fgsm", "pgd20", "cw"), "limit": 1000},
    },
    "paper": {"space": {}, "attack": {}, "search": {}, "train": {}, "evaluate": {"attacks": (*PAPER_ATTACKS, "aa")}},
}


def plan(settings: Run, images: int) -> Budget:
    """The settings of each part of the run: the paper's, changed by the budget, changed by the options given.

    A budget's batch shrinks to half of a small training set of `images`; one that was asked for does not.
    """
    kind = settings.budget
    if kind == "auto":
        kind = "demo" if settings.source.data == "digits" else "small"
    changes = {part: dict(values) for part, values in BUDGETS[kind].items()}

    def override(part: str, **given: Any) -> None:
        changes[part] |= {name: value for name, value in given.items() if value is not None}

    if kind != "paper":
        for part in ("search", "train"):
            changes[part]["batch_size"] = max(1, min(changes[part]["batch_size"], images // 2))
    elif images // 2 < 128 and settings.batch_size is None:
        raise RnasError(f"{settings.source.data} has {images} training images: too few for the paper's batches of 128")
    if settings.batch_size is not None and settings.batch_size > images // 2:
        raise RnasError(
            f"{settings.source.data} has {images // 2} images in half of its training set: "
            f"fewer than one batch of {settings.batch_size}; use a smaller --batch-size"
        )

    override("space", channels=settings.channels)
    override("search", bound=settings.bound, batch_size=settings.batch_size)
    if settings.search_epochs is not None:
        override("search", epochs=settings.search_epochs, warmup=settings.search_epochs // 2)
    override("train", cells=settings.cells, channels=settings.channels)
    override("train", epochs=settings.train_epochs, batch_size=settings.batch_size)
    override("evaluate", attacks=settings.attacks, limit=settings.limit)

    out, training = settings.out, Perturbation(eps=settings.eps)
    searching = replace(training, **changes["attack"])
    shared: dict[str, Any] = {"seed": settings.seed, "device": settings.device, "resume": True}
    made: dict[str, Any] = {**shared, "source": settings.source}
    space = SearchSpace(**changes["space"])
    return Budget(
        Search(out=out / "search", space=space, perturbation=searching, **made, **changes["search"]),
        Train(arch=str(out / "search"), out=out / "train", perturbation=training, **made, **changes["train"]),
        Evaluate(run=out / "train", eps=settings.eps, **shared, **changes["evaluate"]),
    )
