"""Targeted Fast Adaptive Boundary (FAB-T): the nearest points across class boundaries (Croce & Hein 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnas.attacks.base import Attack
from rnas.attacks.batching import survivors_only, without_fallen
from rnas.attacks.checks import check_positive, check_threat, plain_numbers
from rnas.attacks.losses import correct, of, ranked
from rnas.attacks.noise import normal, uniform
from rnas.attacks.norms import Norm, distance, unit
from rnas.compute.freezing import Model

NEWTON_STEPS = 50  # far more than are ever needed: about 8 are


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """FAB-T: for each of the `targets` nearest classes, `steps` projections onto the linearised boundary.

    Images are returned as they are unless an adversarial point within `eps` was found, which ends their search. The
    first of `restarts` starts at the image, later ones at random points around it.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    seed: int | None = None
    rows: int | None = None
    """Most images in one pass while few are left; by default 64 on a CPU (`batching.row_limit`)."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_threat(self.eps, self.norm)
        check_positive(
            "FAB",
            steps=self.steps,
            restarts=self.restarts,
            targets=self.targets,
            alpha_max=self.alpha_max,
            eta=self.eta,
            beta=self.beta,
        )

    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images; inputs unchecked, `net` frozen."""
        with torch.no_grad():
            logits = net(x)
        targets = ranked(logits, y, self.targets)
        jobs = [(rank, restart) for restart in range(self.restarts) for rank in range(targets.shape[1])]

        def run(alive: Tensor, jobs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            x_alive, rows = x[alive], alive.repeat(len(jobs))
            start = torch.cat([self._start(x_alive, f"{rank} {r}") if r else x_alive for rank, r in jobs])
            target = torch.cat([targets[alive, rank] for rank, _ in jobs])
            nearest, reached = self.nearest(net, x[rows], y[rows], target, start, enough=self.eps, together=len(jobs))
            standing = reached > self.eps
            return torch.where(standing.view(-1, 1, 1, 1), x[rows], nearest), standing

        return survivors_only(x, correct(logits, y).nonzero().squeeze(1), jobs, run, self.rows)

    def _start(self, x: Tensor, salt: str) -> Tensor:
        if self.norm == "linf":
            t = 2 * uniform(x, self.seed, salt) - 1
            t = t / t.abs().amax((1, 2, 3), keepdim=True)
        else:
            t = unit(normal(x, self.seed, salt))
        return (x + 0.5 * self.eps * t).clamp_(0, 1)

    def nearest(
        self,
        net: Model,
        x: Tensor,
        y: Tensor,
        target: Tensor,
        start: Tensor,
        enough: float = 0.0,
        together: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The nearest adversarial points found (B,C,H,W) and their distances (B,), infinite where there is none.

        `target` (B,) are the classes whose boundary is approached from the points `start`. An image's search ends once
        its distance is at most `enough`. With `together` the rows are so many searches around the same images, one
        block after the other, and the first of them to end ends an image's others.
        """
        result, reached = x.clone(), torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
        alive, x1 = torch.arange(len(x), device=x.device), start
        plane = _linearised(*_forward(net, x1, y, target)[:2])
        for step in range(self.steps):
            x1 = self._step(x, x1, *plane)
            leaf, difference, right = _forward(net, x1, y, target)
            gap = distance(x1, x, self.norm)
            better = ~right & (gap < reached[alive])
            result[alive[better]] = x1[better]
            reached[alive[better]] = gap[better]
            if step == self.steps - 1:
                break
            x1 = torch.where(right.view(-1, 1, 1, 1), x1, x + self.beta * (x1 - x))
            # The forward pass that told right from wrong also gives the next plane, unless the point was drawn back.
            if int(right.sum()) * 2 > len(right):
                plane = _linearised(leaf, difference)
                if not right.all():
                    drawn = _linearised(*_forward(net, x1[~right], y[~right], target[~right])[:2])
                    for part, new in zip(plane, drawn, strict=True):
                        part[~right] = new
            else:
                plane = _linearised(*_forward(net, x1, y, target)[:2])
            going = reached[alive] > enough
            if not going.all():
                keep = without_fallen(going, together)
                alive, x, x1, y, target = alive[keep], x[keep], x1[keep], y[keep], target[keep]
                plane = plane[0][keep], plane[1][keep]
                if len(alive) == 0:
                    break
        return result, reached

    def _step(self, x: Tensor, x1: Tensor, difference: Tensor, w: Tensor) -> Tensor:
        """From `x1` across the plane difference + ⟨w, · − x1⟩ = 0, drawn towards the image `x`."""
        d1 = projection(x1, w, -difference, self.norm)
        d0 = projection(x, w, (w * (x1 - x)).sum((1, 2, 3)) - difference, self.norm)
        zero = torch.zeros_like(x1)
        r1 = distance(d1, zero, self.norm).clamp(min=1e-8)
        r0 = distance(d0, zero, self.norm).clamp(min=1e-8)
        alpha = (r1 / (r1 + r0)).clamp(max=self.alpha_max).view(-1, 1, 1, 1)
        return ((1 - alpha) * (x1 + self.eta * d1) + alpha * (x + self.eta * d0)).clamp_(0, 1)


def _forward(net: Model, x1: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The points as a leaf, z_t − z_y there (B,) with its graph, and which of them (B,) are classified correctly."""
    with torch.enable_grad():
        leaf = x1.detach().requires_grad_()
        logits = net(leaf)
        return leaf, of(logits, target) - of(logits, y), correct(logits.detach(), y)


def _linearised(leaf: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """The boundary as seen from `leaf`: `difference` (B,), detached, and its gradient (B,C,H,W)."""
    (w,) = torch.autograd.grad(difference, leaf, torch.ones_like(difference))
    return difference.detach(), w


def projection(t: Tensor, w: Tensor, rise: Tensor, norm: Norm) -> Tensor:
    """The smallest d with ⟨w, d⟩ = `rise` (B,) and t + d in [0,1]; all (B,...). Out of reach: the nearest corner.

    Coordinate i moves by min(λ uᵢ, cᵢ) towards the face at distance cᵢ, with uᵢ = 1 (l_inf) or |wᵢ| (l_2). What is
    gained, φ(λ) = Σ |wᵢ| min(λ uᵢ, cᵢ), is concave and piecewise linear, so Newton's method from λ = 0 climbs to the
    root without overshooting and ends after finitely many steps; no sorting is needed.
    """
    shape, t, w = t.shape, t.flatten(1), w.flatten(1)
    direction = w.sign() * rise.sign().unsqueeze(1)
    slope = w.abs()
    room = torch.where(direction > 0, 1 - t, t)
    speed = torch.ones_like(slope) if norm == "linf" else slope
    rate, wanted = slope * speed, rise.abs()
    limit = room / speed.clamp(min=torch.finfo(t.dtype).tiny)  # the λ at which a coordinate reaches its face
    travel = torch.zeros_like(wanted)
    gained = torch.zeros_like(wanted)
    tolerance = 4 * torch.finfo(t.dtype).eps * wanted
    for _ in range(NEWTON_STEPS):
        moving = (rate * (limit > travel.unsqueeze(1))).sum(1)
        if not ((wanted - gained > tolerance) & (moving > 0)).any():
            break
        # Where nothing moves any more, the plane is out of reach: the largest λ (∞ · 0 is no number), the corner.
        travel = torch.where(moving > 0, travel + (wanted - gained).clamp(min=0) / moving, torch.finfo(t.dtype).max)
        gained = (slope * torch.minimum(travel.unsqueeze(1) * speed, room)).sum(1)
    return (direction * torch.minimum(travel.unsqueeze(1) * speed, room)).view(shape)
