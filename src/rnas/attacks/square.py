"""Square Attack: random search with square changes, from the model's answers alone (Andriushchenko et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rnas.attacks.base import checked
from rnas.attacks.checks import check_positive, check_threat
from rnas.attacks.losses import correct, margin
from rnas.attacks.noise import derived_seed, uniform
from rnas.attacks.norms import Norm, l2, unit
from rnas.errors import RnasError
from rnas.frozen import Model

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the changed share p is halved


@dataclass(frozen=True, kw_only=True)
class Square:
    """Square Attack on the margin, with the schedule of p unrescaled, as AutoAttack runs it.

    The proposals (place, size, signs) of a run are drawn once for all images; the first perturbation is drawn for each
    image. An image is left alone once broken; for one that holds, the point of the highest loss is returned.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        check_threat(self.eps, self.norm)
        check_positive("Square", queries=self.queries, p_init=self.p_init, restarts=self.restarts)
        if self.p_init > 1:
            raise RnasError(f"Square's p_init is {self.p_init:g}: expected a share of the pixels, at most 1")

    def share(self, query: int) -> float:
        """p: the share of the pixels that query number `query` changes."""
        return self.p_init / float(2 ** sum(query > limit for limit in HALVINGS))

    def side(self, query: int, height: int, width: int) -> int:
        """Side of the square that query number `query` changes, in pixels; odd and 3 at least for l_2."""
        side = max(round(math.sqrt(self.share(query) * height * width)), 1)
        if self.norm == "l2":
            side = max(side, 3) | 1
        return min(side, height, width)

    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images; inputs unchecked, `net` frozen."""
        with torch.no_grad():
            alive = correct(net(x), y).nonzero().squeeze(1)
            result = x.clone()
            for restart in range(self.restarts):
                if len(alive) == 0:
                    break
                found, standing = self._run(net, x[alive], y[alive], restart)
                result[alive] = found
                alive = alive[standing]
        return result

    def _run(self, net: Model, x: Tensor, y: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        """One run: the images of the highest loss found, and which (B,) still stand."""
        result, alive = x.clone(), torch.arange(len(x), device=x.device)
        height, width = x.shape[2:]
        places, signs = self._proposals(x, restart)
        best = self._start(x, str(restart))
        logits = net(best)
        loss = margin(logits, y)
        standing = correct(logits, y)
        for query in range(1, self.queries + 1):
            if not standing.all():
                result[alive[~standing]] = best[~standing]
                alive, x, y, best, loss = (v[standing] for v in (alive, x, y, best, loss))
            if query == self.queries or len(alive) == 0:
                break
            side = self.side(query, height, width)
            # As the authors' code: below the full size no square touches the last row or column.
            corners = [int(u * (extent - side)) for u, extent in zip(places[query], (height, width) * 2, strict=True)]
            change = self._square if self.norm == "linf" else self._two_squares
            proposal = change(x, best, side, corners, signs[query])
            logits = net(proposal)
            proposed = margin(logits, y)
            standing = correct(logits, y)
            accepted = (proposed > loss) | ~standing
            loss = torch.where(accepted, proposed, loss)
            best = torch.where(accepted.view(-1, 1, 1, 1), proposal, best)
        result[alive] = best
        standing = torch.zeros(len(result), dtype=torch.bool, device=x.device)
        standing[alive] = True
        return result, standing

    def _proposals(self, x: Tensor, restart: int) -> tuple[list[list[float]], Tensor]:
        """For every query two places (top, left, top, left) in [0,1), and a sign for each channel and one more."""
        generator = None
        if (seed := derived_seed(self.seed, f"proposals {restart}")) is not None:
            generator = Generator().manual_seed(seed)
        places = torch.rand((self.queries, 4), generator=generator).tolist()
        signs = 2.0 * torch.randint(0, 2, (self.queries, x.shape[1] + 1), generator=generator) - 1.0
        return places, signs.to(x.device, x.dtype)

    def _start(self, x: Tensor, salt: str) -> Tensor:
        """l_inf: vertical stripes of ±ε. l_2: a grid of 5 x 5 bumps of random signs, scaled to ε."""
        channels, height, width = x.shape[1:]
        if self.norm == "linf":
            return (x + self.eps * _signs(uniform(x, self.seed, salt, (channels, 1, width)))).clamp_(0, 1)
        side = max(min(height, width) // 5, 1)
        tiles_h, tiles_w = height // side, width // side
        signs = _signs(uniform(x, self.seed, salt, (channels, tiles_h, tiles_w)))
        bumps = torch.kron(signs, bump(side, x)[None, None])
        delta = torch.zeros_like(x)
        top, left = (height - side * tiles_h) // 2, (width - side * tiles_w) // 2
        delta[:, :, top : top + side * tiles_h, left : left + side * tiles_w] = bumps
        return (x + self.eps * unit(delta)).clamp_(0, 1)

    def _square(self, x: Tensor, best: Tensor, side: int, corners: list[int], signs: Tensor) -> Tensor:
        """`best` with one square set to x ± ε, one sign for each channel."""
        top, left = corners[:2]
        proposal = best.clone()
        square = (..., slice(top, top + side), slice(left, left + side))
        proposal[square] = (x[square] + self.eps * signs[:-1].view(-1, 1, 1)).clamp_(0, 1)
        return proposal

    def _two_squares(self, x: Tensor, best: Tensor, side: int, corners: list[int], signs: Tensor) -> Tensor:
        """`best` with what a second square spends of the l_2 budget moved into the first, as a bump (Algorithm 3)."""
        top, left, top2, left2 = corners
        delta = best - x
        first = (..., slice(top, top + side), slice(left, left + side))
        second = (..., slice(top2, top2 + side), slice(left2, left2 + side))
        windows = torch.zeros_like(delta)
        windows[first] = delta[first]
        windows[second] = delta[second]
        spent = l2(windows)
        free = (self.eps**2 - l2(delta) ** 2).clamp(min=0)
        shape = bump(side, x)
        if signs[-1] > 0:
            shape = shape.T
        change = signs[:-1].view(-1, 1, 1) * shape + _unit_channels(delta[first])
        change = _unit_channels(change) * (free / x.shape[1] + spent**2).sqrt()
        delta[second] = 0
        delta[first] = change
        return (x + self.eps * unit(delta)).clamp_(0, 1)

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (B,C,H,W) for `x` in [0,1] and labels `y` (B,). RnasError on bad input."""
        return checked(self, model, x, y)


def bump(side: int, like: Tensor) -> Tensor:
    """The l_2 perturbation (side,side) of unit norm: a hill above, a valley below (the paper's η, §4.2)."""
    delta = torch.zeros((side, side), device=like.device, dtype=like.dtype)
    half = side // 2
    if half:
        delta[:half] = _hill(half, side, like)
    delta[half:] = -_hill(side - half, side, like)
    return delta / torch.linalg.vector_norm(delta)  # type: ignore[no-any-return]


def _hill(height: int, width: int, like: Tensor) -> Tensor:
    """A rectangle of unit norm that falls off with the Chebyshev distance q from its centre: Σ_{k>q} 1/k²."""
    rows = (torch.arange(height, device=like.device) - height // 2).abs()
    columns = (torch.arange(width, device=like.device) - width // 2).abs()
    q = torch.maximum(rows[:, None], columns[None, :])
    levels = max(height, width) // 2 + 1
    terms = 1 / torch.arange(1, levels + 1, device=like.device, dtype=like.dtype) ** 2
    hill = terms.flip(0).cumsum(0).flip(0)[q]
    return hill / torch.linalg.vector_norm(hill)  # type: ignore[no-any-return]


def _unit_channels(v: Tensor) -> Tensor:
    """Every channel of `v` (B,C,h,w) divided by its own norm."""
    return v / (torch.linalg.vector_norm(v, dim=(2, 3), keepdim=True) + 1e-12)  # type: ignore[no-any-return]


def _signs(u: Tensor) -> Tensor:
    """±1 from numbers uniform in [0,1)."""
    return torch.where(u < 0.5, -1.0, 1.0).to(u.dtype)
