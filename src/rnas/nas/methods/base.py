"""What a search method is: an architecture for the supernet, and an epoch.

A file in this folder, or anyone's (`--method path/to/mine.py`), holds one subclass of `Method` and may hold one of
`rnas.settings.Search`, a frozen dataclass whose further fields are the method's flags and whose defaults are the
method's. docs/methods.md has a whole example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rnas.genotype import Architecture
from rnas.nas.derive import Limits, discretise
from rnas.nas.objectives import Vulnerability
from rnas.nets.space import Shape, Weights
from rnas.settings import Search, SearchSpace
from rnas.training.schedule import cosine

if TYPE_CHECKING:
    from rnas.nas.engine import Engine, Measured

Fields = Mapping[str, float | str | None]
"""What a method adds to an epoch in log.jsonl."""


class Cost(NamedTuple):
    """What an epoch costs, in batches."""

    attacks: float
    """Attacked, each with `attack_steps` gradients for the images."""
    passes: float
    """Differentiated for parameters in train mode, counted for each of the images' versions."""


class Method(nn.Module, ABC):
    """A search method. It is registered as the supernet's `architecture`: its parameters and buffers are saved with the
    network's, and what else it must remember is its `get_extra_state`, if it has one (plain values).

    It keeps no network: an engine comes with every call (`rnas.nas.engine` says what may be asked of it).
    """

    data: ClassVar[Literal["halves", "all"]] = "halves"
    """The images of `engine.train()`: the first half of the training images, or all; validation is the second half."""
    settings: Search
    limits: Limits | None = None
    """On the size of what is found; the frame knows them once it knows the images."""

    def __init__(self, settings: Search):
        super().__init__()
        self.settings = settings

    # --- what a method must say

    @abstractmethod
    def begin(self, shape: Shape) -> None:
        """Make the parameters for a new supernet of this shape, on the CPU; torch's generator is seeded."""

    @abstractmethod
    def weights(self, *noise: Tensor) -> Weights:
        """How much of each operation: differentiable, from the parameters and the noise of a step. Without noise it is
        what measurements see."""

    @abstractmethod
    def epoch(self, engine: Engine) -> Fields:
        """One epoch. Returns what the log shall tell besides what it always tells."""

    # --- what a method may say

    def shape(self, epoch: int) -> Shape:
        """The supernet of an epoch (from 1). Where it differs from that of the epoch before, a new one is begun."""
        return Shape(self.settings.space)

    def optimiser(self) -> torch.optim.Optimizer | None:
        """A new optimiser of the method's own parameters; then in `engine.optimiser`."""
        return None

    def lr(self, epoch: int) -> float:
        """Of the weights in an epoch (from 1)."""
        return cosine(self.settings.lr, epoch, self.settings.epochs, self.settings.lr_min)

    def vulnerability(self) -> Vulnerability:
        """How F is measured."""
        return Vulnerability()

    def start(self, engine: Engine) -> None:
        """Before the first epoch of a run."""

    def measured(self, engine: Engine, validation: Measured) -> Fields:
        """After the measurements of an epoch. Returns what the log shall tell."""
        return {}

    def strengths(self) -> tuple[Tensor, ...]:
        """(edges, operations) for each kind of cell or each cell: what is shown of an epoch, 0 for what is pruned."""
        return tuple(mix.detach().double() for mix in self.weights().mix)

    def alphas(self) -> list[Tensor]:
        """[normal, reduce] whose course alphas.npz shall keep, where the weights are their softmax."""
        return []

    def derive(self) -> Architecture:
        """The architecture as of now."""
        normal, reduce = (s.tolist() for s in self.strengths())
        return discretise(self.settings.space, normal, reduce, limits=self.limits)

    def choose(self, engine: Engine) -> Architecture:
        """The architecture that the search ends with."""
        return self.derive()

    def summary(self, event: Mapping[str, Any]) -> str:
        """What the line of an epoch shall say besides losses and accuracies."""
        return ""

    def warning(self, epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """What to warn of at the end, from all epochs of the log: a `message` for people, and numbers."""
        return None

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        """Of an epoch (from 1) in which the training images make so many batches."""
        return Cost(attacks=2 * iterations, passes=2 * iterations)

    @classmethod
    def cost_of_choosing(cls, settings: Search, iterations: float) -> Cost:
        """Of `choose`."""
        return Cost(0.0, 0.0)


class Alphas(nn.Module):
    """α of both kinds of cell, each (edges, operations): next to nothing at first (Liu et al. 2019)."""

    def __init__(self, space: SearchSpace):
        super().__init__()
        shape = space.edges, len(space.operations)
        self.normal = nn.Parameter(1e-3 * torch.randn(shape))
        self.reduce = nn.Parameter(1e-3 * torch.randn(shape))

    def softmax(self) -> Weights:
        """The weights of Eq. 1."""
        return Weights((self.normal.softmax(-1), self.reduce.softmax(-1)))

    def strengths(self) -> tuple[Tensor, ...]:
        """The same as numbers, in float64."""
        return tuple(alpha.detach().double().softmax(-1) for alpha in (self.normal, self.reduce))


def adam(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Adam:
    """The optimiser that DARTS and all that came of it take for α."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999), weight_decay=weight_decay)
