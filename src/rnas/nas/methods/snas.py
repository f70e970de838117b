"""SNAS (Xie, Zheng, Liu and Lin, ICLR 2019): operations are sampled, and weights and distribution learned in one step.

    x_j = Σ_{i<j} Σ_k Z_ij^k O_k(x_i)      Z_ij = softmax((λ_ij + G_ij)/τ), G = −ln(−ln U), U uniform in (0, 1)

θ and λ both descend on E[L_train(θ, Z) + η·C(Z)]: one sample a step for each kind of cell, one backward pass, all the
training images. τ falls linearly from 1 to 0.03; as it does, Z becomes one-hot, with P(Z^k = 1) = softmax(λ)_k.
C is the mean over the cells of a kind, summed over both kinds and over edges, of what an edge costs. With
c = max(1, Σ_k Z^k cost_k) for each of size, flops and mac (`rnas.nas.costs`), an edge costs
    log:       (ln size + ln flops + ln mac) / 3
    linear:    0.43·(2·size + flops/4000 + mac/100), without the maximum
    discrete:  as log, with softmax(λ) for Z: the expectation in c, without noise
At the end each edge takes its most probable operation, `none` too, which leaves it out.

Readings and departures. The code's score function (REINFORCE) of the cost is left out: the cost is differentiable, and
the forms above have less variance. λ has the Adam that the code takes on several GPUs; on one it takes plain SGD, with
which λ hardly moves. The code's 150 epochs and 6 + 2 cells are the settings' here. As published, no gradient pushes a
cost below 1. A path is dropped (0.3) for a whole batch in one cell, not image by image: a supernet has one set of
weights for a batch. Measurements take softmax(λ), the mean of Z as τ → 0, where the code draws Z anew. The code watches
the accuracy on test images; here it is that of the second half, which is trained on, too. A node all of whose edges
choose `none` keeps its strongest other operation. Which η is the paper's mild, moderate or aggressive constraint was
not published: the log tells the cost that is reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.compute.layout import arranged_for
from rnas.compute.precision import FP32, Precision
from rnas.errors import RnasError
from rnas.fast.recording import WEIGHTS
from rnas.genotype import Architecture
from rnas.nas.costs import supernet_costs
from rnas.nas.derive import all_edges, discretise
from rnas.nas.engine import Engine, Slope
from rnas.nas.methods.base import Cost, Fields, Method, adam
from rnas.nas.objectives import passed
from rnas.nets.ops import reductions, total
from rnas.nets.space import Shape, Weights
from rnas.settings import Search, at_least

Form = Literal["log", "linear", "discrete"]


@dataclass(frozen=True)
class Settings(Search):
    """Search an architecture with SNAS."""

    method: str = "snas"
    """Search method."""
    epochs: int = 150
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch."""
    lr: float = 0.025
    """Learning rate of the weights at the start; it falls along a cosine."""
    lr_min: float = 0.001
    """Learning rate at the end."""
    eta: float = 1.5e-3
    """Weight η of the cost; about 1e-5 suits --cost-form linear."""
    cost_form: Form = "log"
    """What an edge costs: the logarithm of its sample's cost, that cost, or the logarithm of the expected cost."""
    size_weight: float = 1.0
    """Share of the number of weights in the cost; 1 is the published one."""
    flops_weight: float = 1.0
    """Share of the multiply-accumulates in the cost."""
    mac_weight: float = 1.0
    """Share of the memory access cost in the cost."""
    tau: float = 1.0
    """Temperature of the samples at the start; it falls linearly."""
    tau_min: float = 0.03
    """Temperature in the last epoch."""
    drop_path: float = 0.3
    """Probability with which an edge of a cell is dropped for a batch."""
    alpha_lr: float = 3e-4
    """Learning rate of λ, the logits of the operations (Adam)."""
    alpha_weight_decay: float = 1e-3
    """Weight decay of λ."""
    alpha_clip: float = 10.0
    """Largest norm of λ's gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "eta", "size_weight", "flops_weight", "mac_weight", "alpha_lr", "alpha_weight_decay")
        for name in ("tau", "tau_min", "alpha_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RnasError(f"{name.replace('_', '-')} is {getattr(self, name)}: expected a number above 0")
        if not 0 <= self.drop_path < 1:
            raise RnasError(f"drop-path is {self.drop_path}: expected a number in [0, 1)")

    def temperature(self, epoch: int) -> float:
        """τ of an epoch, from 1."""
        return self.tau_min + (self.tau - self.tau_min) * (1 - epoch / self.epochs)


class Snas(Method):
    """λ of both kinds of cell."""

    data = "all"
    settings: Settings

    def shape(self, epoch: int) -> Shape:
        return Shape(self.settings.space, per_cell=True)  # a cell's weights: its kind's sample, its own dropped paths

    def begin(self, shape: Shape) -> None:
        self.reducing = [cell in reductions(shape.space.cells) for cell in range(shape.space.cells)]
        size = shape.space.edges, len(shape.space.operations)
        self.normal = nn.Parameter(1 + 0.01 * torch.randn(size))
        self.reduce = nn.Parameter(1 + 0.01 * torch.randn(size))

    def draw(self, generator: torch.Generator, tau: float) -> tuple[Tensor, ...]:
        """The noise of a step: τ (), G (2, edges, operations), and what an edge is multiplied with (cells, edges)."""
        p, edges = self.settings.drop_path, len(self.normal)
        gumbel = -torch.empty(2, *self.normal.shape).exponential_(generator=generator).log()
        kept = (torch.rand(len(self.reducing), edges, generator=generator) >= p) / (1 - p)
        return tuple(t.to(self.normal) for t in (torch.tensor(tau), gumbel, kept))

    def samples(self, *noise: Tensor) -> Tensor:
        """Z (2, edges, operations) of normal and of reduction cells; without noise their probabilities."""
        logits = torch.stack([self.normal, self.reduce])
        if noise:
            tau, gumbel, _ = noise
            logits = (logits + gumbel) / tau
        return logits.softmax(-1)

    def of_cells(self, z: Tensor) -> Tensor:
        """(cells, edges, operations), from (2, edges, operations)."""
        return torch.stack([z[int(reducing)] for reducing in self.reducing])

    def weights(self, *noise: Tensor) -> Weights:
        mix = self.of_cells(self.samples(*noise))
        return Weights(tuple(mix * noise[2][..., None] if noise else mix))

    def optimiser(self) -> torch.optim.Optimizer:
        return adam(self.parameters(), self.settings.alpha_lr, self.settings.alpha_weight_decay)

    def strengths(self) -> tuple[Tensor, ...]:
        return tuple(logits.detach().double().softmax(-1) for logits in (self.normal, self.reduce))

    def alphas(self) -> list[Tensor]:
        return [self.normal, self.reduce]

    def epoch(self, engine: Engine) -> Fields:
        tau = self.settings.temperature(engine.epoch)
        for x, y in engine.train():
            self.descend(engine, x, y, *self.draw(engine.generator, tau))
        with torch.no_grad():
            cost = self.expense(self.costs(x), self.samples())
        return {"temperature": tau, "cost": float(cost)}

    def descend(self, engine: Engine, x: Tensor, y: Tensor, *noise: Tensor) -> Slope:
        """One step of weights and λ."""
        s, thetas, own = self.settings, engine.net.thetas, list(self.parameters())
        objective = JointLoss(s.eta, s.cost_form == "discrete", engine.precision)
        inputs = arranged_for(engine.net, x), y, self.costs(x), *noise
        slope = engine.slope(objective, inputs, [*thetas, *own], WEIGHTS)
        of_thetas, of_own = slope.grads[: len(thetas)], slope.grads[len(thetas) :]
        engine.descend(slope._replace(grads=of_thetas), thetas, engine.optimizer, s.clip)
        engine.descend(slope._replace(grads=of_own), own, engine.optimiser, s.alpha_clip)
        engine.saw_weights(slope._replace(loss=F.cross_entropy(slope.aux, y)), y)
        return slope

    def costs(self, x: Tensor) -> Tensor:
        """(cells, edges, operations, 3) of size, flops and mac for images like `x`."""
        return torch.tensor(supernet_costs(self.settings.space, *x.shape[2:])).to(self.normal)

    def expense(self, costs: Tensor, z: Tensor) -> Tensor:
        """C of `z` (2, edges, operations)."""
        s = self.settings
        shares = s.size_weight, s.flops_weight, s.mac_weight
        c = (costs * self.of_cells(z)[..., None]).sum(2)  # (cells, edges, 3)
        if s.cost_form == "linear":
            c, factors = 0.43 * c, (2.0, 1 / 4000, 1 / 100)
        else:
            c, factors = c.clamp_min(1).log(), (1 / 3, 1 / 3, 1 / 3)
        of_cells = sum(share * f * c[..., i].sum(1) for i, (share, f) in enumerate(zip(shares, factors, strict=True)))
        assert isinstance(of_cells, Tensor)
        return total(of_cells[i] / self.reducing.count(kind) for i, kind in enumerate(self.reducing))

    def derive(self) -> Architecture:
        normal, reduce = (s.tolist() for s in self.strengths())
        found = all_edges(self.settings.space, normal, reduce)
        if self.limits is None or self.limits.size(found).fits(self.limits.most):
            return found
        return discretise(self.settings.space, normal, reduce, limits=self.limits)  # with two edges a node, as DARTS's

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        """One pass for both, of clean images."""
        return Cost(0.0, iterations)


@dataclass(frozen=True)
class JointLoss:
    """What weights and λ descend on: cross-entropy + η·C, of the sample, or if `expected` of its probabilities."""

    eta: float
    expected: bool
    precision: Precision = FP32

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, costs: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor]:
        """Tells logits (B,classes)."""
        method = cast(Snas, net.architecture)
        logits = passed(net, x, self.precision, noise)
        z = method.samples(*(() if self.expected else noise))
        return F.cross_entropy(logits, y) + self.eta * method.expense(costs, z), logits
