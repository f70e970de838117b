"""DSRNA (Hosseini, Yang and Xie, CVPR 2021), by the bound on the Jacobian: PC-DARTS, and steady logits.

    |f_k(x+δ) − f_k(x)| ≲ ε‖J_k(x)‖_q, ‖δ‖_p ≤ ε, 1/p + 1/q = 1        R_J = −mean_x (1/K) Σ_k ‖J_k(x)‖_q  # Eq. 13-15
    min_α L_val(w, α) − γ·R_J(w, α), w down L_train                                                          # Eq. 16

J_k is row k of the logits' Jacobian: the gradient of logit k for the image. ∇_α R_J is made of first-order passes
(`Engine.input_term`). The space, α and β, and the cell's derivation are those of `rnas.nas.methods.pc_darts`.

Left out: the certified bound, CNN-Cert's linear bounds through a mixture of operations. The paper does not state it so
that it could be checked line by line, and looser interval bounds under its name would be another method.

The paper leaves open, and what is done here: all K rows are K backward passes, so each step draws `--rows` of them for
each image anew, whose mean is R_J's in expectation (`--rows 10` is all of CIFAR-10's; `--top`, the largest logit alone,
is what the first author's later code does). q is 1, which belongs to an l_inf threat (`--q 2` as in that code). Images
are the normalised ones, as in that code: a pixel's gradient counts times the data's standard deviation, or γ would mean
something else. The term is measured in eval mode, where J_k(x) is the derivative of one image's logit; that code
leaves BN to tie a batch together. From there also: batch, learning rates, first order, and the term from epoch 11 on
(a fifth of a search of another length), while α moves from the first.

Not copied from that code: α drawn with standard deviation 1, a strong prior by chance (1e-3 as elsewhere); one norm for
the whole batch, divided by its size, about 1/sqrt(B) of the mean of the images' norms and led by the steepest of them;
the same term in the weights' loss, of which the paper says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rnas.nas.engine import Engine, Slope
from rnas.nas.methods.base import Cost, Fields, Method, adam
from rnas.nas.methods.pc_darts import EdgeAlphas
from rnas.nas.objectives import ArchitectureLoss, passed
from rnas.nets.space import Shape, Weights
from rnas.settings import Count, Flag, Search, at_least

EPS = {1: 0.1, 2: 1.0}  # how far images are shifted for the slope of the term, by q: a pixel, an image (decision 024)


@dataclass(frozen=True)
class Settings(Search):
    """Search an architecture with DSRNA, by its bound on the Jacobian."""

    method: str = "dsrna"
    """Search method."""
    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch."""
    lr: float = 0.025
    """Learning rate of the weights at the start; it falls along a cosine."""
    lr_min: float = 0.001
    """Learning rate at the end."""
    gamma: float = 0.01
    """γ: factor of the Jacobian's norm."""
    q: Literal[1, 2] = 1
    """Norm of the Jacobian's rows: 1 bounds what an l_inf perturbation does to a logit, 2 an l_2 one."""
    rows: int = 1
    """Logits whose gradients are measured, drawn anew for each image in each step."""
    top: Flag = False
    """Measure the gradient of each image's largest logit instead."""
    warmup: Count = None
    """Epochs without the Jacobian's norm; by default a fifth, 10 of 50."""
    part: int = 4
    """One in so many channels goes through the operations, as in PC-DARTS."""
    alpha_lr: float = 3e-4
    """Learning rate of α and of the edge weights β (Adam)."""
    alpha_weight_decay: float = 1e-3
    """Weight decay of α and β."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "part", "rows")
        at_least(self, 0, "gamma", "warmup", "alpha_lr", "alpha_weight_decay")

    @property
    def plain(self) -> int:
        """Epochs without the term."""
        return self.epochs // 5 if self.warmup is None else self.warmup


class Dsrna(Method):
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
        seen = []
        for (x, y), (x_val, y_val) in zip(engine.train(), engine.validation, strict=False):
            seen.append(self.descend_alphas(engine, x_val, y_val))
            engine.descend_weights(x, y)
        counted = [term for term in seen if term is not None]
        return {"jacobian": float(torch.stack(counted).mean()) if counted else None}

    def descend_alphas(self, engine: Engine, x: Tensor, y: Tensor) -> Tensor | None:
        """One step of α and β on a validation batch; −R_J of it, if it counts yet."""
        s, term = self.settings, None
        if engine.epoch > s.plain:
            term = jacobian_norm(engine, x, self.rows(engine, x), list(self.parameters()), s.q)
        slope = engine.slope(ArchitectureLoss(engine.precision), (x, y), self.parameters())
        slope = slope if term is None else slope.plus(s.gamma, term)
        engine.descend(slope, self.parameters(), engine.optimiser)
        engine.saw_architecture(slope, y)
        return None if term is None else term.loss

    def rows(self, engine: Engine, x: Tensor) -> Tensor:
        """(B,n): the logits of each image that are to be steady."""
        engine.net.eval()
        with torch.no_grad():
            logits = engine.logits(x)
        engine.net.train()
        if self.settings.top:
            return logits.argmax(1, keepdim=True)
        order = torch.rand(logits.shape, generator=engine.generator).argsort(1)
        return order[:, : self.settings.rows].to(x.device)

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        """Images as they are; of the term one gradient for the images and two for α, for each row."""
        assert isinstance(settings, Settings)
        rows = 0 if epoch <= settings.plain else 1 if settings.top else settings.rows
        return Cost(attacks=0.0, passes=iterations * (2 + 3 * rows))


def jacobian_norm(
    engine: Engine, x: Tensor, rows: Tensor, parameters: list[nn.Parameter], q: int, eps: float | None = None
) -> Slope:
    """The mean over images `x` (B,3,H,W) and their `rows` (B,n) of ‖J_k‖_q for normalised images; its slope."""
    images = x.repeat_interleave(rows.shape[1], 0)
    norm: Literal["l1", "l2"] = "l1" if q == 1 else "l2"
    std = engine.net.normalize.std
    eps = EPS[q] if eps is None else eps
    return engine.input_term(Logit(), [(1.0, images)], rows.flatten(), parameters, norm=norm, scale=std, eps=eps)


@dataclass(frozen=True)
class Logit:
    """One logit of each image."""

    def __call__(self, net: nn.Module, /, x: Tensor, y: Tensor, *noise: Tensor) -> Tensor:
        """(B,), from `x` (B,3,H,W) and the logits' numbers `y` (B,)."""
        return passed(net, x, noise=noise).gather(1, y[:, None])[:, 0]
