"""What a search and a training begin with: one line of what will be done, and about how long that takes here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from rnas.attacks import PGD
from rnas.compute.device import choose_device, choose_precision, hardware, own_random_numbers, reseed
from rnas.console import Console
from rnas.data import Dataset
from rnas.fast.supernet import FastSupernet
from rnas.nets.derived import DerivedNetwork
from rnas.planning.cost import CPU_IMAGES, Facts, measure, search_seconds, train_seconds
from rnas.records.schema import Speed
from rnas.settings import Search, Train, flags
from rnas.training.adversarial import training_attack
from rnas.wording import radius, roughly

TIMED = 0.2
"""Seconds for which each kind of pass is timed."""
LONG = 3600.0
"""Seconds of a run that is told with the options of one that takes no longer than this."""
SEARCH_SIZES = ((8, 16), (5, 16), (5, 8), (3, 8))
TRAIN_SIZES = ((20, 36), (14, 32), (8, 24), (5, 24), (5, 16))
"""Cells and channels of networks, the paper's first."""
LEAST_SEARCH, LEAST_TRAIN = 8, 20
"""Epochs without which a smaller network is the better choice."""

S = TypeVar("S", Search, Train)


def announce_search(settings: Search, console: Console, data: Dataset) -> None:
    """Say what the search will do, and about how long that takes."""
    if console.quiet:
        return
    attack, device = training_attack(settings.perturbation, data), choose_device(settings.device)

    def supernet(settings: Search) -> nn.Module:
        net = FastSupernet(settings.space, len(data.classes), *data.statistics())
        net.save_memory(settings.save_memory)
        return net

    def sized(cells: int, channels: int) -> Search:
        return replace(settings, space=replace(settings.space, cells=cells, channels=channels))

    space = settings.space
    bound = f", H = {settings.bound}" if hasattr(settings, "bound") else ""
    what = (
        f"search ({settings.method}): {space.cells} cells, C = {space.channels}{bound}, {settings.epochs} epochs on "
        f"{_images(data)}, {_attack(attack)}, learning rate {settings.lr:g}"
    )
    here = space.cells, space.channels
    sizes = [sized(*size) for size in (here, *(s for s in SEARCH_SIZES if s < here))]
    _announce(what, sizes, LEAST_SEARCH, supernet, search_seconds, data, attack, device, console)


def announce_train(settings: Train, console: Console, build: Callable[[Train], nn.Module], data: Dataset) -> None:
    """Say what the training of the network that `build` makes will do, and about how long that takes."""
    if console.quiet:
        return
    attack, device = training_attack(settings.perturbation, data), choose_device(settings.device)
    cells = isinstance(_untrained(build, settings, device), DerivedNetwork)
    here = settings.cells, settings.channels
    sizes = [settings]
    if cells:
        sizes += [replace(settings, cells=n, channels=c) for n, c in TRAIN_SIZES if n <= here[0] and (n, c) < here]
    size = f" ({settings.cells} cells, C = {settings.channels})" if cells else ""
    how = "clean images" if settings.standard else _attack(attack) + (" (TRADES)" if settings.loss == "trades" else "")
    what = (
        f"train: {settings.arch}{size}, {settings.epochs} epochs on {_images(data)}, {how}, "
        f"learning rate {settings.lr:g}"
    )
    _announce(what, sizes, LEAST_TRAIN, build, train_seconds, data, attack, device, console)


def _images(data: Dataset) -> str:
    return f"{len(data.train):,} images of {data.name}"


def _attack(attack: PGD) -> str:
    return f"PGD-{attack.steps} with ε = {radius(attack.eps)}"


def _announce(
    what: str,
    sizes: Sequence[S],
    least: int,
    build: Callable[[S], nn.Module],
    seconds: Callable[[S, Facts, Speed], float],
    data: Dataset,
    attack: PGD,
    device: torch.device,
    console: Console,
) -> None:
    """`sizes` are the settings, and those of smaller networks; a network of them for `least` epochs makes sense."""
    about = Facts(len(data.train), len(data.test), len(data.classes), data.image_size)

    def speed(settings: S) -> Speed:
        batch = min(settings.batch_size, CPU_IMAGES if device.type == "cpu" else settings.batch_size)
        net, precision = _untrained(build, settings, device), choose_precision(settings.precision)
        with own_random_numbers(device):
            return measure(net, about, batch, device, precision, TIMED)

    settings, first = sizes[0], speed(sizes[0])
    needed = seconds(settings, about, first)
    console.say(f"{what}; {roughly(needed)} on this machine ({hardware(device)})")
    if attack.step > attack.eps:
        step, eps = radius(attack.step), radius(attack.eps)
        console.say(f"note: --step {step} is larger than ε = {eps}, which no image leaves; by default it is ε/4")
    if needed > LONG:
        shorter = _shorter(sizes, least, first, speed, lambda s, v: seconds(s, about, v), about)
        given = flags(settings)
        changed = [word for pair in _pairs(flags(shorter)) if pair not in _pairs(given) for word in pair]
        console.say(f"note: one of an hour at most: {' '.join(changed)}")


def _shorter(
    sizes: Sequence[S],
    least: int,
    first: Speed,
    speed: Callable[[S], Speed],
    seconds: Callable[[S, Speed], float],
    about: Facts,
) -> S:
    """The largest network of `sizes` for which an hour suffices for `least` epochs, with as many as fit; of the
    smallest fewer epochs if need be, and then fewer images."""
    smaller, found = sizes[0], first
    for smaller in sizes:
        found = first if smaller is sizes[0] else speed(smaller)
        if seconds(_epochs(smaller, least), found) <= LONG:
            break
    fewest = min(least, 4)
    epochs = next((n for n in range(smaller.epochs, fewest, -1) if seconds(_epochs(smaller, n), found) <= LONG), fewest)
    smaller = _epochs(smaller, epochs)
    if (needed := seconds(smaller, found)) > LONG:
        per_class = max(1, int(about.train / about.classes * LONG / needed))
        smaller = replace(smaller, source=replace(smaller.source, limit_per_class=per_class))
    return smaller


def _epochs(settings: S, epochs: int) -> S:
    """`settings` for at most so many epochs, the warm-up in proportion."""
    epochs = min(settings.epochs, epochs)
    warmup = getattr(settings, "warmup", None)
    changes = {} if warmup is None else {"warmup": warmup * epochs // settings.epochs}
    return replace(settings, epochs=epochs, **changes)


def _untrained(build: Callable[[S], nn.Module], settings: S, device: torch.device) -> nn.Module:
    """A network to time; no random number is drawn for it."""
    with own_random_numbers(device):
        reseed(0)
        return build(settings)


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Options with their values, from a list of both one after another."""
    return [(a, b) for a, b in itertools.pairwise(words) if a.startswith("--")]
