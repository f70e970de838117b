"""What F is measured on: the paper's words are "the supernet"; what is trained in the end is one cell of it.

supernet        the weights of operations as they are (the paper's)
without-none    without `none`, whose share the other operations of the edge take: F cannot fall because edges fade,
                which discretisation would undo
cell            the discretised cell, with the weights that the supernet has for it: 1 for the operations of the
                cell, 0 for all others; gradients go straight through to the weights (Bengio et al. 2013)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from rnas.genotype import Architecture
from rnas.nas.objectives import Vulnerability, sampled
from rnas.nets.space import Shape, Weights, hard
from rnas.settings import SearchSpace

Reading = Literal["supernet", "without-none", "cell"]
READINGS: tuple[Reading, ...] = get_args(Reading)
SMALLEST = 1e-12
"""What is left where `none` is nearly all: it is divided by."""


def without_none(weights: Weights, space: SearchSpace) -> Weights:
    """The weights, with what `none` has shared out among the other operations of its edge as they stand."""
    if "none" not in space.operations:
        return weights
    column = space.operations.index("none")

    def shared(mix: Tensor) -> Tensor:
        kept = mix.clone()
        kept[:, column] = 0
        return kept * (mix.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(SMALLEST))

    return weights._replace(mix=tuple(map(shared, weights.mix)))


def straight_through(weights: Weights, cell: Weights) -> Weights:
    """The weights of `cell`, differentiated as if they were `weights`."""
    mix = tuple(fixed + (w - w.detach()) for w, fixed in zip(weights.mix, cell.mix, strict=True))
    return weights._replace(mix=mix)


def of_cell(architecture: Architecture, shape: Shape, like: Tensor) -> Weights:
    """1 for the operations of an architecture, 0 for the others. All are computed, so that all have gradients."""
    return hard(architecture, shape, like)._replace(live=None)


@dataclass(frozen=True)
class Read:
    """F / scale of a supernet by a reading, to be differentiated for the parameters of its method."""

    reading: Reading
    vulnerability: Vulnerability
    space: SearchSpace

    def __call__(self, net: nn.Module, x: Tensor, x_adv: Tensor, *cell: Weights) -> tuple[Tensor, Tensor]:
        """`x`, `x_adv` (B,3,H,W), and for the reading `cell` the weights of the cell; tells F."""
        weights = sampled(net)
        if self.reading == "without-none":
            weights = without_none(weights, self.space)
        for fixed in cell:
            weights = straight_through(weights, fixed)
        return self.vulnerability(net, x, x_adv, weights)
