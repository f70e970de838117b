"""Auto-PGD: gradient ascent with momentum that chooses its own step size (Croce & Hein 2020, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rnas.attacks.base import Attack
from rnas.attacks.batching import survivors_only, without_fallen
from rnas.attacks.checks import check_classes, check_positive, check_threat, plain_numbers
from rnas.attacks.losses import correct, cross_entropy, dlr, margin, ranked, targeted_dlr
from rnas.attacks.noise import normal, uniform
from rnas.attacks.norms import Norm, project, steepest, unit
from rnas.compute.freezing import Model
from rnas.errors import unknown

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits (B,K), labels (B,), targets (B,) to the loss to ascend (B,)."""

OBJECTIVES: dict[str, Objective] = {
    "ce": lambda logits, y, target: cross_entropy(logits, y),
    "margin": lambda logits, y, target: margin(logits, y),
    "dlr": lambda logits, y, target: dlr(logits, y),
    "dlr-targeted": targeted_dlr,
}
MOMENTUM = 0.75
RHO = 0.75  # an interval in which the loss rose in no more than this share of its steps is an oscillation


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD on the cross-entropy, the margin, the DLR loss, or the targeted DLR loss ("dlr-targeted": APGD-T).

    `restarts` random starts for each image, or, when targeted, for each of the `targets` classes that the clean image
    is nearest to. An image is broken by any iterate and then left alone; for one that holds, the iterate of the highest
    loss is returned. `random_start=False` starts at the image.
    """

    eps: float = 8 / 255
    loss: Literal["ce", "margin", "dlr", "dlr-targeted"] = "ce"
    norm: Norm = "linf"
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    random_start: bool = True
    seed: int | None = None
    rows: int | None = None
    """Most images in one pass while few are left; by default 64 on a CPU (`batching.row_limit`)."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_threat(self.eps, self.norm)
        check_positive("APGD", steps=self.steps, restarts=self.restarts, targets=self.targets)
        if self.loss not in OBJECTIVES:
            raise unknown("loss", self.loss, OBJECTIVES)

    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images; inputs unchecked, `net` frozen. RnasError if the loss needs more classes."""
        with torch.no_grad():
            logits = net(x)
        if "dlr" in self.loss:
            check_classes(logits, 3, f"APGD's loss {self.loss}")
        targets = ranked(logits, y, self.targets) if self.loss == "dlr-targeted" else y.unsqueeze(1)
        jobs = [(rank, restart) for rank in range(targets.shape[1]) for restart in range(self.restarts)]

        def run(alive: Tensor, jobs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            rows = alive.repeat(len(jobs))
            start = torch.cat([self._start(x[alive], f"{rank} {restart}") for rank, restart in jobs])
            target = torch.cat([targets[alive, rank] for rank, _ in jobs])
            return self._run(net, x[rows], y[rows], target, start, together=len(jobs))

        return survivors_only(x, correct(logits, y).nonzero().squeeze(1), jobs, run, self.rows)

    def _start(self, x: Tensor, salt: str) -> Tensor:
        """A random point on the surface of the ball, as in the authors' code."""
        if not self.random_start:
            return x
        if self.norm == "linf":
            t = 2 * uniform(x, self.seed, salt) - 1
            return (x + self.eps * t / t.abs().amax((1, 2, 3), keepdim=True)).clamp_(0, 1)
        return (x + self.eps * unit(normal(x, self.seed, salt))).clamp_(0, 1)

    def _run(
        self, net: Model, x: Tensor, y: Tensor, target: Tensor, start: Tensor, together: int = 1
    ) -> tuple[Tensor, Tensor]:
        """One run: images (B,C,H,W), adversarial where one was found; and which rows (B,) still stand.

        With `together` the rows are so many runs of the same images, one block after the other; an image's other rows
        are given up once one of them has fallen.
        """
        result, alive = start.clone(), torch.arange(len(x), device=x.device)
        stands = torch.ones(len(x), dtype=torch.bool, device=x.device)
        state = _State.start(net, x, y, target, start, OBJECTIVES[self.loss], 2 * self.eps)
        checkpoints = Checkpoints(self.steps)
        for i in range(self.steps + 1):
            standing = correct(state.logits, state.y)
            if not standing.all():
                fallen = alive[~standing]
                result[fallen], stands[fallen] = state.x_adv[~standing], False
                keep = without_fallen(standing, together)
                alive, state = alive[keep], state.take(keep)
                if len(alive) == 0:
                    break
            if i == self.steps:
                break
            if checkpoints.due(i):
                state.adapt_step(checkpoints.interval)
                checkpoints.advance()
            state.ascend(net, OBJECTIVES[self.loss], self.eps, self.norm, first=i == 0, last=i == self.steps - 1)
        result[alive] = state.x_best
        return result, stands


class Checkpoints:
    """After which iterations steps may be halved: p_0 = 0, p_1 = 0.22, p_j+1 = p_j + max(p_j − p_j−1 − 0.03, 0.06)."""

    def __init__(self, steps: int):
        self.interval = max(int(0.22 * steps), 1)
        self.shrink = max(int(0.03 * steps), 1)
        self.least = max(int(0.06 * steps), 1)
        self.next = self.interval

    def due(self, done: int) -> bool:
        """Whether a checkpoint comes after `done` iterations."""
        return done == self.next

    def advance(self) -> None:
        """Fix the next checkpoint."""
        self.interval = max(self.interval - self.shrink, self.least)
        self.next += self.interval


@dataclass
class _State:
    """Every image of a run with all that is remembered of it; each field is (B,...)."""

    x: Tensor
    y: Tensor
    target: Tensor
    x_adv: Tensor
    x_before: Tensor
    gradient: Tensor
    logits: Tensor
    loss: Tensor
    rises: Tensor  # steps of this interval in which the loss rose
    step: Tensor  # (B,1,1,1)
    halved: Tensor  # whether the last checkpoint halved the step
    x_best: Tensor
    gradient_best: Tensor
    loss_best: Tensor
    loss_best_before: Tensor  # at the last checkpoint

    @staticmethod
    def start(
        net: Model, x: Tensor, y: Tensor, target: Tensor, start: Tensor, objective: Objective, step: float
    ) -> _State:
        gradient, logits, loss = _differentiate(net, start, y, target, objective)
        return _State(
            x=x,
            y=y,
            target=target,
            x_adv=start,
            x_before=start,
            gradient=gradient,
            logits=logits,
            # As the authors' code, and so every published figure: the first step's loss is compared with 0.
            loss=torch.zeros_like(loss),
            rises=torch.zeros_like(loss),
            step=torch.full_like(loss, step).view(-1, 1, 1, 1),
            halved=torch.ones_like(y, dtype=torch.bool),
            x_best=start.clone(),
            gradient_best=gradient.clone(),
            loss_best=loss.clone(),
            loss_best_before=loss.clone(),
        )

    def take(self, keep: Tensor) -> _State:
        """The images that `keep` (B,) selects."""
        return _State(**{name: value[keep] for name, value in vars(self).items()})

    def ascend(self, net: Model, objective: Objective, eps: float, norm: Norm, first: bool, last: bool) -> None:
        """One step with momentum; after the `last` one no gradient is needed."""
        moved = self.x_adv - self.x_before
        self.x_before = self.x_adv
        step = project(self.x_adv + self.step * steepest(self.gradient, norm), self.x, eps, norm)
        a = 1.0 if first else MOMENTUM
        self.x_adv = project(self.x_adv + a * (step - self.x_adv) + (1 - a) * moved, self.x, eps, norm)
        before = self.loss
        if last:
            with torch.no_grad():
                self.logits = net(self.x_adv)
                self.loss = objective(self.logits, self.y, self.target)
        else:
            self.gradient, self.logits, self.loss = _differentiate(net, self.x_adv, self.y, self.target, objective)
        self.rises = self.rises + (self.loss > before)
        better = self.loss > self.loss_best
        self.loss_best = torch.where(better, self.loss, self.loss_best)
        better = better.view(-1, 1, 1, 1)
        self.x_best = torch.where(better, self.x_adv, self.x_best)
        self.gradient_best = torch.where(better, self.gradient, self.gradient_best)

    def adapt_step(self, interval: int) -> None:
        """Halve the steps that oscillate or gained nothing and go back to the best point (Conditions 1 and 2)."""
        oscillates = self.rises <= RHO * interval
        stalled = ~self.halved & (self.loss_best_before >= self.loss_best)
        self.halved = oscillates | stalled
        self.loss_best_before = self.loss_best
        self.rises = torch.zeros_like(self.rises)
        halved = self.halved.view(-1, 1, 1, 1)
        self.step = torch.where(halved, self.step / 2, self.step)
        self.x_adv = torch.where(halved, self.x_best, self.x_adv)
        self.gradient = torch.where(halved, self.gradient_best, self.gradient)


def _differentiate(
    net: Model, x_adv: Tensor, y: Tensor, target: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient (B,C,H,W), logits (B,K) and loss (B,) at `x_adv`, all detached."""
    with torch.enable_grad():
        x_adv = x_adv.detach().requires_grad_()
        logits = net(x_adv)
        loss = objective(logits, y, target)
        (gradient,) = torch.autograd.grad(loss.sum(), x_adv)
    return gradient, logits.detach(), loss.detach()
