"""How much work `rnas run` does: a budget's changes to the paper's settings, then those of the options given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rnas.errors import RnasError
from rnas.nas.methods.rnas import Settings as Search
from rnas.settings import PAPER_ATTACKS, Evaluate, Perturbation, Run, SearchSpace, Train

Changes = Mapping[str, Mapping[str, Any]]
"""What a budget changes: source (the search's images), space, attack (the search's), train-attack, search, train,
evaluate."""


@dataclass(frozen=True)
class Budget:
    """How much work a run does."""

    search: Search
    train: Train
    evaluate: Evaluate

    @property
    def trainings(self) -> dict[str, Train]:
        """The trainings, by the name of their folder: of the digits also one on clean images, for the demo shows what
        adversarial training is worth."""
        jobs = {"train": self.train}
        if self.train.source.data == "digits":
            jobs["train-standard"] = replace(self.train, out=self.train.out.parent / "train-standard", standard=True)
        return jobs


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


def work(budget: Budget) -> str:
    """What a run does, for people: one line."""
    search, train, evaluate = budget.search, budget.train, budget.evaluate
    per_class, side = search.source.limit_per_class, search.source.image_size
    images = "all training images" if per_class is None else f"{per_class} images a class"
    at = "" if side is None else f" at {side} pixels"
    projection = "" if search.bound == "none" else f", H = {search.bound}"
    if search.projection_steps is not None and projection:
        projection += f", projections of {search.projection_steps} steps at most"
    tested = "all" if evaluate.limit is None else str(evaluate.limit)
    return (
        f"search {search.epochs} epochs on {images}{at} ({search.space.cells} cells, C = {search.space.channels}, "
        f"PGD-{search.perturbation.attack_steps}, learning rate {search.lr:g}{projection}), "
        f"train {train.epochs} epochs ({train.cells} cells, C = {train.channels}, "
        f"PGD-{train.perturbation.attack_steps}, learning rate {train.lr:g}), "
        f"attack {tested} test images ({', '.join(evaluate.attacks)})"
    )


def is_fitted(settings: Run) -> bool:
    """Whether the work is chosen to fit a time, and not a named budget."""
    return settings.budget == "auto" and (settings.source.data != "digits" or settings.minutes is not None)


def plan(settings: Run, images: int, fitted: Changes | None = None) -> Budget:
    """The settings of each part of the run: the paper's, changed by the budget (or by `fitted`, where the work was
    chosen to fit a time), changed by the options given.

    A budget's batch shrinks to half of a small training set of `images`; one that was asked for does not.
    """
    kind = "demo" if settings.budget == "auto" else settings.budget
    changes = {part: dict(values) for part, values in (BUDGETS[kind] if fitted is None else fitted).items()}

    def override(part: str, **given: Any) -> None:
        changes[part] |= {name: value for name, value in given.items() if value is not None}

    if fitted is not None or kind != "paper":
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

    out, attack = settings.out, Perturbation(eps=settings.eps)
    shared: dict[str, Any] = {"seed": settings.seed, "device": settings.device, "resume": True}
    passes: dict[str, Any] = {"precision": settings.precision, "save_memory": settings.save_memory}
    return Budget(
        Search(
            out=out / "search",
            source=replace(settings.source, **changes.get("source", {})),
            space=SearchSpace(**changes["space"]),
            perturbation=replace(attack, **changes["attack"]),
            **shared,
            **passes,
            **changes["search"],
        ),
        Train(
            arch=str(out / "search"),
            out=out / "train",
            source=settings.source,
            perturbation=replace(attack, **changes.get("train-attack", {})),
            **shared,
            **passes,
            **changes["train"],
        ),
        Evaluate(run=out / "train", eps=settings.eps, **shared, **changes["evaluate"]),
    )
