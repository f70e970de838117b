"""P-DARTS (Chen, Xie, Wu and Tian, ICCV 2019): DARTS in three stages; the network gets deeper, the choice smaller.

    x_j = Σ_{i<j} Σ_{o ∈ O_ij} softmax_{O_ij}(α_ij)_o o(x_i)

Stages 1, 2, 3 have 5, 11, 17 cells and 8, 5, 3 operations an edge. Each is a new supernet with new α, trained for 25
epochs, the first 10 of them weights alone; α's step is of first order. At the end of a stage each edge of each kind of
cell loses its operations of lowest softmax. Against skips, which deeper networks favour too much:
    - dropout, value by value, behind each skip of stride 1, in the steps of weights and of α. Its rate in epoch e of E
      (from 0) is p·(E−1−e)/E in the warm-up of w epochs, then p·exp(−5(e−w)/E), where p = 0, 0.4, 0.7 by stage;
    - at the end, while the normal cell keeps more than M = 2 skips, the weakest of them goes, and operations and edges
      are chosen anew.

Readings and departures. The paper and its code differ in p and in M (the code prints a cell for every M): these are the
paper's. The rate jumps at the end of the warm-up, as in the code, whose exp(−0.2(e−10)) is that of 25 epochs; a shorter
stage passes through the same rates. "Operation-level" dropout is that of single values, as in the code. The depths are
those of a space of 8 cells, the default, and scale with `--cells`, down to 3: fewer have no normal cell. The numbers of
operations scale likewise, down to 2, so that one is not `none`. Operations that left keep a column of α without effect.
With fewer than three epochs the later stages do not take place. α is clipped as the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import exp
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnas.errors import RnasError
from rnas.genotype import Architecture, Genotype
from rnas.nas.derive import Strength, cap_skips, discretise, strongest
from rnas.nas.engine import Engine, Slope
from rnas.nas.methods.base import Alphas, Cost, Fields, Method, adam
from rnas.nas.objectives import ArchitectureLoss
from rnas.nets.space import Mask, Shape, Weights
from rnas.settings import Count, Search, at_least
from rnas.training.schedule import cosine

CELLS, OPERATIONS, WHOLE = (5, 11, 17), (8, 5, 3), 8
"""Of the stages, where the space has `WHOLE` cells or operations."""


@dataclass(frozen=True)
class Settings(Search):
    """Search an architecture with P-DARTS."""

    method: str = "p_darts"
    """Search method."""
    epochs: int = 75
    """Passes over the training images; a third for each stage."""
    batch_size: int = 96
    """Images in a batch."""
    lr: float = 0.025
    """Learning rate of the weights at the start of a stage; it falls along a cosine."""
    clip: float = 5.0
    """Largest norm of the weights' gradient, and of α's."""
    warmup: Count = None
    """Epochs of each stage that train only the weights; by default two fifths, the paper's 10 of 25."""
    skip_dropout: tuple[float, float, float] = (0.0, 0.4, 0.7)
    """Rate of the dropout behind skips at the start of each stage's search."""
    max_skips: int = 2
    """Most skips of the normal cell."""
    alpha_lr: float = 6e-4
    """Learning rate of the architecture weights α (Adam)."""
    alpha_weight_decay: float = 1e-3
    """Weight decay of α."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "warmup", "max_skips", "alpha_lr", "alpha_weight_decay")
        if len(self.skip_dropout) != 3 or not all(0 <= p < 1 for p in self.skip_dropout):
            raise RnasError(f"skip-dropout is {list(self.skip_dropout)}: expected three numbers in [0, 1)")
        shortest = max(1, self.epochs // 3)
        if self.warmup is not None and self.warmup >= shortest:
            raise RnasError(f"warmup is {self.warmup} of a stage's {shortest} epochs: nothing is left to search in")


class Position(NamedTuple):
    """Where in the stages an epoch is."""

    stage: int
    """0, 1 or 2"""
    epoch: int
    """of the stage, from 0"""
    epochs: int
    """of the stage"""
    warmup: int

    @classmethod
    def of(cls, settings: Settings, epoch: int) -> Position:
        """Of `epoch`, from 1."""
        stage = 3 * (epoch - 1) // settings.epochs
        first, end = (-(-s * settings.epochs // 3) for s in (stage, stage + 1))
        warmup = 2 * (end - first) // 5 if settings.warmup is None else settings.warmup
        return cls(stage, epoch - 1 - first, end - first, warmup)

    @property
    def warms(self) -> bool:
        """Whether only the weights are trained."""
        return self.epoch < self.warmup

    def dropout(self, p: float) -> float:
        """The rate behind skips, in a stage whose search begins with `p`."""
        falling = (self.epochs - 1 - self.epoch) / self.epochs
        return p * (falling if self.warms else exp(-5 * (self.epoch - self.warmup) / self.epochs))


def cells(settings: Search, stage: int) -> int:
    """Of a stage's supernet."""
    return max(3, round(settings.space.cells * CELLS[stage] / WHOLE))


def operations(settings: Search, stage: int) -> int:
    """How many an edge has in a stage."""
    there = len(settings.space.operations)
    return min(there, max(2, round(there * OPERATIONS[stage] / WHOLE)))


class PDarts(Method):
    """α of both kinds of cell; which operations each stage that has been reached has."""

    settings: Settings
    alpha: Alphas
    allowed: Tensor

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.masks: list[tuple[Mask, Mask] | None] = [None]

    def shape(self, epoch: int) -> Shape:
        stage = Position.of(self.settings, epoch).stage
        return Shape(replace(self.settings.space, cells=cells(self.settings, stage)), self.masks[stage])

    def begin(self, shape: Shape) -> None:
        self.alpha = Alphas(shape.space)
        every = (strongest(self.alpha.normal.tolist(), len(shape.space.operations)),) * 2
        self.register_buffer("allowed", torch.tensor(shape.allowed or every), persistent=False)

    def weights(self, *noise: Tensor) -> Weights:
        """The noise of a step is the rate of the dropout behind skips, ()."""
        pairs = zip((self.alpha.normal, self.alpha.reduce), self.allowed, strict=True)
        mix = tuple(alpha.masked_fill(~allowed, -torch.inf).softmax(-1) for alpha, allowed in pairs)
        return Weights(mix, dropout=noise[0] if noise else None)

    def optimiser(self) -> torch.optim.Optimizer:
        return adam(self.parameters(), self.settings.alpha_lr, self.settings.alpha_weight_decay)

    def lr(self, epoch: int) -> float:
        at = Position.of(self.settings, epoch)
        return cosine(self.settings.lr, at.epoch + 1, at.epochs, self.settings.lr_min)

    def epoch(self, engine: Engine) -> Fields:
        at = Position.of(self.settings, engine.epoch)
        rate = at.dropout(self.settings.skip_dropout[at.stage])
        noise = (self.alpha.normal.new_tensor(rate),) if rate else ()
        for (x, y), (x_val, y_val) in zip(engine.train(), engine.validation, strict=False):
            if not at.warms:
                self.descend_alphas(engine, x_val, y_val, *noise)
            engine.descend_weights(x, y, self.weights(*noise))
        if at.epoch == at.epochs - 1 and at.stage < 2:
            left = operations(self.settings, at.stage + 1)
            normal, reduce = (strongest(rows.tolist(), left) for rows in self.strengths())
            self.masks = [*self.masks[: at.stage + 1], (normal, reduce)]
        return {"phase": "warmup" if at.warms else "search", "stage": at.stage + 1, "skip_dropout": rate}

    def descend_alphas(self, engine: Engine, x: Tensor, y: Tensor, *noise: Tensor) -> Slope:
        """One step of α on a validation batch."""
        slope = engine.slope(ArchitectureLoss(engine.precision), (x, y, *noise), self.parameters())
        engine.descend(slope, self.parameters(), engine.optimiser, self.settings.clip)
        engine.saw_architecture(slope, y)
        return slope

    def derive(self) -> Architecture:
        normal, reduce = (s.tolist() for s in self.strengths())
        space = self.settings.space

        def choose(rows: Strength) -> Genotype:
            return discretise(space, rows, reduce, limits=self.limits)

        return choose(cap_skips(space, normal, self.settings.max_skips, lambda rows: choose(rows).normal))

    def summary(self, event: Mapping[str, Any]) -> str:
        return f", stage {event['stage']} of 3"

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        """In passes of the whole space's supernet, which grow with the cells and with the operations of an edge."""
        assert isinstance(settings, Settings)
        at = Position.of(settings, epoch)
        deeper = cells(settings, at.stage) / settings.space.cells
        fewer = operations(settings, at.stage) / len(settings.space.operations)
        return Cost(0.0, (1 if at.warms else 2) * iterations * deeper * fewer)

    def get_extra_state(self) -> dict[str, Any]:
        return {"masks": self.masks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.masks = state["masks"]
