"""The unbounded l_2 attack of Carlini & Wagner (2017), without its binary search over c."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnas.attacks.base import Attack
from rnas.attacks.checks import check_positive, plain_numbers
from rnas.attacks.losses import correct, margin
from rnas.attacks.norms import distance
from rnas.compute.freezing import Model

BOX = 1 - 1e-6  # keeps the start tanh⁻¹ finite for pixels at 0 and 1, and lets their gradients live


@dataclass(frozen=True, kw_only=True)
class CWL2(Attack):
    """Adam on ‖x' − x‖² + c · max(z_y − max_{k≠y} z_k, −κ), x' = (tanh w + 1) / 2; any iterate may break an image.

    The nearest adversarial iterate is returned, at whatever distance; where there is none, the image itself.
    """

    c: float = 0.5
    kappa: float = 0.0
    steps: int = 100
    lr: float = 0.01

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_positive("CWL2", c=self.c, steps=self.steps, lr=self.lr)

    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images; inputs unchecked, `net` frozen."""
        result = x.clone()
        nearest = torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
        w = torch.atanh(BOX * (2 * x - 1)).requires_grad_()
        adam = torch.optim.Adam([w], lr=self.lr)
        for _ in range(self.steps):
            with torch.enable_grad():
                x_adv = (torch.tanh(w) + 1) / 2
                logits = net(x_adv)
                loss = ((x_adv - x) ** 2).sum() + self.c * (-margin(logits, y)).clamp(min=-self.kappa).sum()
                (w.grad,) = torch.autograd.grad(loss, w)
            with torch.no_grad():
                gap = distance(x_adv, x, "l2")
                better = ~correct(logits, y) & (gap < nearest)
                nearest = torch.where(better, gap, nearest)
                result = torch.where(better.view(-1, 1, 1, 1), x_adv, result)
            adam.step()
        return result
