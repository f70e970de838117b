"""Log-normal α and β in the place of numbers: a weight for each operation and one for each edge, drawn anew in every
step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from rnas.nas.lognormal import LogNormal, edges_of_nodes, network
from rnas.nets.ops import reductions
from rnas.nets.space import Weights
from rnas.settings import SearchSpace


class Variables(nn.Module):
    """Independent log-normal variables: ln ~ N(mu, σ²) with σ = sigma · exp(spread). Decay of weights pulls `spread` to
    0 and σ to where it began."""

    def __init__(self, shape: tuple[int, ...], sigma: float):
        super().__init__()
        self.sigma = sigma
        self.mu = nn.Parameter(1e-3 * torch.randn(shape))
        self.spread = nn.Parameter(torch.zeros(shape))

    @property
    def law(self) -> LogNormal:
        """As it is now, differentiable."""
        return LogNormal(self.mu, (self.sigma * self.spread.exp()).square())

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """From standard normal `noise` of the variables' shape, differentiable; without it the means."""
        law = self.law
        return (law.log_mean if noise is None else law.m + law.s2.sqrt() * noise).exp()

    @torch.no_grad()
    def normalise(self, groups: Iterable[int | slice]) -> None:
        """Shift `mu` so that the means of each group add up to 1."""
        for group in groups:
            self.mu[group] -= self.law.log_mean[group].logsumexp(-1)


class Distributions(nn.Module):
    """α (edges,operations) and β (edges,) of both kinds of cell, in a fixed gauge: the means of an edge's α add up to
    1, and so do those of the β of the edges that enter a node."""

    def __init__(self, space: SearchSpace, sigma: float):
        super().__init__()
        self.space = space
        self.alpha = nn.ModuleList(Variables((space.edges, len(space.operations)), sigma) for _ in range(2))
        self.beta = nn.ModuleList(Variables((space.edges,), sigma) for _ in range(2))
        self.fix_gauge()

    @property
    def variables(self) -> list[Variables]:
        """α of normal and of reduction cells, then β of both."""
        return cast("list[Variables]", [*self.alpha, *self.beta])

    def fix_gauge(self) -> None:
        """Normalise, which changes no ratio within an edge or a node."""
        for alpha, beta in zip(self.variables[:2], self.variables[2:], strict=True):
            alpha.normalise(range(self.space.edges))
            beta.normalise(edges_of_nodes(self.space.nodes))

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Standard normal noise for all variables."""
        return tuple(torch.randn(v.mu.shape, generator=generator).to(v.mu) for v in self.variables)

    def weights(self, *noise: Tensor) -> Weights:
        """β_ij α_o,ij of a sample, or of the means."""
        values = [v.sample(n) for v, n in zip(self.variables, noise or (None,) * 4, strict=True)]
        return Weights(tuple(a * b.unsqueeze(-1) for a, b in zip(values[:2], values[2:], strict=True)))

    def stretch(self, log_lambda: Tensor, correlated: bool = True) -> tuple[Tensor, Tensor]:
        """μ, σ of ln of the product over cells and nodes of Σ_i β_i Σ_o α_io λ_o, differentiable; `log_lambda`
        (cells,edges,operations). `rnas.nas.lognormal` says what `correlated` means."""
        laws, cells, reducing = [v.law for v in self.variables], self.space.cells, reductions(self.space.cells)
        of_kind = [[i for i in range(cells) if (i in reducing) is reduction] for reduction in (False, True)]
        kinds = [(laws[k], laws[2 + k], log_lambda[chosen]) for k, chosen in enumerate(of_kind)]
        return network(kinds, self.space.nodes, correlated)
