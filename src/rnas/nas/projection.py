"""Projection of α on {F(α) ≤ H} by the method of multipliers (Eq. 9; Bertsekas 1982, chapter 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rnas.errors import RnasError

ROUND = 5  # gradient steps between two updates of the multiplier
STIFFNESS = 4.0  # penalty times ‖∇g‖²: how much stiffer the augmented term is than ½‖α − α_p‖²
GROWTH = 2.0  # of the stiffness, where a round did not bring the violation down to SUFFICIENT of itself
SUFFICIENT = 0.75
SLOWER, FASTER = 1.5, 0.8  # of the assumed curvature, where two steps oppose each other, and where they agree
EASED = 0.3  # of `lr`, after the planned steps
FALLEN, PATIENCE = 0.999, 3  # F still falls while it is brought under this share of its smallest in so many checks


End = Literal["feasible", "stalled", "steps"]


@dataclass(frozen=True)
class Projection:
    """How a projection went."""

    before: float
    """F."""
    after: float
    multiplier: float
    """Dimensionless: of F/H - 1."""
    distance: float
    """‖α − α_p‖."""
    steps: int
    """Gradient steps made."""
    smallest: float
    """The smallest F that was measured."""
    end: End
    """F ≤ H; or else F no longer fell, or all steps were made."""


def project(
    alphas: Sequence[Tensor],
    gradients: Callable[[float], tuple[Tensor, Sequence[Tensor]]],
    measure: Callable[[], float],
    bound: float,
    *,
    steps: int,
    most: int | None = None,
    lr: float = 0.02,
    margin: float = 1e-4,
    tolerance: float = 1e-5,
    near: float = 0.0,
) -> Projection:
    """Move `alphas`, in place, to the nearest point where F is at most `bound`. # Eq. 9

    `gradients(scale)` is F at the alphas as they are, perhaps on a sample, and the gradients of F / scale; `measure()`
    is the F by which feasibility is judged. Nothing moves if F ≤ H already. It aims at (1 - margin)·H, as a sampled F
    scatters, and lower where the samples' F proves smaller than the measured one.
    Stops early once feasible and stationary (the Lagrangian's gradient is at most `tolerance`) or measured under H by
    at most the share `near`, otherwise after `steps`, if F ≤ H was measured by then; else it goes on until it is, for
    `most` steps in all (by default `steps`) or until F no longer falls. Takes the nearest of the feasible points at
    which it measured, or that of the smallest F.
    No coordinate moves by more than `lr` a step; over the second half of the steps that falls to nothing.
    """
    before = measure()
    if before <= bound:
        return Projection(before, before, 0.0, 0.0, 0, before, "feasible")
    start = [a.detach().clone() for a in alphas]
    target, scale = bound * (1 - margin), bound or 1.0  # g = F/H - 1, and g = F for H = 0
    multiplier, stiffness, violation = 0.0, STIFFNESS, math.inf
    curvature, last_step = 1.0, [torch.zeros_like(a) for a in start]
    reached = Reached(bound, Point(before, 0.0, start))
    checks = max(2 * ROUND, steps // 6)
    for k in range(1, max(steps, most or 0) + 1):
        sampled, pull = gradients(scale)  # F and ∇g
        value = ((sampled - target) / scale).item()  # g
        if not math.isfinite(value):
            raise RnasError(f"F became {value * scale + target} in the projection, step {k}: the weights have diverged")
        penalty = stiffness / max(_dot(pull, pull), 1e-30)
        force = max(0.0, multiplier + penalty * value)  # of the augmented Lagrangian, by g
        slope = [a.detach() - a0 + force * p for a, a0, p in zip(alphas, start, pull, strict=True)]
        step = _newton_step(slope, pull, penalty if force else 0.0, curvature)
        largest = lr * (min(1.0, 2 * (1 - k / steps)) + 1e-3 if k <= steps else EASED)
        length = max(float(s.abs().max()) for s in step)
        step = [s * min(1.0, largest / max(length, 1e-30)) for s in step]
        curvature = max(curvature * (SLOWER if _dot(step, last_step) < 0 else FASTER), 1.0)
        last_step = step
        with torch.no_grad():
            for a, s in zip(alphas, step, strict=True):
                a += s
        if k % ROUND == 0:
            # The multiplier may move once the inner problem is solved (no step was cut), or where it brings no more.
            solved = length <= largest
            stuck = value > (SUFFICIENT if solved else 1.0) * violation  # on its way, every step nearer is enough
            multiplier = force if solved or stuck else multiplier
            stiffness *= GROWTH if solved and stuck else 1.0
            violation = max(value, 0.0)
        stationary = _dot(slope, slope) <= tolerance**2 and abs(value) <= tolerance
        if k % (checks if k < steps else 2 * ROUND) == 0 or k == steps or stationary:
            measured = reached.see(Point(measure(), _distance(alphas, start), [a.detach().clone() for a in alphas]))
            close = stationary or measured >= (1 - near) * bound
            if (close and measured <= bound) or (k >= steps and reached.enough(k - steps)):
                break
            if measured > bound and value <= margin:  # the samples see a smaller F than what is measured: aim lower
                target *= (1 - margin) * bound / measured
    end = reached.point
    with torch.no_grad():
        for a, at in zip(alphas, end.alphas, strict=True):
            a.copy_(at)
    how: End = "feasible" if reached.feasible else "stalled" if reached.stalled else "steps"
    return Projection(before, end.measured, multiplier, end.distance, k, reached.smallest.measured, how)


class Point(NamedTuple):
    """Where F was measured."""

    measured: float
    distance: float
    alphas: list[Tensor]


class Reached:
    """The best of the points at which a projection measured F."""

    def __init__(self, bound: float, first: Point):
        self.bound, self.smallest = bound, first
        self.feasible: Point | None = None
        """The nearest with F ≤ H."""
        self.fell = first.measured
        self.waited = 0

    def see(self, point: Point) -> float:
        """Returns F at it."""
        if point.measured <= self.bound and (self.feasible is None or point.distance < self.feasible.distance):
            self.feasible = point
        if point.measured < self.smallest.measured:
            self.smallest = point
        if self.smallest.measured < FALLEN * self.fell:
            self.fell, self.waited = self.smallest.measured, 0
        else:
            self.waited += 1
        return point.measured

    @property
    def stalled(self) -> bool:
        """Whether F no longer falls."""
        return self.waited >= PATIENCE

    def enough(self, more: int) -> bool:
        """Whether to stop, so many steps after the planned ones: these are what is given to see whether F falls."""
        return self.feasible is not None or (self.stalled and more >= PATIENCE * 2 * ROUND)

    @property
    def point(self) -> Point:
        """What the projection ends at."""
        return self.feasible or self.smallest


def _newton_step(slope: list[Tensor], pull: Sequence[Tensor], penalty: float, curvature: float) -> list[Tensor]:
    """-B⁻¹·slope for B = curvature·I + penalty·∇g∇gᵀ: the augmented Lagrangian's curvature, its rank-one part exact."""
    share = penalty * _dot(pull, slope) / (curvature + penalty * _dot(pull, pull))  # Sherman-Morrison
    return [-(s - share * p) / curvature for s, p in zip(slope, pull, strict=True)]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def _distance(alphas: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(((a.detach() - a0) ** 2).sum()) for a, a0 in zip(alphas, start, strict=True)))
