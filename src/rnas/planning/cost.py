"""What searching, training and attacking a network will cost: a few timed passes, times the passes that are made."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from rnas.attacks import PGD
from rnas.compute.device import choose_precision, own_random_numbers, reseed
from rnas.compute.precision import FP32, Precision, full_precision
from rnas.data import load as load_data
from rnas.data.official.catalogue import SETS
from rnas.errors import RnasError
from rnas.evaluation.features import MOST, STEPS
from rnas.fast.recording import forget, recordable, wait
from rnas.fast.supernet import FastSupernet
from rnas.nas.methods import load
from rnas.nets import zoo
from rnas.nets.derived import DerivedNetwork
from rnas.nets.space import uniform
from rnas.nets.supernet import Supernet
from rnas.records.schema import Speed
from rnas.settings import Distortion, Evaluate, Search, Source, Train
from rnas.training.adversarial import frozen_for
from rnas.training.step import weight_step

FORWARD = 1 / 3
"""Cost of a forward pass in gradient passes: a backward pass costs about two."""
PASSES = {
    "fgsm": 1.0,
    "cw": 100.0,
    "cw-l2": 100.0,
    "apgd-ce": 100.0,
    "apgd-dlr": 100.0,
    "apgd-margin": 100.0,
    "apgd-t": 9 * 100.0,
    "fab-t": 9 * 2 * 100.0,
    "square": 5000 * FORWARD,
}
"""Gradient passes for each image."""


CPU_IMAGES = 32
"""Images to time with on a CPU; on a GPU, where a small batch takes as long as a large one, it is the whole batch."""


@dataclass(frozen=True)
class Facts:
    """What costs depend on of a data set."""

    train: int
    test: int
    classes: int
    image_size: tuple[int, int]


def facts(source: Source) -> Facts:
    """The counts of `source`; named sets are not loaded, let alone downloaded: planning does neither."""
    official = SETS.get(source.data)
    if official is not None:
        found = Facts(*official.counts, official.class_count, (official.image_size, official.image_size))
    else:
        data = load_data(source.data, root=source.data_root)
        found = Facts(len(data.train), len(data.test), len(data.classes), data.image_size)
    size = (source.image_size, source.image_size) if source.image_size else found.image_size
    most = found.train if source.limit_per_class is None else source.limit_per_class * found.classes
    return Facts(min(found.train, most), found.test, found.classes, size)


def stand_in(step: Train) -> str:
    """The network to time for a training: where the cell is yet to be found, RNAS-L."""
    return "RNAS-L" if "/" in step.arch or "\\" in step.arch else step.arch


def timed(step: Search | Train, about: Facts, device: torch.device, images: int) -> Speed:
    """Time the network of a search or a training on this device: on a CPU with so many `images`."""
    with own_random_numbers(device):
        reseed(0)
        net = _supernet(step, about) if isinstance(step, Search) else _network(step, about)
    batch = images if device.type == "cpu" else step.batch_size
    return measure(net, about, batch, device, choose_precision(step.precision))


def _supernet(step: Search, about: Facts) -> nn.Module:
    net = FastSupernet(step.space, about.classes, zoo.MEAN, zoo.STD)
    net.save_memory(step.save_memory)
    return net


def _network(step: Train, about: Facts) -> nn.Module:
    sizes: dict[str, Any] = {"cells": step.cells, "channels": step.channels, "stem_stride": step.stem_stride}
    net = zoo.build(stand_in(step), about.classes, image_size=about.image_size, **sizes)
    if isinstance(net, DerivedNetwork):
        net.save_memory(step.save_memory)
    return net


@full_precision()
def measure(
    net: nn.Module,
    about: Facts,
    batch: int,
    device: torch.device,
    precision: Precision = FP32,
    seconds: float = 1.0,
) -> Speed:
    """Time one gradient pass and one training step of `net` on `batch` random images, as a run computes them, for
    about `seconds` each."""
    net.to(device)
    attack = PGD(steps=1, random_start=False)
    parameters = list(getattr(net, "thetas", net.parameters()))
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    x = torch.rand(batch, 3, *about.image_size, device=device, generator=torch.Generator(device).manual_seed(0))
    y = torch.arange(batch, device=device) % about.classes
    given = [uniform(net.shape, device)] if isinstance(net, Supernet) else []
    with frozen_for(net, device, precision, *given) as fixed:
        gradient = _mean_time(lambda: attack.perturb(fixed, x, y), device, seconds)
    step = partial(weight_step, net, parameters, optimizer, None, x, y, 5.0, precision=precision, weights=given)
    weights = _mean_time(step, device, seconds)
    forget(net)
    return Speed(gradient / batch, weights / batch)


def _mean_time(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of a call, as they are on this machine now, other programs included: the mean over `seconds` or so. One
    before prepares kernels and memory, a second one tries to record it, and these do not count."""
    for _ in range(2 if recordable(device) else 1):
        call()
    wait(device)
    calls, begun = 0, time.perf_counter()
    while calls < 2 or (calls < 50 and time.perf_counter() - begun < seconds):
        call()
        wait(device)
        calls += 1
    return (time.perf_counter() - begun) / calls


def survivors(training: Train) -> float:
    """The share of images, roughly, that AutoAttack's first part leaves to the others: half of them with the paper's
    networks, a tenth after two epochs, hardly any after training on clean images."""
    return 0.02 if training.standard else 0.5 * training.epochs / (training.epochs + 8)


def passes(attack: str, surviving: float = 0.5) -> float:
    """Gradient passes of an attack for each image; `surviving` as of `survivors`."""
    if attack == "aa":
        return PASSES["apgd-ce"] + surviving * (PASSES["apgd-t"] + PASSES["fab-t"] + PASSES["square"])
    if attack in PASSES:
        return PASSES[attack]
    found = re.fullmatch(r"pgd(\d+)(-any)?", attack)
    if not found:
        raise RnasError(f"the cost of {attack} is not known")
    return float(found[1])


def train_seconds(step: Train, about: Facts, speed: Speed) -> float:
    """Seconds of a training."""
    images = step.epochs * about.train
    attack = 0 if step.standard else step.perturbation.attack_steps
    return images * (attack * speed.gradient + speed.weights)


def search_seconds(step: Search, about: Facts, speed: Speed) -> float:
    """Seconds of a search, by what its method says of an epoch and of choosing at the end."""
    method = load(step.method).method
    attack = step.perturbation.attack_steps * speed.gradient
    iterations = about.train / (1 if method.data == "all" else 2) / step.batch_size
    costs = [method.cost(step, epoch, iterations) for epoch in range(1, step.epochs + 1)]
    costs.append(method.cost_of_choosing(step, iterations))
    images = step.batch_size * sum(c.attacks * attack + c.passes * speed.weights for c in costs)
    watching = 2 * step.monitor * (attack + 2 * speed.gradient)
    return images + step.epochs * watching


def evaluate_seconds(step: Evaluate, training: Train, about: Facts, speed: Speed) -> float:
    """Seconds of an evaluation of the network that `training` makes, its F among it."""
    images, surviving = min(step.limit or about.test, about.test), survivors(training)
    attacks = images * (FORWARD + sum(passes(attack, surviving) for attack in step.attacks))
    return speed.gradient * (attacks + min(images, MOST) * (STEPS + 2 * FORWARD))


def distortion_seconds(step: Distortion, about: Facts, speed: Speed) -> float:
    """Seconds of measuring how far an attack moves the features of a network."""
    return min(step.limit, about.test) * speed.gradient * (step.attack_steps + 2 * FORWARD)
