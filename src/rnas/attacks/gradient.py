"""One-step and many-step gradient attacks: FGSM, PGD, and C&W's margin loss in the ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rnas.attacks.base import Attack
from rnas.attacks.checks import check_positive, check_threat, plain_numbers
from rnas.attacks.losses import LOSSES, Loss, correct
from rnas.attacks.norms import Norm, project, random_point, steepest
from rnas.compute.freezing import Model
from rnas.errors import unknown


def ascent_direction(net: Model, x_adv: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """The gradient (B,C,H,W) of `loss` at `x_adv`, and the logits there (B,K), detached."""
    with torch.enable_grad():
        x_adv = x_adv.detach().requires_grad_()
        logits = net(x_adv)
        (gradient,) = torch.autograd.grad(loss(logits, y).sum(), x_adv)
    return gradient, logits.detach()


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """Fast gradient sign method: one step of length ε along the loss's steepest ascent (Goodfellow et al. 2015)."""

    eps: float = 8 / 255
    loss: Literal["ce", "margin"] = "ce"
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_threat(self.eps, self.norm)
        _check_loss(self.loss)

    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images; inputs unchecked, `net` frozen."""
        gradient, _ = ascent_direction(net, x, y, LOSSES[self.loss])
        return (x + self.eps * steepest(gradient, self.norm)).clamp_(0, 1)


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent: the last of `steps` steps along the loss's steepest ascent (Madry et al. 2018).

    Defaults are the paper's training attack (§5.1). `seed=None` draws the random start from torch's global generator;
    an integer gives each image a start of its own that depends on nothing else. `any_iterate` names a stronger and
    cheaper attack: an image is broken if any iterate breaks it, and then left alone.
    """

    eps: float = 8 / 255
    step: float = 2 / 255
    steps: int = 7
    random_start: bool = True
    loss: Literal["ce", "margin"] = "ce"
    norm: Norm = "linf"
    any_iterate: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_threat(self.eps, self.norm)
        check_positive("PGD", step=self.step, steps=self.steps)
        _check_loss(self.loss)

    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images; inputs unchecked, `net` frozen. Without host synchronisation unless `any_iterate`."""
        x_adv = random_point(x, self.eps, self.norm, self.seed) if self.random_start else x
        if self.any_iterate:
            return self._survivors_only(net, x, y, x_adv)
        for _ in range(self.steps):
            gradient, _ = ascent_direction(net, x_adv, y, LOSSES[self.loss])
            x_adv = self._stepped(x_adv, x, gradient)
        return x_adv

    def _stepped(self, x_adv: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        return project(x_adv + self.step * steepest(gradient, self.norm), x, self.eps, self.norm)

    def _survivors_only(self, net: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
        result, alive = x_adv.clone(), torch.arange(len(x), device=x.device)
        for k in range(self.steps + 1):
            gradient, logits = ascent_direction(net, x_adv, y, LOSSES[self.loss])
            result[alive] = x_adv
            standing = correct(logits, y)
            if k == self.steps or not standing.any():
                break
            alive, x, y = alive[standing], x[standing], y[standing]
            x_adv = self._stepped(x_adv[standing], x, gradient[standing])
        return result


@dataclass(frozen=True, kw_only=True)
class CW(Attack):
    """C&W in the ball, the field's reading: PGD on the margin max_{k≠y} z_k − z_y (Carlini & Wagner 2017)."""

    eps: float = 8 / 255
    step: float = 2 / 255
    steps: int = 100
    random_start: bool = True
    norm: Norm = "linf"
    seed: int | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        self._pgd()

    def _pgd(self) -> PGD:
        return PGD(
            eps=self.eps,
            step=self.step,
            steps=self.steps,
            random_start=self.random_start,
            loss="margin",
            norm=self.norm,
            seed=self.seed,
        )

    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images; inputs unchecked, `net` frozen."""
        return self._pgd().perturb(net, x, y)


def _check_loss(loss: str) -> None:
    if loss not in ("ce", "margin"):
        raise unknown("loss", loss, ("ce", "margin"))
