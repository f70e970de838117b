"""`examples/algorithm1.py`, the paper in one file: short, and step by step what the library's search does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from examples import algorithm1
from tests.supernets import searching

from rnas.attacks import PGD
from rnas.settings import SearchSpace
from rnas.training.step import weight_step

GOLDEN = Path(__file__).parent / "golden" / "algorithm1.json"


def images(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Noise of two classes, dark and bright, in float64: no pixels are equal, so that rounding decides nothing."""
    drawn = torch.Generator().manual_seed(epoch)
    for _ in range(4):
        y = torch.arange(6) % 2
        yield 0.7 * torch.rand(6, 3, 8, 8, generator=drawn, dtype=torch.float64) + 0.3 * y.view(-1, 1, 1, 1), y


def small_search() -> tuple[algorithm1.Network, PGD]:
    """Three cells, one of them normal, in float64, with an l_2 attack: its steps do not hang on the sign of a zero."""
    torch.manual_seed(0)
    net = algorithm1.Network(SearchSpace(cells=3, channels=2, nodes=1), 2).double()
    return net, PGD(eps=0.5, step=0.2, steps=2, random_start=False, norm="l2")


def trace() -> list[dict[str, float]]:
    """One epoch of Phase I and two of Phase II, under a bound that binds nothing."""
    net, attack = small_search()
    settings = algorithm1.Settings(epochs=3, warmup=1)
    genotype, seen = algorithm1.algorithm1(
        net, attack, images, lambda epoch: images(10 + epoch), list(images(20))[:2], 1e9, settings
    )
    assert genotype == net.genotype()
    return seen


def test_the_losses_are_those_of_the_librarys_search() -> None:
    """Recorded from the library's steps, by `python -m tests.test_examples`."""
    found, recorded = trace(), json.loads(GOLDEN.read_text())
    assert len(found) == len(recorded)
    for epoch, theirs in zip(found, recorded, strict=True):
        assert epoch == pytest.approx(theirs, rel=1e-4)  # another processor: 1e-6


def test_the_projection_moves_the_architecture_alone_and_below_the_bound() -> None:
    net, attack = small_search()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    judges = list(images(20))[:2]
    bound = 0.9 * algorithm1.measured(net, attack, judges)
    drawn = algorithm1.forever(images, 1)
    assert algorithm1.constrain(net, attack, drawn, judges, bound, steps=30, lr=1.0) <= bound
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"alpha.normal", "alpha.reduce"}


def test_it_is_one_file_that_can_be_read_at_a_sitting() -> None:
    text = Path(algorithm1.__file__).read_text()
    assert len(text.splitlines()) <= 250
    for place in ("Phase I", "Phase II", "Step 1", "Step 2", "Eq. 1", "Eq. 6", "Eq. 7", "Eq. 8", "Eq. 9"):
        assert place in text


def with_the_librarys_steps() -> None:
    """Let the example go by the library's steps, which have weights and α of a network of their own: the same ones."""

    def engine(net, attack):
        found = searching(net.supernet, attack)
        found.method.alpha = net.alpha
        return found

    def theta(net, optimizer, attack, clip, x, y):
        weights = net.alpha.softmax().detach()
        return weight_step(net.supernet, net.thetas, optimizer, attack, x, y, clip, weights=[weights])[0].item()

    def alpha(net, optimizer, attack, x, y):
        found = engine(net, attack)
        found.optimiser = optimizer
        return found.method.descend_alphas(found, x, y).loss.item()

    def measured(net, attack, images):
        return engine(net, attack).measure(images).vulnerability

    algorithm1.weight_step, algorithm1.alpha_step, algorithm1.measured = theta, alpha, measured


if __name__ == "__main__":
    with_the_librarys_steps()
    GOLDEN.write_text(json.dumps(trace(), indent=1) + "\n")
