"""Square Attack: random search with square changes, from the model's answers alone (Andriushchenko et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rnas.attacks.base import Attack
from rnas.attacks.batching import row_limit
from rnas.attacks.checks import check_positive, check_threat, plain_numbers
from rnas.attacks.losses import correct, margin
from rnas.attacks.noise import derived_seed, uniform
from rnas.attacks.norms import Norm, l2, unit
from rnas.compute.freezing import Model
from rnas.errors import RnasError

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the changed share p is halved
OVERHEAD = {"cpu": 5.0, "gpu": 256.0}  # rows that cost about as much as a forward pass costs beside them


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square Attack on the margin, with the schedule of p unrescaled, as AutoAttack runs it.

    The proposals (place, size, signs) of a run are drawn once for all images; the first perturbation, and for l_2 the
    signs, are drawn for each image. An image is left alone once broken; for one that holds, the point of the highest
    loss is returned.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    seed: int | None = None
    rows: int | None = None
    """Most images in one pass while few are left; by default 64 on a CPU (`batching.row_limit`)."""

    black_box: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_numbers(self)
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
                found, standing = self._run(net, x[alive], y[alive], restart, row_limit(x, self.rows))
                result[alive] = found
                alive = alive[standing]
        return result

    def _run(self, net: Model, x: Tensor, y: Tensor, restart: int, rows: int) -> tuple[Tensor, Tensor]:
        """One run: the images of the highest loss found, and which (B,) still stand.

        While images are few, up to `rows` proposals are tried at once: the next ones of each image, of which the first
        improvement is accepted and the later ones are tried again from there, so that the outcome is as one by one.
        """
        proposals, pace = self._proposals(x, restart), _Pace(rows, OVERHEAD["cpu" if x.device.type == "cpu" else "gpu"])
        result, stands = x.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device)
        best = self._start(x, str(restart))
        logits = net(best)
        loss, standing = margin(logits, y), correct(logits, y)
        alive, query = torch.arange(len(x), device=x.device), torch.ones_like(y)  # the query that comes next
        while True:
            going = standing & (query < self.queries)
            if not going.all():
                ended = alive[~going]
                result[ended], stands[ended] = best[~going], standing[~going]
                alive, best, loss, query = (v[going] for v in (alive, best, loss, query))
                if len(alive) == 0:
                    return result, stands
            ahead = pace.ahead(len(alive))
            # Past the last query the last one is tried again, to no effect.
            queries = (query.unsqueeze(1) + torch.arange(ahead, device=x.device)).clamp(max=self.queries - 1)
            at, copies = _repeated(alive, ahead), _repeated(best, ahead)
            proposal = self._proposed(x, at, copies, proposals.take(at, queries.flatten()))
            logits = net(proposal)
            proposed, right = (f(logits, y[at]).view(-1, ahead) for f in (margin, correct))
            accepted = (proposed > loss.unsqueeze(1)) | ~right
            first, some = accepted.int().argmax(1), accepted.any(1)
            row = torch.arange(len(alive), device=x.device) * ahead + first
            loss = torch.where(some, proposed.flatten()[row], loss)
            best[some] = proposal[row[some]]
            standing = right.flatten()[row] | ~some
            tried = torch.where(some, first + 1, ahead)
            query = query + tried
            pace.record(int(tried.sum()), int(some.sum()))

    def _draws(self, x: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        """For every query two places (top, left, top, left) in [0,1), and a sign for each channel and one more."""
        generator = None
        if (seed := derived_seed(self.seed, f"proposals {restart}")) is not None:
            generator = Generator().manual_seed(seed)
        places = torch.rand((self.queries, 4), generator=generator, dtype=torch.float32)
        return places, 2 * torch.randint(0, 2, (self.queries, x.shape[1] + 1), generator=generator) - 1

    def _proposals(self, x: Tensor, restart: int) -> _Proposals:
        """What every query is going to try on the images `x`."""
        channels, height, width = x.shape[1:]
        places, signs = self._draws(x, restart)
        sides = torch.tensor([self.side(query, height, width) for query in range(self.queries)])
        # As the authors' code: below the full size no square touches the last row or column.
        extents = torch.tensor((height, width) * 2) - sides.unsqueeze(1)
        corners = (places.double() * extents).long()
        image_signs = signs[None, :, :-1].to(x.device)
        if self.norm == "l2":  # every image has its own there, as in the authors' code
            image_signs = _signs(uniform(x, self.seed, f"signs {restart}", (self.queries, channels)))
        return _Proposals(
            side=sides.to(x.device),
            corners=corners.to(x.device),
            signs=image_signs.to(torch.int8).expand(len(x), -1, -1),
            turned=(signs[:, -1] > 0).to(x.device),
        )

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

    def _proposed(self, x: Tensor, at: Tensor, best: Tensor, proposals: _Proposals) -> Tensor:
        """What comes of `best` (R,C,H,W), which is overwritten, by a proposal for each row; it belongs to `x[at]`."""
        if self.norm == "l2":
            return self._two_squares(x[at], best, proposals)
        for rows, side in proposals.by_side():
            square = proposals.window(rows, side, 0)
            signs = proposals.signs[rows].view(len(rows), -1, 1, 1).to(x.dtype)
            best[square] = (x[at[rows].view(-1, 1, 1, 1), *square[1:]] + self.eps * signs).clamp_(0, 1)
        return best

    def _two_squares(self, x: Tensor, best: Tensor, proposals: _Proposals) -> Tensor:
        """`best` with what a second square spends of the l_2 budget moved into the first, as a bump (Algorithm 3)."""
        delta, windows = best - x, torch.zeros_like(x)
        free = (self.eps**2 - l2(delta) ** 2).clamp(min=0)
        for rows, side in proposals.by_side():
            first, second = (proposals.window(rows, side, k) for k in (0, 1))
            windows[first], windows[second] = delta[first], delta[second]
            budget = (free[rows] / x.shape[1] + l2(windows[rows]) ** 2).sqrt()
            hill = bump(side, x)
            shape = torch.where(proposals.turned[rows].view(-1, 1, 1, 1), hill.T, hill)
            change = proposals.signs[rows].view(len(rows), -1, 1, 1) * shape + _unit_channels(delta[first])
            delta[second] = 0
            delta[first] = _unit_channels(change) * budget
        return (x + self.eps * unit(delta)).clamp_(0, 1)


@dataclass(frozen=True)
class _Proposals:
    """For every query, or for every row that is tried: the changes, drawn beforehand. Q: queries or rows."""

    side: Tensor
    """Side of the squares in pixels (Q,)."""
    corners: Tensor
    """Top and left of the square, and of a second one for l_2, in pixels (Q,4)."""
    signs: Tensor
    """For each image and channel (B,Q,C), or, of rows, (R,C)."""
    turned: Tensor
    """Whether the bump of l_2 lies on its side (Q,)."""

    def take(self, image: Tensor, query: Tensor) -> _Proposals:
        """Rows (R,): the proposals `query` for the images `image`."""
        return _Proposals(self.side[query], self.corners[query], self.signs[image, query], self.turned[query])

    def by_side(self) -> Iterator[tuple[Tensor, int]]:
        """The rows that have squares of equal side, and that side."""
        for side in sorted(set(self.side.tolist())):
            yield (self.side == side).nonzero().squeeze(1), side

    def window(self, rows: Tensor, side: int, which: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices of images that give square 0 or 1 of the rows: (rows,C,side,side)."""
        reach = torch.arange(side, device=rows.device)
        top, left = self.corners[rows, 2 * which : 2 * which + 2].unbind(1)
        channels = torch.arange(self.signs.shape[-1], device=rows.device)
        down, along = top.unsqueeze(1) + reach, left.unsqueeze(1) + reach
        return rows.view(-1, 1, 1, 1), channels.view(-1, 1, 1), down[:, None, :, None], along[:, None, None, :]


class _Pace:
    """How many queries of each image to try at once.

    Trying k of each of n images costs c + n k rows, c for the pass itself. Where a share a of queries is accepted,
    about k − a k² / 2 of an image's k are not in vain, and such a query costs least at k = √(2c / (n a)).
    """

    def __init__(self, rows: int, overhead: float):
        self.rows, self.overhead = rows, overhead
        self.tried = self.accepted = 0.0

    def ahead(self, images: int) -> int:
        """k for so many images: no more than fill the rows, nor than come before the next acceptance."""
        rate = (self.accepted + 1) / (self.tried + 1)
        best = min(math.sqrt(2 * self.overhead / (images * rate)), 1 / rate)
        return max(min(int(best), self.rows // images), 1)

    def record(self, tried: int, accepted: int) -> None:
        """What came of the last batch; older ones are forgotten little by little."""
        self.tried, self.accepted = 0.9 * self.tried + tried, 0.9 * self.accepted + accepted


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


def _repeated(v: Tensor, times: int) -> Tensor:
    """A copy of `v` in which every row comes `times` times in a row."""
    return v.unsqueeze(1).expand(-1, times, *v.shape[1:]).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _signs(u: Tensor) -> Tensor:
    """±1 from numbers uniform in [0,1)."""
    return torch.where(u < 0.5, -1.0, 1.0).to(u.dtype)
