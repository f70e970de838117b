"""The training loop of a target network: adversarial (AT) or standard (ST)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rnas import checkpoint, paper
from rnas.attacks import PGD
from rnas.attacks.checks import answer
from rnas.console import Console, Stage
from rnas.data import Dataset, Split, batches
from rnas.data.dataset import white
from rnas.errors import RnasError
from rnas.files import read_json
from rnas.forecast import announce_train
from rnas.frozen import unfolded
from rnas.genotype import Architecture, architecture_from_json
from rnas.graphs import forget
from rnas.nets import zoo
from rnas.nets.derived import DerivedNetwork
from rnas.nets.saved import save_model
from rnas.precision import Precision, full_precision
from rnas.runs import SETTINGS, Run
from rnas.settings import Train, identity
from rnas.steps import (
    Running,
    check_finite,
    choose_device,
    choose_precision,
    cosine,
    fingerprint,
    hardware,
    load_data,
    reseed,
    set_lr,
    training_attack,
    weight_step,
)
from rnas.wording import roughly

_WEIGHTS, _LOOP = range(2)  # streams of random numbers


def train(settings: Train, console: Console | None = None) -> nn.Module:
    """Train `settings.arch`; writes the run folder `settings.out` and returns the network, in eval mode.

    RnasError for bad input, before anything is written, and for a loss that is no longer finite.
    """
    data = load_data(settings.source, settings.seed, console, settings.out)
    name, genotype = find_architecture(settings.arch)
    mean, std = data.statistics()
    options: dict[str, Any] = {
        "cells": settings.cells,
        "channels": settings.channels,
        "stem_stride": settings.stem_stride,
        "image_size": data.image_size,
        "mean": mean,
        "std": std,
    }
    searched, trained = _searched_on(Path(settings.arch)), identity(settings)["source"]["data"]
    if console is not None and searched not in (None, trained):
        console.say(f"note: {settings.arch} was searched on {searched}, and is now trained on {trained}")

    def build(settings: Train) -> nn.Module:
        sizes = {"cells": settings.cells, "channels": settings.channels}
        if genotype is None:
            return zoo.build(name, len(data.classes), **{**options, **sizes})
        return zoo.build_genotype(genotype, len(data.classes), **{**options, **sizes})

    def announce() -> None:
        if console is not None:
            attack, device = training_attack(settings.perturbation, data), choose_device(settings.device)
            announce_train(settings, build, data, attack, device, console)

    reseed(settings.seed, _WEIGHTS)
    net = build(settings)
    facts = {"genotype": genotype.to_json()} if genotype else {}
    fit(net, data, replace(settings, arch=name), console, facts, announce)
    meta = {
        "arch": name,
        "genotype": genotype.to_json() if genotype else None,
        "classes": list(data.classes),
        **options,
        "mean": list(mean),
        "std": list(std),
        "image_size": list(data.image_size),
        "dataset": data.name,
        "parameters": sum(p.numel() for p in net.parameters()),
    }
    save_model(settings.out, net, meta)
    return net


def find_architecture(arch: str) -> tuple[str, Architecture | None]:
    """What ARCH names: a member of the zoo (its name, None), or a genotype's file or search folder
    ("genotype", the genotype). RnasError if it is none of them."""
    path = Path(arch)
    for candidate in (path, path / "genotype.json", path / "search" / "genotype.json"):
        if candidate.is_file():
            return "genotype", architecture_from_json(read_json(candidate), str(candidate))
    if path.is_dir():
        raise RnasError(f"{arch} holds no genotype.json: expected the folder of a finished search")
    if path.suffix == ".json":
        raise RnasError(f"cannot read {arch}: there is no such file")
    return paper.find(arch).name, None


def _searched_on(folder: Path) -> str | None:
    """The images that the search in `folder` was on, if it is one and says so."""
    path = folder / SETTINGS
    settings = read_json(path) if path.is_file() else None
    source = settings.get("source") if isinstance(settings, dict) else None
    return source.get("data") if isinstance(source, dict) else None


@dataclass
class State:
    """All that changes while a training runs; exactly what a checkpoint holds."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0

    def save(self, folder: Path) -> None:
        state = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": self.epoch}
        checkpoint.save(folder, state)

    def restore(self, saved: dict[str, Any]) -> None:
        """RnasError if `saved` is of another network."""
        try:
            self.net.load_state_dict(saved["net"])
        except RuntimeError as e:
            raise RnasError(f"the checkpoint is of another network: {' '.join(str(e).split())[:200]}") from e
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch = saved["epoch"]


@full_precision()
def fit(
    net: nn.Module,
    data: Dataset,
    settings: Train,
    console: Console | None = None,
    facts: dict[str, Any] | None = None,
    announce: Callable[[], None] = lambda: None,
) -> None:
    """Train any module (images in [0,1] to logits), in place, with log and checkpoints in `settings.out`.

    `facts`, JSON values, are what else makes the run what it is: a resumed run must bring the same. `announce` is
    called once all is checked, before the first epoch.

    Ends with the network in eval mode. RnasError for bad input, before anything is written.
    """
    console = console or Console(quiet=True)
    device = choose_device(settings.device)
    if len(data.train) < settings.batch_size:
        raise RnasError(
            f"{settings.source.data} has {len(data.train)} training images: fewer than one batch of "
            f"{settings.batch_size}; use a smaller --batch-size"
        )
    if isinstance(net, DerivedNetwork):
        net.save_memory(settings.save_memory)
    elif settings.save_memory:
        raise RnasError(f"save-memory is for cell networks, and {settings.arch} is none: use a smaller --batch-size")
    net.to(device)
    images = data.train.to(device)
    _check_network(net, images, len(data.classes))
    attack = None if settings.standard else training_attack(settings.perturbation, data)
    optimizer = torch.optim.SGD(net.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    state = State(net, optimizer)
    precision = choose_precision(settings.precision)
    facts = {**fingerprint(data), "precision": precision.name, **(facts or {})}
    run = Run.open(settings.out, settings, resume=settings.resume, device=hardware(device), facts=facts)
    saved = checkpoint.load(run.folder)
    if saved is None:
        announce()
    else:
        state.restore(saved)
        console.say(f"train: going on after epoch {state.epoch} of {settings.epochs}")
    run.rewind(state.epoch)
    started, first = time.perf_counter(), state.epoch
    with console.stages(lines=False) as show:
        while state.epoch < settings.epochs:
            state.epoch += 1
            event = _epoch(state, images, settings, attack, device, precision, show)
            run.log(**event)
            state.save(run.folder)
            each = (time.perf_counter() - started) / (state.epoch - first)
            left = f"; {roughly(each * (settings.epochs - state.epoch))} left" if state.epoch < settings.epochs else ""
            console.say(_line(event, settings.epochs) + left)
    forget(net)
    net.eval()


def _check_network(net: nn.Module, images: Split, classes: int) -> None:
    """RnasError unless `net` can be trained: it has parameters, and float32 logits for `classes` classes."""
    if not any(p.requires_grad for p in net.parameters()):
        raise RnasError("the network has no parameters to train")
    x = images.images[:2] / white(images.images.device)
    with unfolded(net) as plain:
        logits = answer(plain, x)
    if logits.shape != (len(x), classes) or logits.dtype != torch.float32:
        found = f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
        raise RnasError(
            f"the network answers {len(x)} images with {found}: expected float32 logits {[len(x), classes]}, "
            "one for each class"
        )


def _epoch(
    state: State,
    images: Split,
    settings: Train,
    attack: PGD | None,
    device: torch.device,
    precision: Precision,
    show: Stage,
) -> dict[str, Any]:
    """One pass over the training images. Returns the log's event."""
    started = time.perf_counter()
    net, epoch = state.net, state.epoch
    lr = cosine(settings.lr, epoch, settings.epochs)
    set_lr(state.optimizer, lr)
    reseed(settings.seed, _LOOP, epoch)
    drop_path = 0.0
    if isinstance(net, DerivedNetwork):
        drop_path = settings.drop_path * (epoch - 1) / settings.epochs
        net.set_drop_path(drop_path)
    beta = settings.trades_beta if settings.loss == "trades" and attack else None
    parameters = list(net.parameters())
    running = Running(device)
    steps = len(images) // settings.batch_size
    drawn = batches(
        images,
        settings.batch_size,
        seed=settings.seed,
        epoch=epoch,
        augment=settings.augment,
        device=device,
        drop_last=True,
    )
    for step, (x, y) in enumerate(drawn, 1):
        loss, logits = weight_step(net, parameters, state.optimizer, attack, x, y, settings.clip, beta, precision)
        check_finite(loss, "training", epoch, step)
        running.add(loss, logits, y)
        what = f"train: epoch {epoch} of {settings.epochs}, step {step} of {steps}"
        show(what, (epoch - 1) * steps + step, settings.epochs * steps)
    with torch.no_grad():  # what the last step made of the network, before it is saved
        check_finite(F.cross_entropy(net.eval()(x), y), "final", epoch, steps)
    seconds = time.perf_counter() - started
    accuracies = {"clean_accuracy": None, "adversarial_accuracy": None}
    return {
        "event": "epoch",
        "epoch": epoch,
        "loss": running.loss,
        "train": {**accuracies, "adversarial_accuracy" if attack else "clean_accuracy": running.accuracy},
        "lr": lr,
        "drop_path": drop_path,
        "seconds": seconds,
        "images_per_second": steps * settings.batch_size / seconds,
    }


def _line(event: dict[str, Any], epochs: int) -> str:
    kind, accuracy = next((k, v) for k, v in event["train"].items() if v is not None)
    return (
        f"train {event['epoch']}/{epochs}: loss {event['loss']:.3f}, {kind.split('_')[0]} accuracy {accuracy:.1%} "
        f"on training images, {event['images_per_second']:.0f} images/s"
    )
