"""What attacks ascend: logits (B,K) and labels (B,) to a loss per image (B,), the larger the worse for the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(z)_y."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{k≠y} z_k − z_y: positive exactly where the image is misclassified (Carlini & Wagner 2017)."""
    return best_other(logits, y) - of(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, −(z_y − max_{k≠y} z_k) / (z_π1 − z_π3) (Croce & Hein 2020, Eq. 6); K ≥ 3."""
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """−(z_y − z_t) / (z_π1 − (z_π3 + z_π4) / 2) (Croce & Hein 2020, Eq. 7); with 3 classes z_π4 is z_π3."""
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    return (of(logits, target) - of(logits, y)) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, -1]) + 1e-12)


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Which images (B,) the model gets right: y has the largest logit. NaN or infinity as the largest is no answer."""
    top, at = logits.max(1)  # NaN counts as the largest
    return (at == y) & top.isfinite()


def ranked(logits: Tensor, y: Tensor, most: int) -> Tensor:
    """The `most` (or, if there are fewer, all) classes other than `y` with the largest logits, (B,T), nearest first."""
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return others.topk(min(most, logits.shape[1] - 1), dim=1).indices


def of(logits: Tensor, classes: Tensor) -> Tensor:
    """The logit of each image's class in `classes` (B,)."""
    return logits.gather(1, classes.unsqueeze(1)).squeeze(1)


def best_other(logits: Tensor, y: Tensor) -> Tensor:
    """max_{k≠y} z_k."""
    return logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
