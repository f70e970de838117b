"""Random search, in both of the forms that searches are compared with.

`--epochs 0`: one cell of each kind, uniform, and nothing else. Each node takes 2 of the nodes before it, each edge one
of the operations besides `none`, all alike likely: 1,037,664,180 cells of 4 nodes and 7 operations. That is also
the law of a discretised random α. One draw says little: `--seeds N`, and the mean and the spread over them.

With epochs, weight sharing (Li and Talwalkar, UAI 2019; liamcli/randomNAS_release): each batch trains one uniform pair
of cells, `none` among its operations, but not on both edges of a node, for nothing would enter it; then many candidates
are scored with the shared weights on a few batches, the best of them on the whole validation half, and the best of
these is what is found.

Departures: training and scores are on PGD images (`--clean`: on images as they are, as published), for robust networks
are looked for; candidates have no `none`, for an edge that a cell keeps should do something; one round of candidates at
the end instead of several; BN is calibrated to each candidate on 640 images, where the published code takes the running
statistics of all. What is measured after an epoch is the supernet with the mean of the drawn weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rnas.genotype import Architecture, Cell, Genotype
from rnas.nas.engine import Engine, Round
from rnas.nas.methods.base import Cost, Fields
from rnas.nas.sampling import Sampling, calibration, scored
from rnas.nas.sizes import first_that_fits
from rnas.settings import Flag, Search, SearchSpace, at_least

EDGES, BATCHES = 2, 10
"""Edges that enter a node; validation batches that every candidate is scored on."""


@dataclass(frozen=True)
class Settings(Search):
    """Search an architecture at random: with shared weights, or (--epochs 0) without any."""

    method: str = "random"
    """Search method."""
    epochs: int = 50
    """Passes over the training images; 0 draws a cell and trains nothing."""
    batch_size: int = 64
    """Images in a batch."""
    lr: float = 0.025
    """Learning rate of the weights at the start; it falls along a cosine."""
    lr_min: float = 0.001
    """Learning rate at the end."""
    clean: Flag = False
    """Train and score on images as they are."""
    candidates: int = 1000
    """Architectures that are scored on 10 batches in the end."""
    finalists: int = 10
    """Of these, how many are scored on all images of the validation half."""

    fewest_epochs: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "candidates", "finalists")


class Random(Sampling):
    """A supernet in which one architecture is trained at a time."""

    settings: Settings

    def expected(self) -> Tensor:
        space = self.settings.space
        edges = torch.tensor([EDGES / (node + 2) for node in range(space.nodes) for _ in range(node + 2)])
        n = len(space.operations)
        likely = {"none": 1 / (n + 1)} if "none" in space.operations else {}  # never both edges
        others = (1 - sum(likely.values())) / (n - len(likely))
        return edges[:, None] * torch.tensor([likely.get(name, others) for name in space.operations])

    def draw(self, generator: torch.Generator) -> Genotype:
        return uniform_genotype(self.settings.space, self.settings.space.operations, generator)

    def candidate(self, generator: torch.Generator) -> Architecture:
        space = self.settings.space
        real = tuple(name for name in space.operations if name != "none")
        return first_that_fits(lambda: uniform_genotype(space, real, generator), self.limits)

    def epoch(self, engine: Engine) -> Fields:
        for x, y in engine.train():
            self.step(engine, x, y, adversarial=not self.settings.clean)
        return {}

    def choose(self, engine: Engine) -> Architecture:
        settings = self.settings
        if settings.epochs == 0:
            return self.derive()
        few = engine.some(engine.images.validation, BATCHES * settings.batch_size)

        def score(found: Architecture, all_images: bool) -> tuple[float, Fields]:
            w = self.hard(found)
            with engine.calibrated(calibration(engine), w):
                return scored(engine.measure(engine.held_out if all_images else few, w), settings.clean)

        rounds = [
            Round("few", lambda found: score(found, False), settings.finalists),
            Round("all", lambda found: score(found, True), 1),
        ]
        return engine.candidates(settings.candidates, self.candidate, rounds)[0]

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        assert isinstance(settings, Settings)
        return Cost(0.0 if settings.clean else iterations, iterations)

    @classmethod
    def cost_of_choosing(cls, settings: Search, iterations: float) -> Cost:
        """A forward pass is a third of one that is differentiated; a measurement makes four of them, and attacks."""
        assert isinstance(settings, Settings)
        if settings.epochs == 0:
            return Cost(0.0, 0.0)
        finalists = min(settings.finalists, settings.candidates)
        measured = settings.candidates * min(BATCHES, iterations) + finalists * iterations
        calibrating = (settings.candidates + finalists) * 10 / 3
        return Cost(measured, calibrating + measured * 4 / 3)


def uniform_genotype(space: SearchSpace, operations: tuple[str, ...], generator: torch.Generator) -> Genotype:
    """Two cells, each node with two edges from nodes before it, each with one of the operations: all alike likely, but
    that not both do nothing."""

    def node(number: int) -> tuple[tuple[str, int], ...]:
        sources = torch.randperm(number + 2, generator=generator)[:EDGES].sort().values.tolist()
        while True:
            drawn = torch.randint(len(operations), (EDGES,), generator=generator).tolist()
            edges = tuple((operations[k], source) for k, source in zip(drawn, sources, strict=True))
            if any(operation != "none" for operation, _ in edges):
                return edges

    def cell() -> Cell:
        return Cell(tuple(node(i) for i in range(space.nodes)), tuple(range(2, space.nodes + 2)))

    return Genotype(cell(), cell())
