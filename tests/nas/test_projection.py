"""The projection (Eq. 9) where the nearest point is known in closed form."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rnas.nas.projection import Projection
from rnas.nas.projection import project as project_by_slope


def start(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(14, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float((t.detach() ** 2).sum()) for t in tensors))


def project(
    alphas: list[torch.Tensor],
    f: Callable[[], torch.Tensor],
    measure: Callable[[], float],
    bound: float,
    **options: Any,
) -> Projection:
    """Of an F that autograd differentiates."""

    def gradients(scale: float) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        value = f()
        return value.detach(), torch.autograd.grad(value / scale, alphas, allow_unused=True, materialize_grads=True)

    return project_by_slope(alphas, gradients, measure, bound, **options)


def worst(alphas: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a.detach() - e).abs().max()) for a, e in zip(alphas, expected, strict=True))


@pytest.mark.parametrize("radius", [0.5, 5.0, 20.0])
def test_onto_a_ball(radius: float) -> None:
    """F(α) = ‖α − c‖² ≤ r²: the nearest point lies on the straight line to the centre."""
    alphas, centre = start(0), [c.detach() for c in start(1)]
    away = [a.detach() - c for a, c in zip(alphas, centre, strict=True)]
    expected = [c + d * radius / norm(away) for c, d in zip(centre, away, strict=True)]

    def f() -> torch.Tensor:
        return sum(((a - c) ** 2).sum() for a, c in zip(alphas, centre, strict=True))

    result = project(alphas, f, lambda: f().item(), radius**2, steps=600)
    assert worst(alphas, expected) < 1e-3
    assert result.after <= radius**2
    assert result.distance == pytest.approx(norm(away) - radius, abs=1e-2)
    # Stationarity, α_p − α + λ∇g = 0 with ∇g = 2(α_p − c)/H, fixes the multiplier.
    assert result.multiplier == pytest.approx((norm(away) / radius - 1) * radius**2 / 2, rel=0.05)


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_onto_a_half_space(scale: float) -> None:
    """F linear, whatever its units: α moves against the slope, just as far as it must."""
    alphas, slope = start(2), [s.detach().abs() * scale for s in start(3)]

    def f() -> torch.Tensor:
        return sum((a * s).sum() for a, s in zip(alphas, slope, strict=True)) + 50 * scale

    before = f().item()
    bound = before - 3 * scale
    expected = [a.detach() - (before - bound) / norm(slope) ** 2 * s for a, s in zip(alphas, slope, strict=True)]
    result = project(alphas, f, lambda: f().item(), bound, steps=400)
    assert worst(alphas, expected) < 1e-3
    assert result.after <= bound
    assert result.steps < 400, "it stops early when feasible and stationary"


@pytest.mark.parametrize("bound", [1.0, 0.3, 0.03, 0.001])
def test_a_long_way_in_short_steps_ends_at_the_nearest_point(bound: float) -> None:
    """40 steps of `lr` are needed: until it is there, no step that came nearer is a reason to push harder."""
    slope = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    a = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    expected = a.detach() - slope * (slope @ a.detach() - bound) / (slope @ slope)
    result = project([a], lambda: slope @ a, lambda: float(slope @ a.detach()), bound, steps=200, lr=0.02)
    assert worst([a], [expected]) < 1e-3
    assert result.steps <= 100


def test_is_the_identity_when_feasible() -> None:
    alphas = start(4)
    before = [a.detach().clone() for a in alphas]

    def f() -> torch.Tensor:
        raise AssertionError("nothing to differentiate")

    result = project(alphas, f, lambda: 1.0, 1.0, steps=10)
    assert all(torch.equal(a, b) for a, b in zip(alphas, before, strict=True))
    assert (result.distance, result.multiplier, result.steps) == (0.0, 0.0, 0)


def test_a_bound_of_zero_goes_as_far_as_it_can() -> None:
    """H = 0 uses g = F: F falls to (nearly) nothing where that is possible."""
    alphas = [torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)]

    def f() -> torch.Tensor:
        return (alphas[0] ** 2).sum()

    result = project(alphas, f, lambda: f().item(), 0.0, steps=400)
    assert result.after < 1e-3
    assert result.end != "feasible"
    assert result.smallest == result.after


def test_goes_on_until_it_is_feasible() -> None:
    """Too few steps for the way: more are made, but not beyond the cap."""
    for most, feasible in ((None, False), (15, False), (400, True)):
        a = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
        slope = torch.tensor([1.0, 2.0], dtype=torch.float64)
        f = lambda a=a, slope=slope: slope @ a  # noqa: E731
        result = project([a], f, lambda f=f: f().item(), 0.5, steps=10, most=most, lr=0.02)
        assert (result.end == "feasible") is feasible
        assert (result.after <= 0.5) is feasible
        assert result.steps <= (most or 10)
        assert feasible or result.end == "steps"


def test_stops_where_f_no_longer_falls() -> None:
    """F ≥ 1 everywhere: it ends at the smallest F seen, long before the cap."""
    a = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)

    def f() -> torch.Tensor:
        return 1 + (a**2).sum()

    result = project([a], f, lambda: f().item(), 0.5, steps=60, most=10_000, lr=0.2)
    assert result.end == "stalled"
    assert result.steps < 1000
    assert result.after == result.smallest == pytest.approx(1, abs=1e-3)
    assert f().item() == result.after
