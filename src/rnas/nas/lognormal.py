"""Log-normal variables: products are exact, a sum becomes the log-normal of the same mean and variance.

The latter is Fenton's and Wilkinson's approximation (Fenton 1960). In logarithms throughout, so that a network's
Lipschitz constant may be as large as it likes, and ln 0 = -∞ is a term that adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor


class LogNormal(NamedTuple):
    """Variables whose logarithms are normal; of one shape, or of shapes that broadcast."""

    m: Tensor
    """Mean of the logarithm."""
    s2: Tensor
    """Its variance, above 0."""

    @property
    def log_mean(self) -> Tensor:
        """ln E."""
        return self.m + self.s2 / 2

    def times(self, other: LogNormal) -> LogNormal:
        """The product with variables that are independent of these."""
        return LogNormal(self.m + other.m, self.s2 + other.s2)


def added(terms: LogNormal, dim: int | tuple[int, ...] = -1) -> LogNormal:
    """The sum along `dim` of variables that are independent of each other."""
    log_mean = terms.log_mean.logsumexp(dim)
    log_variance = (2 * terms.log_mean + terms.s2.expm1().log()).logsumexp(dim)
    s2 = F.softplus(log_variance - 2 * log_mean)  # ln(1 + V/E²)
    return LogNormal(log_mean - s2 / 2, s2)


def node(alpha: LogNormal, beta: LogNormal, correlated: bool = True) -> LogNormal:
    """(...), Σ_i β_i Σ_o α_io: `alpha` (...,edges,operations), `beta` (edges,).

    The terms of an edge share its β, which `correlated` counts; or else all terms pass for independent.
    """
    if correlated:
        return added(added(alpha).times(beta))
    return added(alpha.times(LogNormal(*(t.unsqueeze(-1) for t in beta))), (-2, -1))


Kind = tuple[LogNormal, LogNormal, Tensor]
"""Of a kind of cell: α (edges,operations), β (edges,), ln λ_o of its cells (cells,edges,operations)."""


def network(kinds: Iterable[Kind], nodes: int, correlated: bool = True) -> tuple[Tensor, Tensor]:
    """μ, σ of ln Π_cells Π_nodes Σ_i β_i Σ_o α_io λ_o, for cells of so many nodes.

    A node of one cell and the same node of another cell of its kind are made of the same α and β: `correlated` adds
    their σ, or else their σ² are added as those of independent nodes are.
    """
    m, s2 = [], []
    for alpha, beta, log_lambda in kinds:
        for rows in edges_of_nodes(nodes):
            stretched = LogNormal(alpha.m[rows] + log_lambda[:, rows], alpha.s2[rows])
            of_cells = node(stretched, LogNormal(beta.m[rows], beta.s2[rows]), correlated)
            m.append(of_cells.m.sum())
            s2.append(of_cells.s2.sqrt().sum().square() if correlated else of_cells.s2.sum())
    return torch.stack(m).sum(), torch.stack(s2).sum().sqrt()


def edges_of_nodes(nodes: int) -> list[slice]:
    """Which of a cell's edges enter each of its intermediate nodes."""
    firsts = [node * (node + 3) // 2 for node in range(nodes + 1)]
    return [slice(first, last) for first, last in pairwise(firsts)]


T = TypeVar("T", float, Tensor)


def log_quantile(mu: T, sigma: T, p: float) -> T:
    """ln of what the variable stays under with probability `p`."""
    return mu + NormalDist().inv_cdf(p) * sigma


def probability(mu: float, sigma: float, log_bound: float) -> float:
    """That ln of the variable is at most `log_bound`."""
    return NormalDist(mu, sigma).cdf(log_bound)
