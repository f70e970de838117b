"""DARTS (Liu, Simonyan and Yang, ICLR 2019): α down the validation loss, the weights down the training loss, in turn.

    x_j = Σ_{i<j} Σ_o softmax(α_ij)_o o(x_i)        min_α L_val(w*(α), α), w*(α) = argmin_w L_train(w, α)

First order: ∇_α L_val(w, α). Second order: with the virtual step w' = w − ξ·v, v the step of SGD with momentum,
    ∇_α L_val(w', α) − ξ·(∇_α L_train(w⁺, α) − ∇_α L_train(w⁻, α)) / 2ε
with w± = w ± ε·d, d = ∇_w' L_val(w', α), ε = 0.01/‖d‖₂.
ξ is the learning rate of the epoch. α moves first, then the weights, on the same training batch.

Readings and departures. Validation batches pass through the second half in a seeded order instead of being drawn with
replacement. The virtual step is clipped as the real one is. Its passes leave BN's running statistics alone, and the
weights are put back from a copy: the published code lets both drift. With `--adversarial` both losses are those of PGD
images (the training images attacked at w, the validation images at w'): RNAS without its bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rnas.compute.memory import buffers_kept
from rnas.fast.recording import WEIGHTS
from rnas.nas.engine import Engine, Slope
from rnas.nas.methods.base import Alphas, Cost, Fields, Method, adam
from rnas.nas.objectives import ArchitectureLoss
from rnas.nets.space import Shape, Weights
from rnas.settings import Flag, Search, at_least
from rnas.training.objectives import Objective


@dataclass(frozen=True)
class Settings(Search):
    """Search an architecture with DARTS."""

    method: str = "darts"
    """Search method."""
    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch."""
    lr: float = 0.025
    """Learning rate of the weights at the start; it falls along a cosine."""
    lr_min: float = 0.001
    """Learning rate at the end."""
    order: Literal[1, 2] = 1
    """Of the approximation of α's gradient: 2 looks one step of the weights ahead, for about three times the cost."""
    adversarial: Flag = False
    """Train weights and α on PGD images."""
    alpha_lr: float = 3e-4
    """Learning rate of the architecture weights α (Adam)."""
    alpha_weight_decay: float = 1e-3
    """Weight decay of α."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "alpha_lr", "alpha_weight_decay")


class Darts(Method):
    """α of both kinds of cell."""

    settings: Settings
    alpha: Alphas

    def begin(self, shape: Shape) -> None:
        self.alpha = Alphas(shape.space)

    def weights(self, *noise: Tensor) -> Weights:
        return self.alpha.softmax()

    def optimiser(self) -> torch.optim.Optimizer:
        return adam(self.parameters(), self.settings.alpha_lr, self.settings.alpha_weight_decay)

    def strengths(self) -> tuple[Tensor, ...]:
        return self.alpha.strengths()

    def alphas(self) -> list[Tensor]:
        return list(self.parameters())

    def epoch(self, engine: Engine) -> Fields:
        for (x, y), (x_val, y_val) in zip(engine.train(), engine.validation, strict=False):
            x = engine.adversarial(x, y) if self.settings.adversarial else x
            self.descend_alphas(engine, x, y, x_val, y_val)
            engine.descend_weights(x, y)
        return {}

    def descend_alphas(self, engine: Engine, x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> Slope:
        """One step of α on a validation batch; the training batch is for the step ahead."""
        loss = ArchitectureLoss(engine.precision)

        def validation() -> tuple[Tensor, Tensor]:
            return (engine.adversarial(x_val, y_val) if self.settings.adversarial else x_val), y_val

        if self.settings.order == 1:
            slope = engine.slope(loss, validation(), self.parameters())
        else:
            slope = second_order(engine, list(self.parameters()), loss, (x, y), validation)
        engine.descend(slope, self.parameters(), engine.optimiser)
        engine.saw_architecture(slope, y_val)
        return slope

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        """The second order adds the virtual step and the two shifted slopes."""
        assert isinstance(settings, Settings)
        attacks = 2 * iterations if settings.adversarial else 0.0
        return Cost(attacks, iterations * (2 if settings.order == 1 else 5))


def second_order(
    engine: Engine,
    alphas: Sequence[nn.Parameter],
    loss: Objective,
    train: tuple[Tensor, ...],
    validation: Callable[[], tuple[Tensor, ...]],
) -> Slope:
    """The slope of `loss` for `alphas` one step of the weights ahead; `train` are its inputs of the training half, and
    `validation` gives those of the other half, with the weights where they are then."""
    thetas, xi = engine.net.thetas, engine.optimizer.param_groups[0]["lr"]
    with buffers_kept(engine.net):
        now = engine.slope(loss, train, thetas, WEIGHTS)
    step = virtual_step(engine.optimizer, thetas, now.grads, engine.settings.clip)
    with engine.shifted(thetas, step, -xi):
        ahead = engine.slope(loss, validation(), [*alphas, *thetas], WEIGHTS)
    of_alphas, d = ([g.clone() for g in part] for part in (ahead.grads[: len(alphas)], ahead.grads[len(alphas) :]))
    eps = 0.01 / max(float(nn.utils.get_total_norm(d)), 1e-12)
    shifted = []
    for t in (eps, -eps):
        with engine.shifted(thetas, d, t):
            shifted.append([g.clone() for g in engine.slope(loss, train, alphas).grads])
    grads = (g - xi * (p - m) / (2 * eps) for g, p, m in zip(of_alphas, *shifted, strict=True))
    return Slope(ahead.loss, ahead.aux, tuple(grads))


@torch.no_grad()
def virtual_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], clip: float
) -> list[Tensor]:
    """What SGD with momentum would take from the parameters, a learning rate of 1 given: μ·m + clipped ∇ + λ·w."""
    group = optimizer.param_groups[0]
    cut = min(1.0, clip / (float(nn.utils.get_total_norm(grads)) + 1e-6))
    momenta = [optimizer.state[p].get("momentum_buffer") for p in parameters]
    steps = [cut * g + group["weight_decay"] * p for g, p in zip(grads, parameters, strict=True)]
    return [s if m is None else s + group["momentum"] * m for s, m in zip(steps, momenta, strict=True)]
