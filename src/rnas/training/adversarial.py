"""The attacks inside search and training, on a frozen form of the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.attacks.gradient import ascent_direction
from rnas.attacks.norms import project, steepest
from rnas.compute.freezing import Model, frozen
from rnas.compute.precision import FP32, Precision
from rnas.data import Dataset
from rnas.fast.recording import ATTACK, replayed
from rnas.nets.space import Forms, Input, Weights, apart, together
from rnas.settings import Perturbation
from rnas.training.objectives import divergence


def training_attack(perturbation: Perturbation, data: Dataset) -> PGD:
    """The PGD of search and training: ε from the settings, or else the data set's own."""
    eps = perturbation.eps or data.eps_default
    return PGD(eps=eps, step=perturbation.step or eps / 4, steps=perturbation.attack_steps)


def craft(attack: PGD, net: nn.Module, x: Tensor, y: Tensor, precision: Precision = FP32, *weights: Weights) -> Tensor:
    """Adversarial images against `net` in eval mode; the network is left as it was. `weights` of a supernet's
    operations."""
    tensors, forms = apart(weights)
    work = _Crafting(attack, precision, forms)
    if attack.seed is not None or attack.any_iterate:  # the host draws, or decides
        return work(net, x, y, *tensors)[0]
    return replayed(ATTACK, work, net, (x, y, *tensors))[0]


@dataclass(frozen=True)
class _Crafting:
    """Adversarial images, by `attack`."""

    attack: PGD
    precision: Precision
    forms: Forms

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        with frozen_for(net, x.device, self.precision, *together(tensors, self.forms)) as fixed:
            return (self.attack.perturb(fixed, x, y),)


@contextmanager
def frozen_for(net: nn.Module, device: torch.device, precision: Precision, *given: Input) -> Iterator[Model]:
    """`frozen`, folded for passes on `device` in `precision`, and computing them."""
    with ExitStack() as until_the_end:
        with precision.autocast(device):
            fixed = until_the_end.enter_context(frozen(net, *given))
        yield precision.of(fixed)


def craft_trades(attack: PGD, net: nn.Module, x: Tensor, precision: Precision = FP32) -> Tensor:
    """TRADES's adversarial images: PGD that drives the prediction away from the clean one, whatever the label."""

    return replayed(ATTACK, _Driving(attack, precision), net, (x,))[0]


@dataclass(frozen=True)
class _Driving:
    """Adversarial images of TRADES."""

    attack: PGD
    precision: Precision

    def __call__(self, net: nn.Module, x: Tensor) -> tuple[Tensor]:
        attack = self.attack
        with frozen_for(net, x.device, self.precision) as fixed:
            with torch.no_grad():
                clean = fixed(x).log_softmax(1)
            x_adv = (x + 1e-3 * torch.randn_like(x)).clamp_(0, 1)  # KL has no slope at x itself
            for _ in range(attack.steps):
                gradient, _ = ascent_direction(fixed, x_adv, clean, divergence)
                x_adv = project(x_adv + attack.step * steepest(gradient, attack.norm), x, attack.eps, attack.norm)
        return (x_adv,)
