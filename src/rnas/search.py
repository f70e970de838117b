"""The search loop (Algorithm 1): warm up the weights, then alternate weights, architecture and projection."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rnas import checkpoint
from rnas.attacks.trust import above_chance, chance
from rnas.console import Console
from rnas.data import Split, batches, halves
from rnas.data.dataset import stratified
from rnas.errors import RnasError
from rnas.genotype import Genotype
from rnas.graphs import forget
from rnas.methods.projection import Projection
from rnas.methods.rnas import Batch, Measured, Rnas
from rnas.nets.derived import check_image_size
from rnas.nets.fast import FastSupernet
from rnas.precision import full_precision
from rnas.runs import LOG, Run, read_log, write_arrays
from rnas.settings import Bound, Search
from rnas.steps import (
    Running,
    check_finite,
    choose_device,
    cosine,
    fingerprint,
    hardware,
    load_data,
    reseed,
    set_lr,
    training_attack,
    weight_step,
)

GENOTYPE, ALPHAS = "genotype.json", "alphas.npz"
_TRAIN, _VALIDATION, _WEIGHTS, _LOOP, _PROJECTION = range(5)  # streams of random numbers


@dataclass(frozen=True)
class Plan:
    """What a search works with and never changes."""

    settings: Search
    train: Split
    validation: Split
    iterations: int  # T: batches of one half
    warmup: int  # epochs of Phase I
    device: torch.device

    def batches(self, split: Split, stream: int, epoch: int) -> Iterator[Batch]:
        """The shuffled, augmented batches of one epoch."""
        seed, size = self.settings.seed * 2 + stream, self.settings.batch_size
        return batches(split, size, seed=seed, epoch=epoch, augment=True, device=self.device, drop_last=True)

    def validation_forever(self, epoch: int) -> Iterator[Batch]:
        """The validation batches of one epoch, over and over: the projection may need more than one pass."""
        while True:
            yield from self.batches(self.validation, _VALIDATION, epoch)

    def monitored(self, split: Split) -> list[Batch]:
        """`monitor` images of a half, of every class its share, as they are."""
        chosen = stratified(split.labels, min(self.settings.monitor, len(split)), self.settings.seed)
        images = split[chosen.nonzero()[:, 0].to(split.labels.device)]
        return list(batches(images, self.settings.batch_size, device=self.device))


@dataclass
class State:
    """All that changes while a search runs; exactly what a checkpoint holds."""

    net: FastSupernet
    optimizer: torch.optim.Optimizer
    method: Rnas
    epoch: int = 0
    bound: float | None = None  # H as a number, once known
    history: list[list[torch.Tensor]] = field(default_factory=list)  # α after every epoch, and at the start

    def save(self, folder: Path) -> None:
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "alpha_optimizer": self.method.optimizer.state_dict(),
            "epoch": self.epoch,
            "bound": self.bound,
            "history": self.history,
        }
        checkpoint.save(folder, state)

    def restore(self, saved: dict[str, Any]) -> None:
        self.net.load_state_dict(saved["net"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.method.optimizer.load_state_dict(saved["alpha_optimizer"])
        self.epoch, self.bound = saved["epoch"], saved["bound"]
        self.history = [[a.cpu() for a in point] for point in saved["history"]]

    def remember(self) -> None:
        self.history.append([a.detach().cpu().clone() for a in self.net.alphas])


@full_precision()
def search(settings: Search, console: Console | None = None) -> Genotype:
    """Search an architecture; writes the run folder `settings.out` and returns what it found.

    RnasError for bad input, before anything is written, and for a loss that is no longer finite.
    """
    console = console or Console(quiet=True)
    device = choose_device(settings.device)
    data = load_data(settings.source, settings.seed, console, settings.out)
    check_image_size(data.image_size, 8, 4, "the supernet")
    train, validation = halves(data.train, settings.seed)
    plan = _plan(settings, train, validation, device)
    attack = training_attack(settings.perturbation, data)

    reseed(settings.seed, _WEIGHTS)
    net = FastSupernet(settings.space, len(data.classes), *data.statistics()).to(device)
    net.save_memory(settings.save_memory)
    optimizer = torch.optim.SGD(net.thetas, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    state = State(net, optimizer, Rnas(net, attack, settings))

    facts = {**fingerprint(data), "precision": state.method.precision.name}
    run = Run.open(settings.out, settings, resume=settings.resume, device=hardware(device), facts=facts)
    saved = checkpoint.load(run.folder)
    if saved is None:
        state.remember()
        if plan.warmup == 0:
            state.bound = _bound(settings, state.method.measure(plan.monitored(plan.validation)).vulnerability)
    else:
        state.restore(saved)
        console.say(f"search: going on after epoch {state.epoch} of {settings.epochs}")
    run.rewind(state.epoch)
    while state.epoch < settings.epochs:
        state.epoch += 1
        event = _epoch(plan, state, console)
        state.remember()
        run.log(**event)
        state.save(run.folder)
        console.say(_line(event, settings.epochs))
    forget(net)
    last = _last(run.folder)
    if last["H"] is not None and last["F"] > last["H"]:
        message = (
            f"the search ended with F = {last['F']:.3g} over its bound H = {last['H']:.3g}: more epochs or steps help"
        )
        console.say(f"warning: {message} (--epochs, --projection-steps)")
        if last["event"] == "epoch":
            run.log(event="warning", message=message, F=last["F"], H=last["H"])
    _say_if_at_chance(run.folder, console)
    _save_alphas(run.folder, settings, state)
    genotype = net.genotype()
    genotype.save(run.folder / GENOTYPE)
    return genotype


def _say_if_at_chance(folder: Path, console: Console) -> None:
    event = [e for e in read_log(folder) if e.get("event") == "epoch"][-1]
    if event.get("at_chance"):
        console.say(
            f"warning: the supernet classifies {event['val']['clean_accuracy']:.1%} of the validation images, which is "
            f"not shown to be above chance ({event['chance']:.1%}): its cell says little; search for more --epochs"
        )


def _last(folder: Path) -> dict[str, Any]:
    """The last event of a search that is through, an epoch or the warning after it. RnasError if the log is gone."""
    events = [e for e in read_log(folder) if e.get("event") in ("epoch", "warning") and e.keys() >= {"F", "H"}]
    if not events:
        raise RnasError(f"{folder / LOG} tells of no epoch, but the search is through: choose another --out")
    return events[-1]


def _plan(settings: Search, train: Split, validation: Split, device: torch.device) -> Plan:
    iterations = min(len(train), len(validation)) // settings.batch_size
    if iterations < 1:
        raise RnasError(
            f"{settings.source.data} has {len(validation)} images in half of its training set: "
            f"fewer than one batch of {settings.batch_size}; use a smaller --batch-size"
        )
    warmup = settings.epochs // 4 if settings.warmup is None else settings.warmup
    if warmup >= settings.epochs:
        raise RnasError(f"warmup is {warmup} of {settings.epochs} epochs: nothing is left to search in")
    return Plan(settings, train.to(device), validation.to(device), iterations, warmup, device)


def _epoch(plan: Plan, state: State, console: Console) -> dict[str, Any]:
    """One turn of Algorithm 1's outer loop: Phase I, or both steps of Phase II. Returns the log's event."""
    started = time.perf_counter()
    settings, epoch, net, method = plan.settings, state.epoch, state.net, state.method
    warming = epoch <= plan.warmup
    lr = cosine(settings.lr, epoch, settings.epochs)
    set_lr(state.optimizer, lr)
    reseed(settings.seed, _LOOP, epoch)
    train, validation = plan.batches(plan.train, _TRAIN, epoch), plan.validation_forever(epoch)
    weights, architecture = Running(plan.device), Running(plan.device)
    # Phase I, and Step 1 of Phase II: the weights, then (after the warm-up) the architecture.
    iterations = plan.iterations if warming else max(1, plan.iterations // 2)
    with console.bar(f"search, epoch {epoch} of {settings.epochs}", iterations) as advance:
        for step in range(1, iterations + 1):
            x, y = next(train)
            loss, logits = weight_step(
                net, net.thetas, state.optimizer, method.attack, x, y, settings.clip, precision=method.precision
            )
            check_finite(loss, "training", epoch, step)
            weights.add(loss, logits, y)
            if not warming:
                x, y = next(validation)
                loss, logits = method.arch_step(x, y)
                check_finite(loss, "architecture", epoch, step)
                architecture.add(loss, logits, y)
            advance(1)
    # Step 2 of Phase II: the architecture alone, back under the bound.
    monitored = plan.monitored(plan.validation)
    projection = None
    if not warming and state.bound is not None:
        reseed(settings.seed, _PROJECTION, epoch)
        steps = settings.projection_steps or max(1, plan.iterations - iterations)
        projection = method.project(validation, monitored, state.bound, steps)
    on_train, on_validation = method.measure(plan.monitored(plan.train)), method.measure(monitored)
    for measured in (on_train, on_validation):  # what the last step made of the network, before it is saved
        for what, value in (("clean", measured.clean_loss), ("adversarial", measured.adversarial_loss)):
            check_finite(torch.tensor(value), what, epoch, iterations)
        check_finite(torch.tensor(measured.vulnerability), "vulnerability", epoch, iterations)
    if epoch == plan.warmup:
        state.bound = _bound(settings, on_validation.vulnerability)
    seconds = time.perf_counter() - started
    steps_made = iterations * (1 if warming else 2) + (projection.steps if projection else 0)
    return {
        "event": "epoch",
        "epoch": epoch,
        "phase": "warmup" if warming else "search",
        "theta_loss": weights.loss,
        "alpha_loss": None if warming else architecture.loss,
        "train": _performance(on_train),
        "val": _performance(on_validation),
        **_chance(monitored, on_validation),
        "F": on_validation.vulnerability,
        **_projected(projection),
        "H": state.bound,
        "none_share": _none_share(net),
        "genotype": net.genotype().to_json(),
        "lr": lr,
        "seconds": seconds,
        "images_per_second": steps_made * settings.batch_size / seconds,
    }


def _bound(settings: Search, vulnerability: float) -> float | None:
    """H as a number: a relative bound is a share of F at the end of the warm-up."""
    bound = Bound.parse(settings.bound)
    if bound is None:
        return None
    return bound.value * vulnerability if bound.relative else bound.value


def _performance(measured: Measured) -> dict[str, float]:
    return {
        "clean_loss": measured.clean_loss,
        "clean_accuracy": measured.clean_accuracy,
        "adversarial_loss": measured.adversarial_loss,
        "adversarial_accuracy": measured.adversarial_accuracy,
    }


def _chance(images: list[Batch], measured: Measured) -> dict[str, float | bool]:
    """The accuracy of always answering the largest class of `images`, and whether the network's is no better."""
    y = torch.cat([y for _, y in images]).cpu().numpy()
    by_chance = chance(y)
    return {"chance": by_chance, "at_chance": not above_chance(measured.clean_accuracy, by_chance, len(y))}


def _projected(projection: Projection | None) -> dict[str, float | None]:
    if projection is None:
        return dict.fromkeys(("F_before", "multiplier", "distance", "projection_steps"))
    return {
        "F_before": projection.before,
        "multiplier": projection.multiplier,
        "distance": projection.distance,
        "projection_steps": projection.steps,
    }


def _none_share(net: FastSupernet) -> float | None:
    """Mean weight of `none` over all edges of both cells: a large one lowers F without robustness."""
    if "none" not in net.space.operations:
        return None
    column = net.space.operations.index("none")
    return float(torch.stack([a.detach().softmax(-1)[:, column].mean() for a in net.alphas]).mean())


def _line(event: dict[str, Any], epochs: int) -> str:
    val = event["val"]
    text = (
        f"search {event['epoch']}/{epochs} {event['phase']}: loss {event['theta_loss']:.3f}, validation clean "
        f"{val['clean_accuracy']:.1%}, adversarial {val['adversarial_accuracy']:.1%}, F {event['F']:.2e}"
    )
    if event["F_before"] is not None:
        text += f" (before the projection {event['F_before']:.2e}, H {event['H']:.2e})"
    return f"{text}, {event['seconds']:.1f} s"


def _save_alphas(folder: Path, settings: Search, state: State) -> None:
    normal, reduce = (np.stack([point[k].numpy() for point in state.history]) for k in range(2))
    operations = np.array(settings.space.operations)
    write_arrays(folder / ALPHAS, {"normal": normal, "reduce": reduce, "operations": operations})
