"""Methods without architecture weights: every batch trains one architecture drawn at random, and the best of many
candidates is what they find."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from rnas.genotype import Architecture
from rnas.nas.engine import Engine, Measured, Slope, of_candidate
from rnas.nas.methods.base import Fields, Method
from rnas.nas.sizes import first_that_fits
from rnas.nets.space import Shape, Weights, hard

CALIBRATED = 640
"""Images for BN's statistics of a candidate."""


class Sampling(Method):
    """Nothing but the mean of the drawn weights, which is what measurements see."""

    mean: Tensor

    def begin(self, shape: Shape) -> None:
        self.rows = shape.space.cells if shape.per_cell else 2
        self.register_buffer("mean", self.expected())

    def weights(self, *noise: Tensor) -> Weights:
        return Weights((self.mean,) * self.rows)

    @abstractmethod
    def expected(self) -> Tensor:
        """(edges, operations), the mean of the weights that `draw` leads to."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Architecture:
        """One architecture to train."""

    def candidate(self, generator: torch.Generator) -> Architecture:
        """One to score, whose network fits: drawn alike."""
        return first_that_fits(lambda: self.draw(generator), self.limits)

    def derive(self) -> Architecture:
        """The first candidate: before they are scored, none is known to be better than another."""
        return self.candidate(of_candidate(self.settings.seed, 0))

    def hard(self, architecture: Architecture) -> Weights:
        """The weights, 0 or 1, with which the supernet is this architecture."""
        return hard(architecture, self.shape(1), self.mean)

    def step(self, engine: Engine, x: Tensor, y: Tensor, adversarial: bool = True) -> Slope:
        """One step of the weights of one architecture, attacked as it is trained."""
        w = self.hard(self.draw(engine.generator))
        return engine.descend_weights(engine.adversarial(x, y, w) if adversarial else x, y, w)


def scored(measured: Measured, clean: bool = False) -> tuple[float, Fields]:
    """The adversarial accuracy, or the clean one, as a candidate's score; and what the log tells of it besides."""
    fields = {
        "clean_accuracy": measured.clean_accuracy,
        "adversarial_accuracy": measured.adversarial_accuracy,
        "F": measured.vulnerability,
    }
    return fields["clean_accuracy" if clean else "adversarial_accuracy"], fields


def calibration(engine: Engine) -> list[Tensor]:
    """Images for BN's statistics of a candidate."""
    return [x for x, _ in engine.some(engine.images.train, CALIBRATED)]
