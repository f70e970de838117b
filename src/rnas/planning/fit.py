"""Work that fits a time: what `rnas run` does with anyone's images, on any machine (docs/decisions/008)."""

from __future__ import annotations

import copy
import math
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rnas.compute.device import choose_device
from rnas.console import Console
from rnas.data import Dataset
from rnas.errors import RnasError
from rnas.files import write_json
from rnas.nas.methods.rnas import Settings
from rnas.planning.budgets import FEW_ATTACKS, NOWHERE, Budget, plan, work
from rnas.planning.cost import CPU_IMAGES, Facts, evaluate_seconds, search_seconds, timed, train_seconds
from rnas.records import codec
from rnas.records.layout import FITTED
from rnas.records.schema import Speed, Work
from rnas.settings import Distortion, Evaluate, Perturbation, Run, SearchSpace, Source, Train, flags
from rnas.wording import roughly

MINUTES = 20.0


SEARCH_SHARE, EVALUATION_SHARE = 0.35, 0.1
"""Shares of the time that the search and the evaluation may take; the training gets what is left."""


SEARCH_EPOCHS = range(4, 31)


TRAIN_EPOCHS = range(2, 101)


LEAST_SEEN = 15_000
"""Training images, every epoch's counted, without which a network learns next to nothing."""


ENOUGH_SEARCH_EPOCHS, ENOUGH_EPOCHS, ENOUGH_SEEN = 8, 20, 60_000
"""A larger network is chosen only if there is time for so many epochs, and so many training images seen."""


ATTACKED = range(200, 1001)
"""Test images to attack."""


FEWER_IMAGES = (1000, 500, 200, 100, 50, 20, 10)


FEWER_STEPS = ((10, 4, 100), (5, 4, 100), (3, 2, 50), (2, 2, 20))
"""Of runs that are shorter than makes sense: training images of each class; epochs of the training and of the search,
and test images."""


LONGER = 1.5
"""Times the time that was asked for: what takes longer is not started unasked."""


CLEARLY = 0.9
"""One thread must need less than this share of the time of all of them to be taken."""


PROXY_SIDE = 32
"""The search sees larger images scaled to this many pixels a side, and a large image's network halves it at once."""


@dataclass(frozen=True)
class Rung:
    """Networks of one size, and how many images the search needs for it."""

    search_cells: int
    search_channels: int
    search_images: int
    train_cells: int
    train_channels: int
    batch_size: int


RUNGS = (
    Rung(3, 8, 1000, 5, 16, 32),
    Rung(5, 8, 2000, 5, 24, 32),
    Rung(5, 16, 4000, 8, 24, 64),
    Rung(8, 16, 10_000, 14, 32, 128),
    Rung(8, 16, 50_000, 20, 36, 128),
)
"""From what two cores manage in some minutes to the paper's networks."""


@dataclass(frozen=True)
class Choice(Work):
    """What was chosen for a run, and how many seconds it should take."""

    def budget(self, eps: float) -> Budget[Settings]:
        """As a budget. Three steps of ε/2 take about three fifths of the time of the paper's seven of ε/4: the epochs
        that this leaves time for are worth more."""
        attack = Perturbation(attack_steps=3, step=eps / 2)
        search = Settings(
            NOWHERE,
            Source(image_size=self.search_side, limit_per_class=self.search_per_class),
            SearchSpace(self.search_cells, self.search_channels),
            attack,
            bound="0.5x",
            epochs=self.search_epochs,
            warmup=self.search_epochs // 2,
            batch_size=self.batch_size,
            lr=0.05,
            alpha_lr=0.01,
            projection_steps=40,
            projection_lr=0.4,
            monitor=64,
        )
        train = Train(
            "",
            NOWHERE,
            perturbation=attack,
            cells=self.train_cells,
            channels=self.train_channels,
            stem_stride=2 if self.stem_stride == 2 else 1,
            epochs=self.train_epochs,
            batch_size=self.batch_size,
            lr=0.05,
            drop_path=0.0,
        )
        evaluate = Evaluate(NOWHERE, FEW_ATTACKS, limit=self.attacked)
        return Budget(search, train, evaluate, Distortion(("",), NOWHERE))


def choose(settings: Run, data: Dataset, console: Console) -> Choice:
    """What an earlier call chose for this run, if it did; else what fits now.

    RnasError if it cannot be read, and if the run would take much longer than was asked for: where somebody can be
    asked, only if they do not want that; else unless `settings.yes`.
    """
    path = settings.out / FITTED
    if not path.exists():
        choice = fit(settings, data, console)
        asked = 60 * (MINUTES if settings.minutes is None else settings.minutes)
        if choice.seconds > LONGER * asked and not settings.yes:
            _ask(settings, data, choice.seconds, asked, console)
        return choice
    try:
        return codec.read(Choice, path)
    except RnasError as e:
        raise RnasError(f"{e}; start in another --out") from e


def _ask(settings: Run, data: Dataset, needed: float, asked: float, console: Console) -> None:
    """Ask whether to start a run of `needed` seconds in place of the `asked`; RnasError for no, with one that fits."""
    smaller, seconds = _quickest(settings, data).smaller(asked)
    command = shlex.join(["rnas", "run", *flags(smaller)])
    forecast = (
        f"the least that makes sense takes {roughly(needed)} on this machine, not {roughly(asked)}. "
        f"Little can be expected of a shorter run; one that takes {roughly(seconds)}: {command}"
    )
    if not console.asks(f"{forecast}\nStart the long one all the same?"):
        raise RnasError(f"{forecast}. --yes starts the long one")


def keep(choice: Choice, out: Path) -> None:
    """Keep `choice` in the run's folder `out`, for calls that go on with the run."""
    if not (out / FITTED).exists():
        write_json(out / FITTED, codec.encode(choice))


def describe(choice: Choice, budget: Budget[Settings], minutes: float | None, kept: bool = False) -> str:
    """What was chosen, now or (`kept`) by an earlier call, for people: one line."""
    about, asked = max(1, round(choice.seconds / 60)), MINUTES if minutes is None else minutes
    text = work(budget)
    if choice.threads < torch.get_num_threads():
        text += (
            f"; on {choice.threads} of {torch.get_num_threads()} threads, which is quicker while others use the cores"
        )
    if kept:
        return f"going on with the work that was chosen before: {text}"
    text = f"about {about} min on this machine: {text}"
    if about > 1.2 * asked:
        return (
            f"{text}. That is the least that makes sense here, more than the {asked:g} asked for; less: a smaller "
            "--image-size, --limit-per-class, --train-epochs or --limit"
        )
    return f"{text}. More: --minutes N, --search-epochs, --train-epochs, or --budget paper"


def fit(settings: Run, data: Dataset, console: Console) -> Choice:
    """The largest networks, and then the most epochs, that fit `settings.minutes` on this machine, by the time that a
    few passes take on it. At the lower end the least that makes sense, however long that takes.

    RnasError if the options given fit no such run.
    """
    seconds = 60 * (MINUTES if settings.minutes is None else settings.minutes)
    console.say("choosing the work that fits: timing networks ...")
    fitter = _quickest(settings, data)
    best = fitter.spend(seconds)
    for rung in RUNGS[1:]:
        if not fitter.enough(best):  # still less so with larger networks
            break
        fitter = _Fitter(settings, data, rung, fitter.threads)
        choice = fitter.spend(seconds)
        if not fitter.enough(choice):
            break
        best = choice
    return best


def _quickest(settings: Run, data: Dataset) -> _Fitter:
    """The smallest networks on all of torch's threads, or on one if that is clearly quicker. It is where other programs
    use the cores: threads wait for each other after every operation, and so for the one that does not get a core."""
    everything = _Fitter(settings, data, RUNGS[0], torch.get_num_threads())
    if choose_device(settings.device).type != "cpu" or everything.threads == 1 or "OMP_NUM_THREADS" in os.environ:
        return everything
    alone = _Fitter(settings, data, RUNGS[0], 1)
    return alone if alone.network.weights < CLEARLY * everything.network.weights else everything


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within, torch uses so many threads on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def speeds(budget: Budget[Settings], seen: Facts, about: Facts, device: torch.device) -> tuple[Speed, Speed]:
    """The speeds of the supernet, on the images `seen` by the search, and of the network to train."""
    return timed(budget.search, seen, device, CPU_IMAGES), timed(budget.train, about, device, CPU_IMAGES)


class _Fitter:
    """The networks of one rung, timed, and what can be done with them."""

    def __init__(self, settings: Run, data: Dataset, rung: Rung, number: int):
        """`number` of threads."""
        self.settings, self.rung, self.threads = settings, rung, number
        self.eps = settings.eps or data.eps_default
        classes, counts = len(data.classes), torch.bincount(data.train.labels.cpu())
        self.counts = counts.tolist()
        self.about = Facts(len(data.train), len(data.test), classes, data.image_size)
        # Every class comes in both halves of the search's images, and every half fills some batches.
        per_class = max(4, -(-max(rung.search_images, 4 * (settings.batch_size or 0)) // classes))
        self.per_class = per_class if per_class < int(counts.max()) else None
        self.side = PROXY_SIDE if min(data.image_size) > PROXY_SIDE else None
        seen = int(counts.clamp(max=per_class).sum())
        self.seen = Facts(seen, 0, classes, (self.side, self.side) if self.side else data.image_size)
        halving = self.side is not None and all(side % 8 == 0 for side in data.image_size)
        self.stem_stride = 2 if halving else 1
        with threads(number):
            budget, device = self.plan(self._choice()), choose_device(settings.device)
            self.supernet, self.network = speeds(budget, self.seen, self.about, device)

    def plan(self, choice: Choice) -> Budget[Settings]:
        return plan(self.settings, self.about.train, choice.budget(self.eps))

    def spend(self, seconds: float) -> Choice:
        """The choice that takes about `seconds`, or the least that makes sense."""
        attacked = _most(ATTACKED, lambda n: self._attacking(self._choice(attacked=n)) <= EVALUATION_SHARE * seconds)
        least = min(TRAIN_EPOCHS[-1], max(TRAIN_EPOCHS[0], LEAST_SEEN // self.about.train))
        epochs = range(least, TRAIN_EPOCHS.stop)
        left = seconds - self._attacking(self._choice(attacked=attacked))
        share = min(SEARCH_SHARE * seconds, left - self._training(self._choice(train_epochs=least)))
        searched = _most(SEARCH_EPOCHS, lambda n: self._searching(self._choice(search_epochs=n)) <= share)
        left -= self._searching(self._choice(search_epochs=searched))
        trained = _most(epochs, lambda n: self._training(self._choice(train_epochs=n)) <= left)
        chosen = self._choice(searched, trained, attacked)
        return replace(chosen, seconds=round(self.whole(chosen)))

    def _choice(
        self,
        search_epochs: int = SEARCH_EPOCHS[0],
        train_epochs: int = TRAIN_EPOCHS[0],
        attacked: int = ATTACKED[0],
    ) -> Choice:
        rung = self.rung
        return Choice(
            search_side=self.side,
            search_per_class=self.per_class,
            search_cells=rung.search_cells,
            search_channels=rung.search_channels,
            search_epochs=search_epochs,
            train_cells=rung.train_cells,
            train_channels=rung.train_channels,
            stem_stride=self.stem_stride,
            train_epochs=train_epochs,
            batch_size=rung.batch_size,
            attacked=min(attacked, self.about.test),
            threads=self.threads,
            seconds=0,
        )

    def smaller(self, seconds: float) -> tuple[Run, float]:
        """Settings of a run that takes `seconds` at most, and how many: fewer images and epochs than make sense. Where
        none is so short, the shortest, with the time for it."""
        given = self.settings
        most = given.source.limit_per_class or max(self.counts)
        for per_class in (most, *(n for n in FEWER_IMAGES if n < most)):
            for train_epochs, search_epochs, limit in FEWER_STEPS:
                fitter = self._of(
                    replace(
                        given,
                        source=given.source if per_class == most else replace(given.source, limit_per_class=per_class),
                        search_epochs=min(given.search_epochs or search_epochs, search_epochs),
                        train_epochs=min(given.train_epochs or train_epochs, train_epochs),
                        limit=min(given.limit or limit, limit),
                    )
                )
                whole = fitter.whole(fitter._choice())
                if whole <= seconds:
                    return fitter.settings, whole
        return replace(fitter.settings, minutes=math.ceil(whole / 60)), whole

    def _of(self, settings: Run) -> _Fitter:
        """The same networks, timed already, for other `settings` of the same images."""
        other = copy.copy(self)
        other.settings = settings
        most = settings.source.limit_per_class
        counts = [n if most is None else min(n, most) for n in self.counts]
        other.about = replace(self.about, train=sum(counts))
        other.seen = replace(self.seen, train=sum(min(n, self.per_class or n) for n in counts))
        return other

    def whole(self, choice: Choice) -> float:
        """Seconds of the whole run."""
        return self._searching(choice) + self._training(choice) + self._attacking(choice)

    def enough(self, choice: Choice) -> bool:
        """Whether there is time for enough epochs to be worth this rung's larger networks."""
        seen = choice.train_epochs * self.about.train
        trained = choice.train_epochs >= ENOUGH_EPOCHS and seen >= ENOUGH_SEEN
        return trained and choice.search_epochs >= ENOUGH_SEARCH_EPOCHS

    def _searching(self, choice: Choice) -> float:
        return search_seconds(self.plan(choice).search, self.seen, self.supernet)

    def _training(self, choice: Choice) -> float:
        jobs = self.plan(choice).trainings.values()
        return sum(train_seconds(job, self.about, self.network) for job in jobs)

    def _attacking(self, choice: Choice) -> float:
        budget = self.plan(choice)
        trainings = budget.trainings.values()
        return sum(evaluate_seconds(budget.evaluate, t, self.about, self.network) for t in trainings)


def _most(numbers: range, fits: Callable[[int], bool]) -> int:
    """The largest of `numbers` that fits; the first if none does. Costs rise with the number."""
    return next((n for n in reversed(numbers) if fits(n)), numbers[0])
