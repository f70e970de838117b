"""What every attack shares: checked inputs, a frozen model, gradients with respect to the images."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rnas.attacks.checks import check_gradient, check_images
from rnas.attacks.foreign import opened
from rnas.attacks.losses import correct
from rnas.frozen import Model


class Attack(Protocol):
    """A frozen dataclass of an attack's parameters. `perturb` is the attack itself, `__call__` the safe way in."""

    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (B,C,H,W) for images `x` in [0,1] and labels `y` (B,).

        Nothing is checked, and `net` must be frozen (`rnas.frozen.frozen`): the fast way in, for training loops.
        """
        ...

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """`perturb`, after checking its inputs with forward passes and freezing `model`. RnasError on bad input."""
        ...


def checked(attack: Attack, model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The `__call__` of every attack: in full precision, whatever precision the caller has chosen."""
    x = check_images(x, y)
    with torch.inference_mode(False):
        x, y = x.detach().clone(), y.to(x.device, copy=True)
    with opened(model, x, y) as (plain, net):
        if needs_gradient(attack):
            check_gradient(plain, x, type(attack).__name__)
        return confirmed(attack, plain, net, x, y)


def needs_gradient(attack: Attack) -> bool:
    """Whether the attack works only on models that can be differentiated."""
    return not getattr(attack, "black_box", False)


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
