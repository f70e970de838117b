"""PC-DARTS (Xu et al., ICLR 2020): DARTS in which 1/K of the channels go through the operations, with edge weights.

    f_ij(x) = P[ Σ_o softmax(α_ij)_o o(x[:C/K]) ; pass(x[C/K:]) ]        x_j = Σ_{i<j} softmax_i(β_ij) f_ij(x_i)

P shuffles the channels, pass is the identity, or on a reducing edge max-pooling 2x2, and the softmax of β is over the
edges that enter a node. All edges of a node share P, so that it is done once a node, for the sum: the supernet's
`Shape.part`. α and β descend on L_val(w), first order, the weights on L_train, in turn; for the first 15 epochs only
the weights do. The cell is that of the strengths softmax(α)·softmax(β), `none` among them: the best operation of an
edge does not depend on β, which edges are kept does.

Readings and departures. 15 epochs are three tenths of a search of another length. Which channels go through the
operations is fixed, and P spreads them: the published `model_search_random.py`, said to draw them, neither draws nor
shuffles, and is not followed. Validation batches pass through the second half in a seeded order. The settings are
those for CIFAR-10; of the paper's search on ImageNet the linear warm-up of the learning rate is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnas.errors import RnasError
from rnas.nas.engine import Engine, Slope
from rnas.nas.methods.base import Alphas, Cost, Fields, Method, adam
from rnas.nas.objectives import ArchitectureLoss
from rnas.nets.space import Shape, Weights
from rnas.settings import Count, Search, at_least


@dataclass(frozen=True)
class Settings(Search):
    """Search an architecture with PC-DARTS."""

    method: str = "pc_darts"
    """Search method."""
    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 256
    """Images in a batch."""
    lr: float = 0.1
    """Learning rate of the weights at the start; it falls along a cosine."""
    part: int = 4
    """K: one in so many channels goes through the operations."""
    warmup: Count = None
    """Epochs that train only the weights; by default three tenths, the paper's 15 of 50."""
    alpha_lr: float = 6e-4
    """Learning rate of α and of the edge weights β (Adam)."""
    alpha_weight_decay: float = 1e-3
    """Weight decay of α and β."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "part")
        at_least(self, 0, "warmup", "alpha_lr", "alpha_weight_decay")
        if self.frozen >= self.epochs:
            raise RnasError(f"warmup is {self.frozen} of {self.epochs} epochs: nothing is left to search in")

    @property
    def frozen(self) -> int:
        """Epochs that leave α and β alone."""
        return 3 * self.epochs // 10 if self.warmup is None else self.warmup


class EdgeAlphas(nn.Module):
    """α (edges, operations) and β (edges,) of both kinds of cell, next to nothing at first."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.alpha = Alphas(shape.space)
        self.beta_normal = nn.Parameter(1e-3 * torch.randn(shape.space.edges))
        self.beta_reduce = nn.Parameter(1e-3 * torch.randn(shape.space.edges))

    def weights(self) -> Weights:
        """Those of operations times those of edges; the latter alone for what passes by."""
        edges = self.of_edges(self.beta_normal), self.of_edges(self.beta_reduce)
        mix = tuple(a * b[:, None] for a, b in zip(self.alpha.softmax().mix, edges, strict=True))
        return Weights(mix, edges if self.shape.part > 1 else None)

    def of_edges(self, beta: Tensor) -> Tensor:
        """(edges,): of the edges that enter a node the sum is 1."""
        into = torch.split(beta, [node + 2 for node in range(self.shape.space.nodes)])
        return torch.cat([b.softmax(0) for b in into])


class PcDarts(Method):
    """α and β of both kinds of cell."""

    settings: Settings
    edges: EdgeAlphas

    def shape(self, epoch: int) -> Shape:
        return Shape(self.settings.space, part=self.settings.part)

    def begin(self, shape: Shape) -> None:
        self.edges = EdgeAlphas(shape)

    def weights(self, *noise: Tensor) -> Weights:
        return self.edges.weights()

    def optimiser(self) -> torch.optim.Optimizer:
        return adam(self.parameters(), self.settings.alpha_lr, self.settings.alpha_weight_decay)

    def epoch(self, engine: Engine) -> Fields:
        frozen = engine.epoch <= self.settings.frozen
        for x, y in engine.train():
            if not frozen:
                self.descend_alphas(engine, *next(engine.validation))
            engine.descend_weights(x, y)
        return {"phase": "warmup" if frozen else "search"}

    def descend_alphas(self, engine: Engine, x: Tensor, y: Tensor) -> Slope:
        """One step of α and β on a validation batch."""
        slope = engine.slope(ArchitectureLoss(engine.precision), (x, y), self.parameters())
        engine.descend(slope, self.parameters(), engine.optimiser)
        engine.saw_architecture(slope, y)
        return slope

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        """Images as they are."""
        assert isinstance(settings, Settings)
        return Cost(attacks=0.0, passes=iterations * (1 if epoch <= settings.frozen else 2))
