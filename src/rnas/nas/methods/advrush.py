"""AdvRush (Mok et al., ICCV 2021): DARTS that prefers architectures with a smooth loss around the images.

    L_λ = mean_x ‖Hz‖ ≈ mean_x ‖∇L(x + hz) − ∇L(x)‖₂, z = sign(∇L(x)) / ‖sign(∇L(x))‖₂        # Eq. 9, 10
    min_α L_val(w, α) + γ·L_λ(w, α), w down L_train

α descends on L_val alone for 50 of 60 epochs; first order, the weights' loss has no such term. ∇_α L_λ is made of
first-order passes (`Engine.input_term`).

From the authors' code where the paper says less: the difference is neither squared (`--square`) nor divided by h, and
counts 4-fold, CURE's λ; the network is in eval mode for it, so that images do not know of each other; h rises from 0 to
1.5 in the first 5 epochs of a search, and so is 1.5 whenever it counts. There images are normalised: here a pixel moves
by h·std of its channel, and its gradient counts times std, or h and γ would mean something else. In a search of
another length than 60 epochs 50 and 5 are in proportion.

Not copied from that code, read line by line: no halves, both losses over all 50,000 images, and α's step always on the
first 32 of them (here halves, seeded and shuffled); a gradient of the eval-mode loss left in α's `.grad` from finding
z, up to 32 times as large as it should be, beside which L_λ hardly counts; eval mode left on for the weights' steps.
If the published cell came out of that code, another method found it than the one that the paper and this file describe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnas.nas.engine import Engine, Slope
from rnas.nas.methods.base import Alphas, Cost, Fields, Method, adam
from rnas.nas.objectives import ArchitectureLoss, ImageCrossEntropy, ImageLoss
from rnas.nets.space import Shape, Weights
from rnas.settings import Count, Flag, Search, at_least

CURE = 4.0  # the factor of the term in the code that AdvRush takes it from
EPS = 1.0  # how far images are shifted for the slope of the term: l2 length (docs/decisions/024)


@dataclass(frozen=True)
class Settings(Search):
    """Search an architecture with AdvRush."""

    method: str = "advrush"
    """Search method."""
    batch_size: int = 32
    """Images in a batch."""
    lr: float = 0.025
    """Learning rate of the weights at the start; it falls along a cosine."""
    lr_min: float = 0.001
    """Learning rate at the end."""
    gamma: float = 0.01
    """γ: factor of the loss's curvature, which is counted 4-fold as in the authors' code."""
    h: float = 1.5
    """How far along the steepest direction the gradient is compared: l2 length for normalised images."""
    square: Flag = False
    """Square the difference of the gradients."""
    warmup: Count = None
    """Epochs without the curvature; by default five sixths, the paper's 50 of 60."""
    ramp: Count = None
    """Epochs from the first in which h rises from 0; by default a twelfth, 5 of 60."""
    alpha_lr: float = 3e-4
    """Learning rate of the architecture weights α (Adam)."""
    alpha_weight_decay: float = 1e-3
    """Weight decay of α."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "gamma", "h", "warmup", "ramp", "alpha_lr", "alpha_weight_decay")

    @property
    def plain(self) -> int:
        """Epochs without the term."""
        return 5 * self.epochs // 6 if self.warmup is None else self.warmup

    def reach(self, epoch: int) -> float:
        """h in an epoch (from 1)."""
        ramp = self.epochs // 12 if self.ramp is None else self.ramp
        return self.h * min(1.0, (epoch - 1) / ramp) if ramp else self.h


class AdvRush(Method):
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
        seen = []
        for (x, y), (x_val, y_val) in zip(engine.train(), engine.validation, strict=False):
            seen.append(self.descend_alphas(engine, x_val, y_val))
            engine.descend_weights(x, y)
        counted = [term for term in seen if term is not None]
        return {"curvature": float(torch.stack(counted).mean()) if counted else None}

    def descend_alphas(self, engine: Engine, x: Tensor, y: Tensor) -> Tensor | None:
        """One step of α on a validation batch; the curvature L_λ there, if it counts yet."""
        s, term = self.settings, None
        if engine.epoch > s.plain:
            h = s.reach(engine.epoch)
            term = curvature(engine, ImageCrossEntropy(), x, y, list(self.parameters()), h, s.square)
        slope = engine.slope(ArchitectureLoss(engine.precision), (x, y), self.parameters())
        slope = slope if term is None else slope.plus(CURE * s.gamma, term)
        engine.descend(slope, self.parameters(), engine.optimiser)
        engine.saw_architecture(slope, y)
        return None if term is None else term.loss

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        """Images as they are; of the term three gradients for the images and four for α."""
        assert isinstance(settings, Settings)
        return Cost(attacks=0.0, passes=iterations * (2 if epoch <= settings.plain else 9))


def curvature(
    engine: Engine,
    loss: ImageLoss,
    x: Tensor,
    y: Tensor,
    parameters: list[nn.Parameter],
    h: float,
    squared: bool = False,
    eps: float = EPS,
) -> Slope:
    """The mean over images `x` (B,3,H,W) of ‖∇ℓ(x + hz) − ∇ℓ(x)‖₂ for normalised images; its slope."""
    std = engine.net.normalize.std
    sign = engine.input_gradient(loss, x, y).sign()
    length = sign.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    terms = [(1.0, x + h * std * sign / length), (-1.0, x)]
    return engine.input_term(loss, terms, y, parameters, squared=squared, scale=std, eps=eps)
