"""RobNet (Guo et al., CVPR 2020): one supernet, a random sub-network of it every batch, the best of many in the end.

Each edge has a code of two bits, α = (α_skip, α_sep): 00 none, 01 a separable 3x3 convolution, 10 a skip, 11 their sum.
    min_θ E_α E_(x,y) max_{‖δ‖∞≤ε} L(f(x + δ; θ, α), y)                                                # Eq. 1
    D = Σα / |E|, the density, over the 2 operations of every edge                                      # Eq. 2
    G_l = (1/hw) Σ_st F_in[s,t] F_out[s,t]ᵀ    (C_in, C_out)                                            # Eq. 3
    L_l = (1/N) Σ_x ‖G_l(x) − G_l(x')‖_F²      x' the adversarial image of x                            # Eq. 4
Candidates with a large L of deep cells are dropped; the others are trained on from the supernet's weights, and scored.

Only the trained networks were published, not the search. Readings where the paper is silent: the weights are trained
on the first half of the training images and candidates scored on the second; codes are uniform, a cell's drawn anew if
one of its nodes has no edge; F_in of a cell is the output of the one before it, max-pooled 2x2 before a reduction cell,
and L the mean over the last third of the cells; the half with the lower L is kept, of cell-based networks too; a
candidate's BN is calibrated on 640 images before it is attacked; its learning rate falls as in the last third of the
supernet's; the winner has the highest PGD accuracy. Learning rate, batch and weight decay are those of aw_nas, which
re-implemented it. What is measured after an epoch is the supernet with each operation at 1/2, the mean of the codes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rnas.errors import RnasError
from rnas.genotype import Architecture, CellCodes
from rnas.nas.engine import Engine, Round
from rnas.nas.methods.base import Cost, Fields
from rnas.nas.sampling import CALIBRATED, Sampling, calibration, scored
from rnas.nets.space import Shape
from rnas.settings import Flag, Search, at_least

SEP, SKIP = "sep_conv_3x3", "skip_connect"


@dataclass(frozen=True)
class Settings(Search):
    """Search an architecture with RobNet."""

    method: str = "robnet"
    """Search method."""
    epochs: int = 300
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch."""
    lr: float = 0.05
    """Learning rate of the weights at the start; it falls along a cosine."""
    weight_decay: float = 1e-4
    """Weight decay of the weights."""
    cell_free: Flag = False
    """Give each of the --cells cells codes of its own; by default all share one list, and any number can be stacked."""
    candidates: int = 1000
    """Architectures to choose from in the end."""
    fsp_keep: float = 0.5
    """Share of them that is trained on: those whose features an attack distorts least; 1 takes all."""
    finetune: int = 3
    """Epochs of training on for each of these."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "candidates")
        at_least(self, 0, "finetune")
        if not 0 < self.fsp_keep <= 1:
            raise RnasError(f"fsp-keep is {self.fsp_keep}: expected a number in (0, 1]")
        if {SEP, SKIP} - set(self.space.operations):
            raise RnasError(f"robnet's operations are {SEP} and {SKIP}: --operations must name both")
        if self.space.cells < 2:
            raise RnasError("robnet compares the features of a cell with those of the one before: --cells 2 or more")

    @property
    def kept(self) -> int:
        """Candidates that pass the filter."""
        return max(1, round(self.fsp_keep * self.candidates))


class Robnet(Sampling):
    """A supernet of two operations."""

    settings: Settings

    def shape(self, epoch: int) -> Shape:
        space = self.settings.space
        allowed = (tuple(name in (SEP, SKIP) for name in space.operations),) * space.edges
        return Shape(space, allowed=(allowed, allowed), per_cell=self.settings.cell_free)

    def expected(self) -> Tensor:
        space = self.settings.space
        return torch.tensor([[0.5 * (name in (SEP, SKIP)) for name in space.operations]] * space.edges)

    def draw(self, generator: torch.Generator) -> CellCodes:
        space = self.settings.space
        cells = space.cells if self.settings.cell_free else 1
        return CellCodes(tuple(drawn_codes(space.nodes, generator) for _ in range(cells)))

    def epoch(self, engine: Engine) -> Fields:
        for x, y in engine.train():
            self.step(engine, x, y)
        return {}

    def choose(self, engine: Engine) -> Architecture:
        rounds = [
            Round("fsp", lambda found: self.by_features(engine, found), self.settings.kept),
            Round("finetuned", lambda found: self.by_accuracy(engine, found), 1),
        ]
        if self.settings.kept == self.settings.candidates:
            rounds = rounds[1:]
        return engine.candidates(self.settings.candidates, self.candidate, rounds)[0]

    def by_features(self, engine: Engine, found: Architecture) -> tuple[float, Fields]:
        """Scored by how little an attack moves the FSP matrices of the last third of the cells."""
        w, total, count = self.hard(found), 0.0, 0
        deep = max(1, self.settings.space.cells // 3)
        with engine.calibrated(calibration(engine), w):
            for x, y in engine.monitored:
                x_adv = engine.adversarial(x, y, w)
                engine.net.eval()
                with torch.no_grad():
                    clean, adversarial = (list(itertools.pairwise(engine.features(v, w))) for v in (x, x_adv))
                engine.net.train()
                pairs = zip(clean[-deep:], adversarial[-deep:], strict=True)
                total += float(torch.stack([fsp_loss(a, b) for a, b in pairs]).mean()) * len(y)
                count += len(y)
        return -total / count, {"density": density(found)}

    def by_accuracy(self, engine: Engine, found: Architecture) -> tuple[float, Fields]:
        """Scored by its accuracy under attack, after some epochs more as itself."""
        w = self.hard(found)
        with engine.calibrated(calibration(engine), w), engine.finetuned(self.settings.finetune, w):
            accuracy, fields = scored(engine.measure(engine.held_out, w))
        return accuracy, {**fields, "density": density(found)}

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        return Cost(iterations, iterations)

    @classmethod
    def cost_of_choosing(cls, settings: Search, iterations: float) -> Cost:
        """A forward pass is a third of one that is differentiated; a measurement makes four of them."""
        assert isinstance(settings, Settings)
        calibrating = CALIBRATED / settings.batch_size / 3
        watched = settings.monitor / settings.batch_size
        tuned = settings.finetune * iterations
        filtered = settings.candidates if settings.kept < settings.candidates else 0
        return Cost(
            attacks=filtered * watched + settings.kept * (tuned + iterations),
            passes=filtered * (calibrating + watched * 2 / 3)
            + settings.kept * (calibrating + tuned + iterations * 4 / 3),
        )


def drawn_codes(nodes: int, generator: torch.Generator) -> tuple[str, ...]:
    """The codes of a cell, uniform among those in which every node has an edge."""
    edges = nodes * (nodes + 3) // 2
    while True:
        bits = torch.randint(2, (edges, 2), generator=generator)
        first = [node * (node + 3) // 2 for node in range(nodes + 1)]
        if all(bits[a:b].any() for a, b in itertools.pairwise(first)):
            return tuple(f"{skip}{sep}" for skip, sep in bits.tolist())


def density(found: Architecture) -> float:
    """The share of operations that are there. # Eq. 2"""
    assert isinstance(found, CellCodes)
    bits = "".join(itertools.chain.from_iterable(found.codes))
    return bits.count("1") / len(bits)


def fsp(before: Tensor, after: Tensor) -> Tensor:
    """(B,C_in,C_out), of the outputs of two cells (B,C,H,W), that of the second half as large or as large. # Eq. 3"""
    if before.shape[2:] != after.shape[2:]:
        before = F.max_pool2d(before, 2)
    return torch.einsum("bihw,bjhw->bij", before, after) / after[0, 0].numel()


def fsp_loss(clean: tuple[Tensor, Tensor], adversarial: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over images of ‖G(x) − G(x')‖_F². # Eq. 4"""
    return (fsp(*clean) - fsp(*adversarial)).square().sum((1, 2)).mean()
