"""What steps of a search descend on besides `rnas.training.objectives`: losses of the weights that a method has."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

from rnas.compute.precision import FP32, Precision
from rnas.nets.space import Weights
from rnas.nets.supernet import Supernet
from rnas.settings import Features, Reduction
from rnas.vulnerability import network_vulnerability


def sampled(net: nn.Module, noise: Sequence[Tensor] = ()) -> Weights:
    """The weights that the network's method has now, differentiable: for objectives of a method's parameters."""
    return cast(Weights, cast(Any, net.architecture).weights(*noise))


def passed(net: nn.Module, x: Tensor, precision: Precision = FP32, noise: Sequence[Tensor] = ()) -> Tensor:
    """Logits (B,classes) of a pass with `sampled` weights."""
    return precision.of(net)(x, sampled(net, noise))


@dataclass(frozen=True)
class ArchitectureLoss:
    """Cross-entropy of images as they are, differentiable for a method's parameters."""

    precision: Precision = FP32

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor]:
        """`x` (B,3,H,W), `y` (B,), the noise of the step; tells logits (B,classes)."""
        logits = passed(net, x, self.precision, noise)
        return F.cross_entropy(logits, y), logits


class ImageLoss(Hashable, Protocol):
    """A frozen dataclass: losses of images, one by one. In train mode BN ties them together all the same."""

    def __call__(self, net: nn.Module, /, x: Tensor, y: Tensor, *noise: Tensor) -> Tensor:
        """(B,), from `x` (B,3,H,W), `y` (B,) and the noise of a step."""


@dataclass(frozen=True)
class ImageCrossEntropy:
    """The cross-entropy of each image, with the weights that the method has."""

    precision: Precision = FP32

    def __call__(self, net: nn.Module, /, x: Tensor, y: Tensor, *noise: Tensor) -> Tensor:
        return F.cross_entropy(passed(net, x, self.precision, noise), y, reduction="none")


@dataclass(frozen=True)
class Weighted:
    """Σ_b c_b ℓ_b of an image loss ℓ."""

    loss: ImageLoss

    def __call__(
        self, net: nn.Module, x: Tensor, y: Tensor, coefficients: Tensor, *noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`coefficients` (B,); tells the sum itself."""
        value = (coefficients * self.loss(net, x, y, *noise)).sum()
        return value, value


@dataclass(frozen=True)
class Vulnerability:
    """F / scale of a supernet, in the network's mode: in train mode on batch statistics. # Eq. 6"""

    reduction: Reduction = "mean"
    features: Features = "raw"
    precision: Precision = FP32
    scale: float = 1.0

    def __call__(self, net: nn.Module, x: Tensor, x_adv: Tensor, *weights: Weights) -> tuple[Tensor, Tensor]:
        """`x`, `x_adv` (B,3,H,W); tells F. Without `weights`, with those of the method, to be differentiated."""
        net = cast(Supernet, net)
        with self.precision.autocast(x.device):
            clean = net.forward_cells(x, *(weights or (sampled(net),)))[1]
            adversarial = net.forward_cells(x_adv, *(weights or (sampled(net),)))[1]
        f = network_vulnerability(clean, adversarial, self.reduction, self.features)
        return f / self.scale, f
