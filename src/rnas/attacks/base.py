"""What every attack shares: checked inputs, a frozen model, gradients with respect to the images."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rnas.attacks.checks import check_images, check_logits
from rnas.attacks.losses import correct
from rnas.frozen import Model, frozen, unfolded


class Attack(Protocol):
    """A frozen dataclass of an attack's parameters. `perturb` is the attack itself, `__call__` the safe way in."""

    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (B,C,H,W) for images `x` in [0,1] and labels `y` (B,).

        Nothing is checked, and `net` must be frozen (`rnas.frozen.frozen`): the fast way in, for training loops.
        """
        ...

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """`perturb`, after checking its inputs with one forward pass and freezing `model`. RnasError on bad input."""
        ...


def checked(attack: Attack, model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The `__call__` of every attack."""
    check_images(x, y)
    with torch.inference_mode(False), unfolded(model) as plain, frozen(model) as net:
        x, y = x.detach().clone(), y.clone()
        with torch.no_grad():
            check_logits(plain(x), y)
        return confirmed(attack, plain, net, x, y)


def confirmed(attack: Attack, plain: Model, net: Model, x: Tensor, y: Tensor) -> Tensor:
    """The attack on `net`, the fast form of `plain`; where only the fast form is fooled, the attack on `plain` itself.

    The two differ by rounding, which decides for images that an attack left on the very boundary.
    """
    x_adv = attack.perturb(net, x, y)
    if net is plain:
        return x_adv
    with torch.no_grad():
        disputed = correct(plain(x_adv), y) & ~correct(net(x_adv), y)
    if disputed.any():
        x_adv[disputed] = attack.perturb(plain, x[disputed], y[disputed])
    return x_adv
