"""The two threat models: balls of radius ε around an image, within [0,1]. Images are (B,C,H,W), norms (B,1,1,1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rnas.attacks.noise import normal, uniform

Norm = Literal["linf", "l2"]


def l2(v: Tensor) -> Tensor:
    """The l_2 norm of each image, (B,1,1,1)."""
    return torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)  # type: ignore[no-any-return]


def unit(v: Tensor) -> Tensor:
    """Each image divided by its l_2 norm; zero stays zero."""
    return v / (l2(v) + 1e-12)


def distance(a: Tensor, b: Tensor, norm: Norm) -> Tensor:
    """‖a − b‖ of each image, (B,)."""
    d = (a - b).flatten(1)
    return d.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(d, dim=1)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """`x_adv` brought into the ball around `x`, then into [0,1] (which keeps it in the ball)."""
    if norm == "linf":
        return x_adv.clamp(x - eps, x + eps).clamp_(0, 1)
    delta = x_adv - x
    return (x + delta * (eps / (l2(delta) + 1e-12)).clamp(max=1)).clamp_(0, 1)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction of unit norm along which a linear function with this gradient rises most."""
    return gradient.sign() if norm == "linf" else unit(gradient)


def random_point(x: Tensor, eps: float, norm: Norm, seed: int | None) -> Tensor:
    """A point drawn uniformly from the ball around `x`, clamped to [0,1]."""
    if norm == "linf":
        return (x + eps * (2 * uniform(x, seed) - 1)).clamp_(0, 1)
    radius = uniform(x, seed, "radius", (1, 1, 1)) ** (1 / x[0].numel())
    return (x + eps * radius * unit(normal(x, seed))).clamp_(0, 1)
