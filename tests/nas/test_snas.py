"""SNAS: its samples, its costs, the joint step, and cells with any number of edges."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from rnas.errors import RnasError
from rnas.fast.supernet import FastSupernet
from rnas.genotype import Genotype
from rnas.nas.costs import operation_cost, supernet_costs
from rnas.nas.derive import all_edges
from rnas.nas.methods.snas import JointLoss, Settings, Snas
from rnas.nas.search import search
from rnas.nets.count import macs, parameters
from rnas.nets.derived import DerivedNetwork
from rnas.nets.ops import operation
from rnas.nets.space import Shape
from rnas.nets.supernet import Supernet
from rnas.records.folder import read_log
from rnas.report.drawing.cells import draw_cells
from rnas.settings import OPERATIONS, Perturbation, SearchSpace, Source
from supernets import drawn_by_numpy, searching

PAPER = Settings(out=Path())
LOGITS = torch.tensor([1.0, 0.5, 0.0, -0.5, 1.5, -1.0, 0.2, 0.8])


def begun(**changed: Any) -> Snas:
    """A method whose λ are `LOGITS` on every edge."""
    method = Snas(replace(PAPER, **changed))
    method.begin(method.shape(1))
    with torch.no_grad():
        for p in method.parameters():
            p.copy_(LOGITS.expand_as(p))
    return method


def drawn(method: Snas, tau: float, n: int) -> torch.Tensor:
    """(N, operations) samples Z of all edges in `n` steps."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([method.samples(*method.draw(generator, tau)).detach().flatten(0, 1) for _ in range(n)])


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_the_largest_is_distributed_as_the_softmax(tau: float) -> None:
    """Gumbel-max, whatever the temperature."""
    largest = drawn(begun(), tau, 300).argmax(1)
    expected = LOGITS.double().softmax(0).numpy() * len(largest)
    assert stats.chisquare(np.bincount(largest, minlength=8), expected).pvalue > 1e-3


def test_the_samples_have_the_density_of_the_paper() -> None:
    """Of which follows that τ·ln(Z_k/Z_m) − (λ_k − λ_m) is logistic for any two operations."""
    z = drawn(begun(), 0.7, 300).double()
    for k, m in ((0, 1), (4, 5)):
        value = 0.7 * (z[:, k] / z[:, m]).log() - (LOGITS[k] - LOGITS[m])
        assert stats.kstest(value.numpy(), "logistic").pvalue > 1e-3


def test_a_samples_gradient() -> None:
    """dZ_k/dλ_m = Z_k(δ_km − Z_m)/τ."""
    method, tau = begun().double(), 0.5
    noise = method.draw(torch.Generator().manual_seed(0), tau)
    z = method.samples(*noise)
    torch.testing.assert_close(z[0, 0], ((LOGITS.double() + noise[1][0, 0]) / tau).softmax(0))
    for k in range(8):
        (grad,) = torch.autograd.grad(z[0, 0, k], method.normal, retain_graph=True)
        delta = torch.eye(8, dtype=torch.float64)[k]
        torch.testing.assert_close(grad[0], z[0, 0, k] * (delta - z[0, 0]) / tau)
        assert (grad[1:] == 0).all()


def test_temperatures() -> None:
    assert [PAPER.temperature(epoch) for epoch in (1, 150)] == pytest.approx([0.03 + 0.97 * 149 / 150, 0.03])
    assert drawn(begun(), 1e-4, 20).amax(1).median() > 0.999
    torch.testing.assert_close(drawn(begun(), 1e6, 1), torch.full((28, 8), 1 / 8), rtol=1e-3, atol=0)


def test_paths_are_dropped_by_cell_and_scaled() -> None:
    method = begun(drop_path=0.25)
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([method.draw(generator, 1.0)[2] for _ in range(200)])
    assert kept.shape == (200, 8, 14)
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert kept.max() == pytest.approx(4 / 3)
    noise = method.draw(generator, 1.0)
    mix = method.weights(*noise).mix
    torch.testing.assert_close(torch.stack([m.sum(1) for m in mix]), noise[2])
    torch.testing.assert_close(mix[0][noise[2][0] > 0][0], 4 / 3 * method.samples(*noise)[0][noise[2][0] > 0][0])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_sizes_and_flops_are_those_of_the_modules(name: str, stride: int) -> None:
    module = operation(name, 6, stride, affine=False)
    cost = operation_cost(name, 6, (8 // stride) ** 2, stride)
    assert cost.size == parameters(module)
    if "pool" not in name and "none" not in name and (name, stride) != ("skip_connect", 1):
        body = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1, bias=False), module)
        assert cost.flops == macs(body, 8) - 18 * 64


def test_costs_by_hand() -> None:
    assert operation_cost("sep_conv_3x3", 16, 1024, 1) == (800, 819_200, 131_872)
    assert operation_cost("dil_conv_5x5", 16, 256, 2) == (656, 167_936, 7 * 4096 + 656)
    assert operation_cost("max_pool_3x3", 16, 256, 2) == (0, 36_864, 20_480)
    costs = supernet_costs(SearchSpace(), 32, 32)
    assert [row[0][4].size for row in costs] == [800, 800, 2 * (288 + 1024), 2624, 2624, 9344, 9344, 9344]
    assert costs[2][0][3] == operation_cost("skip_connect", 32, 256, 2)
    assert costs[2][4][3] == operation_cost("skip_connect", 32, 256, 1)


@pytest.mark.parametrize("form", ["log", "linear", "discrete"])
def test_the_cost_of_a_cell_by_hand(form: str) -> None:
    """All edges of two nodes half skip and half sep_conv_3x3, in three cells; of reductions two have stride 2 for each
    node."""
    space = SearchSpace(cells=3, channels=4, nodes=2)
    method = Snas(replace(PAPER, space=space, cost_form=form, size_weight=2.0))
    method.begin(method.shape(1))
    z = torch.zeros(2, 5, 8, dtype=torch.float64)
    z[:, :, [3, 4]] = 0.5
    method.double()
    got = method.expense(method.costs(torch.zeros(1, 3, 8, 8)), z).item()
    of_kind = {False: [], True: []}
    for cell, (channels, pixels) in enumerate(((4, 64), (8, 16), (16, 4))):
        strides = (1,) * 5 if cell == 0 else (2, 2, 2, 2, 1)
        edges = []
        for stride in strides:
            pair = [operation_cost(o, channels, pixels, stride) for o in ("skip_connect", "sep_conv_3x3")]
            size, flops, mac = (0.5 * (a + b) for a, b in zip(*pair, strict=True))
            linear = 0.43 * (2 * 2 * size + flops / 4000 + mac / 100)
            edges.append(linear if form == "linear" else (2 * np.log(size) + np.log(flops) + np.log(mac)) / 3)
        of_kind[cell > 0].append(sum(edges))
    assert got == pytest.approx(sum(np.mean(cells) for cells in of_kind.values()))


def test_the_expected_cost_does_not_depend_on_the_noise() -> None:
    """In the discrete form; in the others the sample is charged, and an edge that is `none` costs nothing."""
    space = SearchSpace(cells=3, channels=4, nodes=2)
    net = Supernet(Shape(space, per_cell=True), 10)
    engine = searching(net, method=Snas, kind=Settings, out=Path(), space=space, drop_path=0.0)
    x, y, method = torch.rand(4, 3, 8, 8), torch.arange(4), engine.method
    costs, generator = method.costs(x), torch.Generator().manual_seed(0)
    charged = {}
    for expected in (True, False):
        charged[expected] = []
        for _ in range(2):
            noise = method.draw(generator, 0.5)
            with_cost, without = (JointLoss(eta, expected)(net, x, y, costs, *noise)[0] for eta in (1.0, 0.0))
            charged[expected].append((with_cost - without).item())
    assert charged[True] == pytest.approx([method.expense(costs, method.samples()).item()] * 2, rel=1e-5)
    assert charged[False][0] != pytest.approx(charged[False][1], rel=1e-5)
    nothing = torch.zeros(2, 5, 8)
    nothing[..., 0] = 1
    assert method.expense(costs, nothing) == 0


def test_all_edges_but_none() -> None:
    """Node 2 takes both edges, node 3 one of three; where all three choose `none`, the strongest other stays. The
    networks, counts, files and drawings of such cells."""
    space = SearchSpace(nodes=2)
    rows = np.full((5, 8), 0.05)
    rows[[0, 1, 2, 3, 4], [4, 3, 0, 6, 0]] = 0.6
    empty = rows.copy()
    empty[3] = [0.5, 0, 0, 0, 0.1, 0.4, 0, 0]
    genotype = all_edges(space, rows.tolist(), empty.tolist())
    first = (("sep_conv_3x3", 0), ("skip_connect", 1))
    assert genotype.normal.nodes == (first, (("dil_conv_3x3", 1),))
    assert genotype.reduce.nodes == (first, (("sep_conv_5x5", 1),))
    whole = np.full((5, 8), 0.1)
    whole[:, 7] = 0.3
    assert [len(edges) for edges in all_edges(space, whole.tolist(), whole.tolist()).normal.nodes] == [2, 3]
    assert Genotype.from_json(json.loads(json.dumps(genotype.to_json()))) == genotype
    net = DerivedNetwork(genotype, 10, cells=3, channels=4)
    assert net(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    assert parameters(net) > 0
    assert macs(net, 8) > 0
    assert "svg" in draw_cells(genotype)


@pytest.mark.parametrize("changed", [{"tau_min": 0.0}, {"drop_path": 1.0}, {"eta": -1.0}, {"alpha_clip": 0.0}])
def test_bad_settings(changed: dict[str, Any]) -> None:
    with pytest.raises(RnasError):
        replace(PAPER, **changed)


GOLDEN = Path(__file__).parents[1] / "golden" / "snas_losses.json"


def ten_losses(network: type[Supernet]) -> list[float]:
    """Of ten joint steps on samples that get colder, in float64; the noise is NumPy's, the same on every processor."""
    torch.manual_seed(0)
    space, draws = SearchSpace(cells=3, channels=4, nodes=2), np.random.default_rng(1)
    net = network(Shape(space, per_cell=True), 10)
    engine = searching(net, method=Snas, kind=Settings, out=Path(), space=space, lr=0.1, alpha_lr=0.01)
    net.double()
    drawn_by_numpy(net)
    x, y = torch.from_numpy(draws.random((20, 3, 8, 8))), torch.arange(20) % 10
    losses = []
    for step in range(10):
        arrays = (1 - step / 12, draws.gumbel(size=(2, 5, 8)), (draws.random((3, 5)) >= 0.3) / 0.7)
        noise = [torch.tensor(a, dtype=torch.float64) for a in arrays]
        losses.append(engine.method.descend(engine, x, y, *noise).loss.item())
    return losses


def test_the_losses_are_those_recorded() -> None:
    assert ten_losses(FastSupernet) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-6)


def test_one_epoch_on_digits(tmp_path: Path) -> None:
    settings = Settings(
        out=tmp_path,
        source=Source(data="digits", limit_per_class=8),
        space=SearchSpace(cells=3, channels=2, nodes=2),
        perturbation=Perturbation(attack_steps=1),
        epochs=1,
        batch_size=16,
        monitor=20,
        device="cpu",
    )
    found = search(settings)
    (event,) = (e for e in read_log(tmp_path) if e["event"] == "epoch")
    assert event["temperature"] == pytest.approx(0.03)
    assert event["cost"] > 0
    assert Genotype.load(tmp_path / "genotype.json") == found
    with np.load(tmp_path / "strengths.npz") as strengths:
        assert strengths["normal"].shape == strengths["reduce"].shape == (2, 5, 8)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(ten_losses(Supernet), indent=1) + "\n")
