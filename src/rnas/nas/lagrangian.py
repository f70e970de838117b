"""A constraint c ≤ 0 on parameters, kept by a dual variable: the augmented Lagrangian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Dual:
    """min L subject to c ≤ 0: descents of the parameters along ∇L + max(0, dual + ρc)·∇c, and in between ascents of
    the dual to max(0, dual + ρc)."""

    value: float = 0.0
    rho: float | None = None
    """ρ; not known before the constraint binds for the first time."""

    def multiplier(self, c: float) -> float:
        """Of ∇c."""
        return max(0.0, self.value + (self.rho or 0.0) * c)

    def slope(
        self, grads: Sequence[Tensor], towards: Sequence[Tensor], c: float, least: float = 0.0
    ) -> tuple[Tensor, ...]:
        """The gradients of the augmented Lagrangian from those of L and of c.

        Where c is above 0 for the first time, ρ is chosen such that both are equally long; for a c below `least` as for
        `least`, lest one that is next to nothing makes ρ huge.
        """
        if self.rho is None and c > 0:
            self.rho = (nn.utils.get_total_norm(grads) / nn.utils.get_total_norm(towards)).item() / max(c, least)
        m = self.multiplier(c)
        return tuple(g + m * t for g, t in zip(grads, towards, strict=True))

    def ascend(self, c: float) -> None:
        """After a minimisation."""
        self.value = self.multiplier(c)
