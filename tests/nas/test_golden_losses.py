"""The losses of the first steps of a search, recorded: a change that should change nothing must not change them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rnas.attacks import PGD
from rnas.compute.device import reseed
from rnas.data import batches, load
from rnas.fast.supernet import FastSupernet
from rnas.nets.supernet import Supernet
from rnas.settings import SearchSpace
from supernets import searching

GOLDEN = Path(__file__).parents[1] / "golden" / "search_losses.json"


def trace(network: type[Supernet]) -> dict[str, list[float]]:
    """Four weight steps, four architecture steps and four values of F, in float64 on real digits.

    With an l_2 attack and a little noise on the black ground: the sign of a gradient that is nothing but rounding, and
    the maximum of equal pixels, are not the network's to say. The weights are drawn by NumPy, which draws the same on
    every processor: torch's normal numbers differ in the eighth digit with its vector unit.
    """
    data = load("digits")
    reseed(0)
    net = network(SearchSpace(cells=3, channels=4), 10, *data.statistics())
    attack = PGD(eps=1.0, step=0.3, steps=2, random_start=False, norm="l2")
    engine = searching(net, attack, alpha_lr=0.01, lr=0.05)
    net.double()
    draws = np.random.default_rng(0)
    with torch.no_grad():
        for p in (p for p in net.thetas if p.dim() > 1):
            p.copy_(torch.from_numpy(draws.uniform(-1, 1, p.shape)) * (2 / p[0].numel()) ** 0.5)

    def images() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        noise = torch.Generator().manual_seed(0)
        for x, y in batches(data.train, 8, seed=0, augment=True):
            yield 0.9 * x.double() + 0.1 * torch.rand(x.shape, generator=noise, dtype=torch.float64), y

    drawn = images()
    losses: dict[str, list[float]] = {"weights": [], "architecture": [], "F": []}
    for _ in range(4):
        x, y = next(drawn)
        losses["weights"].append(engine.descend_weights(engine.adversarial(x, y), y).loss.item())
        losses["architecture"].append(engine.method.descend_alphas(engine, *next(drawn)).loss.item())
        x, y = next(drawn)
        with torch.no_grad():
            losses["F"].append(engine.method.vulnerability()(net, x, engine.adversarial(x, y))[1].item())
    return losses


@pytest.mark.parametrize("network", [Supernet, FastSupernet])
def test_the_losses_are_those_recorded(network: type[Supernet]) -> None:
    """`python tests/test_golden_losses.py` records them anew, from the plain supernet: only for a change of method."""
    recorded = json.loads(GOLDEN.read_text())
    for name, values in trace(network).items():
        assert values == pytest.approx(recorded[name], rel=1e-6), name


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(trace(Supernet), indent=1) + "\n")
