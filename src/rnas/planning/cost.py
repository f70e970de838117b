"""What searching, training and attacking a network will cost: a few timed passes, times the passes that are made."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from rnas.attacks import PGD
from rnas.compute.precision import FP32, Precision, full_precision
from rnas.errors import RnasError
from rnas.fast.recording import forget, recordable, wait
from rnas.nas.methods import load
from rnas.nets.space import uniform
from rnas.nets.supernet import Supernet
from rnas.settings import Evaluate, Search, Train
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
class Speed:
    """Seconds for one image: to differentiate a frozen network for its input, and to train its weights on it."""

    gradient: float
    weights: float


@dataclass(frozen=True)
class Facts:
    """What costs depend on of a data set."""

    train: int
    test: int
    classes: int
    image_size: tuple[int, int]


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
    """Seconds of an evaluation of the network that `training` makes."""
    images, surviving = min(step.limit or about.test, about.test), survivors(training)
    return images * speed.gradient * (FORWARD + sum(passes(attack, surviving) for attack in step.attacks))
