"""What a step descends on, as values: an objective holds everything that a loss depends on besides the network and its
inputs. Equal objectives compute the same, so a recording is kept by its objective (`rnas.fast.recording`)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from rnas.compute.precision import FP32, Precision
from rnas.nets.space import Weights


class Objective(Hashable, Protocol):
    """A frozen dataclass: what it computes follows from its fields, the network and the inputs alone."""

    def __call__(self, net: nn.Module, /, *inputs: Any, **none: Any) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, of inputs that are tensors or weights; and what else to tell: logits (B,classes), or a
        number."""


@dataclass(frozen=True)
class CrossEntropy:
    """Of images that are as they are, clean or adversarial."""

    precision: Precision = FP32

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *weights: Weights) -> tuple[Tensor, Tensor]:
        """`x` (B,3,H,W), `y` (B,); `weights` of a supernet's operations, which are not differentiated."""
        logits = self.precision.of(net)(x, *weights)
        return F.cross_entropy(logits, y), logits


@dataclass(frozen=True)
class Trades:
    """Cross-entropy on clean images plus β times KL(clean ‖ adversarial) (Zhang et al. 2019, Eq. 5)."""

    beta: float
    precision: Precision = FP32

    def __call__(self, net: nn.Module, x_adv: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x_adv`, `x` (B,3,H,W), `y` (B,); tells the adversarial logits."""
        forward = self.precision.of(net)
        clean, logits = forward(x), forward(x_adv)
        return F.cross_entropy(clean, y) + self.beta * divergence(logits, clean.log_softmax(1)).mean(), logits


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(clean ‖ adversarial) of each image (B,), from logits (B,K) and clean log-probabilities (B,K)."""
    return F.kl_div(logits.log_softmax(1), clean, reduction="none", log_target=True).sum(1)
