"""What every attack shares: the safe way in, which checks the inputs and freezes the model, and the verdict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor

from rnas.attacks.checks import check_gradient, check_images
from rnas.attacks.foreign import opened
from rnas.attacks.losses import correct
from rnas.compute.freezing import Model


class Attack(ABC):
    """An attack's parameters, a frozen dataclass each: `perturb` is the run of it, `__call__` the safe way in."""

    black_box: ClassVar[bool] = False
    """Whether it also attacks models that cannot be differentiated."""

    @abstractmethod
    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (B,C,H,W) for images `x` in [0,1] and labels `y` (B,).

        Nothing is checked, and `net` must be frozen (`rnas.compute.freezing`): the fast way in, for training loops.
        """

    @final
    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (B,C,H,W) in [0,1] for `x` (B,C,H,W) in [0,1] and labels `y` (B,), in full precision.

        A few forward passes check the inputs: RnasError before the first step of the attack if they cannot be right.
        """
        x = check_images(x, y)
        with torch.inference_mode(False):
            x, y = x.detach().clone(), y.to(x.device, copy=True)
        with opened(model, x, y) as (plain, net):
            if not self.black_box:
                check_gradient(plain, x, type(self).__name__)
            return confirmed(self, plain, net, x, y).clamp_(0, 1)


def confirmed(attack: Attack, plain: Model, net: Model, x: Tensor, y: Tensor) -> Tensor:
    """The attack on `net`, the fast form of `plain`; where only the fast form is fooled, the attack on `plain` itself.

    The two differ by rounding, which decides for images that an attack left on the very boundary.
    """
    x_adv = attack.perturb(numeric(net), x, y)
    if net is plain:
        return x_adv
    with torch.no_grad():
        disputed = correct(plain(x_adv), y) & ~correct(net(x_adv), y)
    if disputed.any():
        x_adv[disputed] = attack.perturb(numeric(plain), x[disputed], y[disputed])
    return x_adv


def numeric(net: Model) -> Model:
    """`net`, but a gradient that is no finite number (a norm or a root at 0) is 0: no step leads out of the numbers."""

    def answer(x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(lambda gradient: gradient.nan_to_num(0, 0, 0))  # type: ignore[no-untyped-call]
        return net(x)

    return answer
