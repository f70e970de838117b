"""RACL (Dong, Li, Wang and Xu, arXiv 2009.00902, TPAMI 47(5) 2025): a small Lipschitz constant, with confidence.

    |F(x + δ) − F(x)| ≤ λ_F ‖δ‖                                                        (2), (3)
    I_j = Σ_{i<j} β_ij Σ_o α_o,ij o(I_i)                                               (5)
    λ_F ≲ C · Π_cells Π_nodes Σ_{i<j} β_ij Σ_o α_o,ij λ_o                              (7)-(10)
    α ~ LN(μ_α, Σ_α), β ~ LN(μ_β, Σ_β); sums of log-normals pass for log-normal        (11), (12)
    P(λ_F ≤ λ̄_F) ≥ η, by the CDF μ_F + Φ⁻¹(η) σ_F ≤ ln λ̄_F                             (13)-(15)
    min L_CE + ‖∇_x F‖ under that, with a dual and a penalty ρ                         (16)-(19)

θ descends on D_T, then (μ, σ) on D_V, on clean images, with noise drawn anew in every step (Algorithm 1). No code of
the authors is known; this follows restatements of the paper that cite its numbers. In brackets: our belief, from 0 to
1, that what they leave open is so in the paper.

- The constraint reads as in (15) above [0.8]; images are clean [0.9]; Σ is diagonal [0.5]; λ̄_F takes in the C.
- Sums are those of Fenton and Wilkinson [0.7]. An edge's terms share its β, and node j of all cells of a kind has the
  same α and β, so that σ, not σ², adds up over them; `--covariance independent` is what the paper likely does.
- λ_o is 1 for pools and skips and 0 for none [0.6]; of convolutions, and so of a stride-2 skip, by power iteration.
- F in ‖∇_x F‖ is the cross-entropy, the norm l2 of each image's, in eval mode, its factor 1.
- ∇c, c the violation, is multiplied by max(0, dual + ρc), which is then the next dual [0.4]: after each epoch, for in
  every step it would run away before Adam's small steps have changed anything.
- The cell is that of E[α] E[β] [0.5], or with `--sampled` of a seeded sample; the log tells both.
- Unknown, so ours: λ̄_F is 0.9 for each node of the network of what it was after a warm-up of 15 epochs; σ starts at
  0.3; ρ makes both gradients equally long when the constraint first binds. No partial channels [0.3 that
  the paper has them].

Departures. (i) After each step Σ_o E[α_o] = 1 on an edge and Σ_i E[β_i] = 1 at a node, by a shift of μ: else scaling
all of them down would meet the constraint, and BN undoes that. (ii) BN's 1/σ is part of a convolution's λ, or weights
would shrink it for nothing. (iii) Pools are not 1-Lipschitz in l2: `--pools l2` takes bounds that hold. (iv) The true
bound is a recursion over nodes; the product is the paper's. (v) `none` lowers λ_F as there; its share is logged. (vi)
‖∇_x F‖ is differentiated by first-order passes (docs/decisions/026).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rnas.compute.layout import arranged_for
from rnas.errors import RnasError
from rnas.fast.recording import ALPHAS, WEIGHTS, Kind
from rnas.genotype import Architecture
from rnas.nas.derive import discretise
from rnas.nas.distributions import Distributions
from rnas.nas.engine import Engine, Slope
from rnas.nas.lagrangian import Dual
from rnas.nas.lipschitz import Lipschitz, Pools
from rnas.nas.lognormal import log_quantile, probability
from rnas.nas.methods.base import Cost, Fields, Method, adam
from rnas.nas.objectives import ArchitectureLoss, ImageCrossEntropy
from rnas.nets.space import Shape, Weights
from rnas.settings import Bound, Count, Flag, Search, at_least

EPS = 0.1  # how far images are shifted for the gradient of ‖∇_x F‖ (docs/decisions/026)
SETTLED = 20  # steps of power iteration at the end of an epoch, where bound and dual are decided
TENTH = 0.1  # a violation counts for ρ as at least so much a node: one next to nothing would make ρ huge


@dataclass(frozen=True)
class Settings(Search):
    """Search an architecture whose Lipschitz constant is small with confidence (RACL)."""

    method: str = "racl"
    """Search method."""
    epochs: int = 50
    """Passes over the training images."""
    lr: float = 0.1
    """Learning rate of the weights at the start; it falls along a cosine."""
    warmup: Count = None
    """Epochs that train only the weights; by default three tenths, 15 of 50."""
    alpha_lr: float = 6e-4
    """Learning rate of the distributions (Adam)."""
    alpha_weight_decay: float = 1e-3
    """Weight decay of the distributions: towards equal operations and the first sigma."""
    lipschitz: str = "0.9x"
    """Bound on the Lipschitz constant: a number, a share for each node after the warm-up such as 0.9x, or none."""
    confidence: float = 0.9
    """Probability η with which the bound is to hold."""
    sigma: float = 0.3
    """Standard deviation of ln α and ln β at the start."""
    covariance: Literal["correlated", "independent"] = "correlated"
    """Whether what shares an α or a β varies together, or all passes for independent."""
    pools: Pools = "one"
    """Lipschitz constants of pools: one, as in the paper, or bounds that hold for l2 distances."""
    input_gradient: float = 1.0
    """Factor of the norm of the input gradient in both losses; 0 leaves it out."""
    sampled: Flag = False
    """Derive the cell from a sample of the distributions instead of their means."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "warmup", "alpha_lr", "alpha_weight_decay", "input_gradient")
        if not 0 < self.confidence < 1:
            raise RnasError(f"confidence is {self.confidence}: expected a number between 0 and 1")
        if not 0 < self.sigma < math.inf:
            raise RnasError(f"sigma is {self.sigma}: expected a finite number above 0")
        try:
            Bound.parse(self.lipschitz)
        except RnasError:
            wanted = "a number above 0, a share for each node such as 0.9x, or none"
            raise RnasError(f"lipschitz is '{self.lipschitz}': expected {wanted}") from None
        if self.phase_one >= self.epochs:
            raise RnasError(f"warmup is {self.phase_one} of {self.epochs} epochs: nothing is left to search in")

    @property
    def phase_one(self) -> int:
        """Epochs of the warm-up."""
        return self.epochs * 3 // 10 if self.warmup is None else self.warmup


class Racl(Method):
    """The distributions of α and β, λ_o; the bound and its dual."""

    settings: Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.dual = Dual()
        self.bound: float | None = None  # ln λ̄_F

    # --- Algorithm 1

    def epoch(self, engine: Engine) -> Fields:
        searching = engine.epoch > self.settings.phase_one
        for x, y in engine.train():
            self.descend_weights(engine, x, y)
            if searching:
                self.descend_distributions(engine, *next(engine.validation))
        sample = json.dumps(self.of_sample().to_json())
        return {"phase": "search" if searching else "warmup", **self.decide(engine), "sampled_genotype": sample}

    def descend_weights(self, engine: Engine, x: Tensor, y: Tensor) -> Slope:
        """θ down L_CE + ‖∇_x F‖."""
        slope = self.slope(engine, x, y, engine.net.thetas, WEIGHTS)
        engine.descend(slope, engine.net.thetas, engine.optimizer, self.settings.clip)
        engine.saw_weights(slope, y)
        return slope

    def descend_distributions(self, engine: Engine, x: Tensor, y: Tensor) -> Slope:
        """(μ, σ) down the same and, with one step of power iteration, towards the bound; then the gauge. # (16)-(19)"""
        parameters = list(self.parameters())
        slope = self.slope(engine, x, y, parameters, ALPHAS)
        if self.bound is not None:
            quantile = log_quantile(*self.stretch(engine), self.settings.confidence)
            towards = torch.autograd.grad(quantile, parameters)
            grads = self.dual.slope(slope.grads, towards, quantile.item() - self.bound, TENTH * self.nodes)
            slope = slope._replace(grads=grads)
        engine.descend(slope, parameters, engine.optimiser)
        self.distributions.fix_gauge()
        engine.saw_architecture(slope, y)
        return slope

    def slope(self, engine: Engine, x: Tensor, y: Tensor, parameters: list[nn.Parameter], kind: Kind) -> Slope:
        """L_CE + ‖∇_x F‖ and its gradients, of the network as a new sample has it. # (16)"""
        noise, factor = self.distributions.draw(engine.generator), self.settings.input_gradient
        terms = [(1.0, x)] if factor else []
        of_image = ImageCrossEntropy(engine.precision)
        norms = [engine.input_term(of_image, [t], y, parameters, noise, eps=EPS) for t in terms]
        inputs = arranged_for(engine.net, x), y, *noise
        slope = engine.slope(ArchitectureLoss(engine.precision), inputs, parameters, kind)
        for norm in norms:
            grads = tuple(g + factor * more for g, more in zip(slope.grads, norm.grads, strict=True))
            slope = Slope(slope.loss + factor * norm.loss, slope.aux, grads)
        return slope

    def stretch(self, engine: Engine, steps: int = 1) -> tuple[Tensor, Tensor]:
        """μ_F and σ_F after `steps` of power iteration. # (7)-(12)"""
        return self.distributions.stretch(self.lipschitz(engine.net, steps), self.settings.covariance == "correlated")

    @torch.no_grad()
    def decide(self, engine: Engine) -> Fields:
        """The bound after the warm-up or else the first epoch, the dual after those that follow; what the log tells."""
        mu, sigma = (t.item() for t in self.stretch(engine, SETTLED))
        quantile, wanted = log_quantile(mu, sigma, self.settings.confidence), Bound.parse(self.settings.lipschitz)
        if self.bound is not None:
            self.dual.ascend(quantile - self.bound)
        elif wanted is not None and engine.epoch >= self.settings.phase_one:
            share = quantile + self.nodes * math.log(wanted.value)
            self.bound = share if wanted.relative else math.log(wanted.value)
        confidence = None if self.bound is None else probability(mu, sigma, self.bound)
        return {"ln_lambda": quantile, "confidence": confidence, **self.get_extra_state()}

    # --- what the engine asks

    def begin(self, shape: Shape) -> None:
        self.distributions = Distributions(shape.space, self.settings.sigma)
        self.lipschitz = Lipschitz(shape, self.settings.pools)
        self.nodes = shape.space.cells * shape.space.nodes  # of the whole supernet

    def weights(self, *noise: Tensor) -> Weights:
        return self.distributions.weights(*noise)

    def optimiser(self) -> torch.optim.Optimizer:
        return adam(self.parameters(), self.settings.alpha_lr, self.settings.alpha_weight_decay)

    def of_sample(self) -> Architecture:
        """The architecture of one sample, whose noise is the same after every epoch."""
        noise = self.distributions.draw(torch.Generator().manual_seed(self.settings.seed))
        normal, reduce = (mix.tolist() for mix in self.weights(*noise).mix)
        return discretise(self.settings.space, normal, reduce)

    def choose(self, engine: Engine) -> Architecture:
        return self.of_sample() if self.settings.sampled else self.derive()

    def summary(self, event: Mapping[str, Any]) -> str:
        bound = "" if event["bound"] is None else f", bound {event['bound']:.2f}"
        return f" (ln λ_F {event['ln_lambda']:.2f}{bound})"

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        """A step of either takes a pass for L_CE, one for the images' gradient, and two for that of its norm."""
        assert isinstance(settings, Settings)
        steps = iterations * (1 if epoch <= settings.phase_one else 2)
        return Cost(attacks=0.0, passes=steps * (4 if settings.input_gradient else 1))

    def get_extra_state(self) -> dict[str, float | None]:
        return {"bound": self.bound, "dual": self.dual.value, "rho": self.dual.rho}

    def set_extra_state(self, state: dict[str, float | None]) -> None:
        self.bound, self.dual = state["bound"], Dual(state["dual"] or 0.0, state["rho"])
