"""How much work: a budget is a function that returns full settings, the paper's (§5.1) or smaller ones.

What a run adds to them (its images, folders, seed, device, the options given) is for `plan` to say, and for
`rnas.reproduce.plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from rnas.errors import RnasError
from rnas.nas.methods.rnas import Settings
from rnas.settings import (
    PAPER_ATTACKS,
    Distortion,
    Evaluate,
    Perturbation,
    Run,
    Search,
    SearchSpace,
    Source,
    Train,
)

NOWHERE = Path()
"""Stands where a run is to be written, which is for the plan to say."""
FEW_ATTACKS = ("fgsm", "pgd20", "cw")

S = TypeVar("S", bound=Search)


@dataclass(frozen=True)
class Budget(Generic[S]):
    """How much work, as the settings of every kind of step."""

    search: S
    train: Train
    evaluate: Evaluate
    distortion: Distortion

    @property
    def trainings(self) -> dict[str, Train]:
        """The trainings, by the name of their folder: of the digits also one on clean images, for the demo shows what
        adversarial training is worth."""
        jobs = {"train": self.train}
        if self.train.source.data == "digits":
            jobs["train-standard"] = replace(self.train, out=self.train.out.parent / "train-standard", standard=True)
        return jobs


_train = partial(Train, "", NOWHERE)
_evaluate = partial(Evaluate, NOWHERE)
_distortion = partial(Distortion, ("",), NOWHERE)


def _search(kind: type[S], **settings: Any) -> S:
    """The settings of a method. What is RNAS's own among them, other methods have for themselves or not at all."""
    known = {f.name for f in fields(kind if issubclass(kind, Settings) else Search)}
    return kind(NOWHERE, **{name: value for name, value in settings.items() if name in known})


def paper(kind: type[S]) -> Budget[S]:
    """§5.1."""
    return Budget(_search(kind), _train(), _evaluate((*PAPER_ATTACKS, "aa")), _distortion(limit=1000))


def demo(kind: type[S]) -> Budget[S]:
    """Digits: what a few minutes of two cores can do."""
    search = _search(
        kind,
        space=SearchSpace(cells=3, channels=8),
        perturbation=Perturbation(attack_steps=4),
        bound="0.5x",
        epochs=5,
        warmup=3,
        batch_size=64,
        lr=0.05,
        alpha_lr=0.01,
        projection_steps=30,
        projection_lr=0.4,
        monitor=64,
    )
    train = _train(cells=3, channels=8, epochs=8, batch_size=64, drop_path=0.0)
    return Budget(search, train, _evaluate(FEW_ATTACKS), _distortion())


def small(kind: type[S]) -> Budget[S]:
    """Own images on a CPU."""
    search = _search(
        kind,
        space=SearchSpace(cells=5, channels=8),
        bound="0.5x",
        epochs=8,
        batch_size=64,
        lr=0.025,
        alpha_lr=3e-3,
        projection_steps=40,
        projection_lr=0.4,
    )
    train = _train(cells=5, channels=16, epochs=20, batch_size=64, drop_path=0.0)
    return Budget(search, train, _evaluate(FEW_ATTACKS, limit=1000), _distortion())


def day(kind: type[S]) -> Budget[S]:
    """Table 1 in about a day of one large GPU."""
    train = _train(epochs=30, drop_path=0.0)
    return Budget(_search(kind, epochs=20), train, _evaluate(limit=1000), _distortion(limit=1000))


def hour(kind: type[S]) -> Budget[S]:
    """Small networks on 500 images of a class."""
    source = Source(limit_per_class=500)
    search = _search(kind, source=source, space=SearchSpace(cells=5), epochs=8, batch_size=64)
    train = _train(source=source, epochs=8, cells=8, channels=16, batch_size=64, drop_path=0.0)
    return Budget(search, train, _evaluate(limit=256), _distortion())


def smoke(kind: type[S]) -> Budget[S]:
    """Whether everything runs, on two cores: a few steps for each network, nobody learns much."""
    source = Source(limit_per_class=10, image_size=16)
    space = SearchSpace(cells=3, channels=4)
    search = _search(
        kind, source=source, space=space, epochs=2, warmup=1, batch_size=20, monitor=20, projection_steps=2
    )
    train = _train(source=source, epochs=2, cells=3, channels=4, batch_size=10, drop_path=0.0)
    return Budget(search, train, _evaluate(limit=16), _distortion(limit=16, attack_steps=5))


BUDGETS: dict[str, Callable[[type[Any]], Budget[Any]]] = {f.__name__: f for f in (demo, small, paper, day, hour, smoke)}
"""By their names; each is given the settings' class of a search method."""


def work(budget: Budget[Settings]) -> str:
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


def plan(settings: Run, images: int, fitted: Budget[Settings] | None = None) -> Budget[Settings]:
    """The settings of each part of the run: those of the budget, or of `fitted`, where the work was chosen to fit a
    time, changed by the options given.

    A budget's batch shrinks to half of a small training set of `images`; one that was asked for does not.
    """
    name = "demo" if settings.budget == "auto" else settings.budget
    budget: Budget[Settings] = BUDGETS[name](Settings) if fitted is None else fitted
    most = images // 2
    if settings.batch_size is None and fitted is None and name == "paper" and most < budget.search.batch_size:
        raise RnasError(f"{settings.source.data} has {images} training images: too few for the paper's batches of 128")
    if settings.batch_size is not None and settings.batch_size > most:
        raise RnasError(
            f"{settings.source.data} has {most} images in half of its training set: "
            f"fewer than one batch of {settings.batch_size}; use a smaller --batch-size"
        )
    search, train, epochs = budget.search, budget.train, settings.search_epochs
    seen = _given(image_size=search.source.image_size, limit_per_class=search.source.limit_per_class)
    out = settings.out
    shared: dict[str, Any] = {"seed": settings.seed, "device": settings.device, "resume": True}
    passes: dict[str, Any] = {"precision": settings.precision, "save_memory": settings.save_memory}

    def batch(size: int) -> int:
        return settings.batch_size or max(1, min(size, most))

    return replace(
        budget,
        search=replace(
            search,
            out=out / "search",
            source=replace(settings.source, **seen),
            space=replace(search.space, **_given(channels=settings.channels)),
            perturbation=replace(search.perturbation, eps=settings.eps),
            batch_size=batch(search.batch_size),
            **shared,
            **passes,
            **_given(bound=settings.bound, epochs=epochs, warmup=None if epochs is None else epochs // 2),
        ),
        train=replace(
            train,
            arch=str(out / "search"),
            out=out / "train",
            source=settings.source,
            perturbation=replace(train.perturbation, eps=settings.eps),
            batch_size=batch(train.batch_size),
            **shared,
            **passes,
            **_given(cells=settings.cells, channels=settings.channels, epochs=settings.train_epochs),
        ),
        evaluate=replace(
            budget.evaluate,
            run=out / "train",
            eps=settings.eps,
            **shared,
            **_given(attacks=settings.attacks, limit=settings.limit),
        ),
    )


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}
