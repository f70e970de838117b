"""RACL: log-normal sums, Lipschitz constants and the dual in closed form; its steps against definitions."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rnas.errors import RnasError
from rnas.fast.supernet import FastSupernet
from rnas.genotype import OPERATIONS
from rnas.nas.distributions import Distributions, Variables
from rnas.nas.engine import Engine
from rnas.nas.lagrangian import Dual
from rnas.nas.lipschitz import Lipschitz, convolutions, depthwise_norms, power_step, without_convolutions
from rnas.nas.lognormal import LogNormal, added, edges_of_nodes, log_quantile, network, node, probability
from rnas.nas.methods.racl import Racl, Settings
from rnas.nas.objectives import ImageCrossEntropy
from rnas.nas.search import search
from rnas.nets.ops import operation, reductions
from rnas.nets.space import Shape
from rnas.nets.supernet import Supernet
from rnas.records.folder import read_log
from rnas.settings import Perturbation, SearchSpace, Source
from supernets import searching

SPACE = SearchSpace(cells=3, channels=4, nodes=2)
TINY = SearchSpace(cells=2, channels=2, nodes=1)
SMALL = {
    "source": Source(data="digits", limit_per_class=8),
    "space": TINY,
    "perturbation": Perturbation(attack_steps=1),
    "batch_size": 16,
    "monitor": 20,
    "device": "cpu",
}


def images(n: int = 8, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 10


def log_normal(m: Tensor | float, s2: Tensor | float, *shape: int) -> LogNormal:
    return LogNormal(*(torch.full(shape, t, dtype=torch.float64) if isinstance(t, float) else t for t in (m, s2)))


# --- log-normal variables


def test_the_sum_of_equal_terms() -> None:
    """s² = ln(1 + (e^σ² − 1)/n), and the mean is n times theirs; of one term it is that term."""
    total = added(log_normal(-2.0, 0.25, 8))
    assert total.m.item() == pytest.approx(0.18700, abs=1e-5)
    assert total.s2.item() == pytest.approx(0.034887, abs=1e-6)
    assert total.log_mean.exp().item() == pytest.approx(8 * math.exp(-2 + 0.125))
    assert [t.item() for t in added(log_normal(-2.0, 0.25, 1))] == pytest.approx([-2, 0.25])


def test_a_sum_has_the_mean_and_variance_of_its_terms_and_nothing_adds_nothing() -> None:
    m, s2 = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    total = added(LogNormal(m, s2))
    mean = (m + s2 / 2).exp().sum()
    variance = ((2 * m + s2).exp() * s2.expm1()).sum()
    torch.testing.assert_close(total.log_mean.exp(), mean)
    torch.testing.assert_close((2 * total.m + total.s2).exp() * total.s2.expm1(), variance)
    nothing = torch.full((1,), -math.inf, dtype=torch.float64)
    padded = LogNormal(torch.cat([m, nothing]).requires_grad_(), torch.cat([s2, s2[:1]]))
    for got, wanted in zip(added(padded), total, strict=True):
        torch.testing.assert_close(got, wanted)
    (gradient,) = torch.autograd.grad(added(padded).s2, padded.m)
    assert torch.isfinite(gradient).all()
    assert gradient[-1] == 0


def test_products_are_exact() -> None:
    product = log_normal(1.0, 0.25, 1).times(log_normal(-3.0, 0.5, 1))
    assert [t.item() for t in product] == [-2, 0.75]


def test_an_edge_shares_its_beta() -> None:
    """With β alone uncertain the node's spread is β's, however many operations; independent terms average it away."""
    alpha, beta = log_normal(0.0, 1e-9, 1, 8), log_normal(0.0, 0.25, 1)
    assert node(alpha, beta).s2.item() == pytest.approx(0.25, rel=1e-6)
    assert node(alpha, beta, correlated=False).s2.item() == pytest.approx(math.log1p(math.expm1(0.25) / 8), rel=1e-6)


def test_the_moments_of_a_node_are_those_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha, beta = (
        LogNormal(torch.randn(shape, generator=generator), 0.01 + 0.1 * torch.rand(shape, generator=generator))
        for shape in ((3, 4), (3,))
    )
    a, b = (
        (law.m + law.s2.sqrt() * torch.randn(40_000, *law.m.shape, generator=generator)).exp() for law in (alpha, beta)
    )
    drawn = (a.sum(-1) * b).sum(-1).log()
    law = node(alpha, beta)
    assert law.m.item() == pytest.approx(drawn.mean().item(), abs=0.01)
    assert law.s2.item() == pytest.approx(drawn.var().item(), rel=0.05)


def test_spreads_of_cells_of_one_kind_add_up() -> None:
    """One edge, one operation: a node is αβλ, and c cells of it are (αβ)^c Πλ: σ is c times σ of one."""
    alpha, beta = log_normal(0.1, 0.04, 2, 1), log_normal(-0.2, 0.05, 2)
    log_lambda = torch.full((6, 2, 1), -80.0, dtype=torch.float64)  # of the other edge
    log_lambda[:, 0] = torch.arange(6.0, dtype=torch.float64).unsqueeze(-1)
    mu, sigma = network([(alpha, beta, log_lambda)], nodes=1)
    assert mu.item() == pytest.approx(6 * (0.1 - 0.2) + 15)
    assert sigma.item() == pytest.approx(6 * 0.3)
    independent = network([(alpha, beta, log_lambda)], nodes=1, correlated=False)[1]
    assert independent.item() == pytest.approx(math.sqrt(6) * 0.3)


def test_the_quantile_is_where_confidence_is_as_wanted() -> None:
    mu, sigma = torch.tensor(1.3), torch.tensor(0.7)
    bound = log_quantile(mu, sigma, 0.9).item()
    assert bound == pytest.approx(1.3 + 1.28155 * 0.7, abs=1e-5)
    assert probability(1.3, 0.7, bound) == pytest.approx(0.9)
    drawn = (mu + sigma * torch.randn(100_000, generator=torch.Generator().manual_seed(0))).exp()
    assert (drawn <= math.exp(bound)).double().mean().item() == pytest.approx(0.9, abs=0.005)


# --- the dual


@pytest.mark.parametrize("b", [0.5, 3.0])
def test_the_dual_of_a_toy_problem(b: float) -> None:
    """min (μ − μ₀)² with μ + 1.2816σ ≤ b: μ = min(μ₀, b − 1.2816σ), dual 2(μ₀ − μ)."""
    start, spread = 1.0, NormalDist().inv_cdf(0.9) * 0.3
    mu, dual = torch.tensor(start, dtype=torch.float64), Dual(rho=2.0)
    for _ in range(40):
        for _ in range(40):
            (gradient,) = dual.slope([2 * (mu - start)], [torch.ones_like(mu)], mu.item() + spread - b)
            mu = mu - 0.1 * gradient
        dual.ascend(mu.item() + spread - b)
    expected = min(start, b - spread)
    assert mu.item() == pytest.approx(expected, abs=1e-6)
    assert dual.value == pytest.approx(2 * (start - expected), abs=1e-5)


def test_at_first_both_gradients_are_equally_long() -> None:
    loss, towards, dual = [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])], Dual()
    assert dual.slope(loss, towards, -1.0)[0].tolist() == [3, 4]
    assert dual.rho is None
    assert dual.slope(loss, towards, 0.5, least=0.1)[0].tolist() == [3, 9]
    assert dual.rho == pytest.approx(5.0)
    tiny = Dual()
    tiny.slope(loss, towards, 1e-9, least=0.1)
    assert tiny.rho == pytest.approx(25.0)


# --- Lipschitz constants


def test_power_iteration_finds_the_largest_singular_values() -> None:
    matrices = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.ones(5, 7, dtype=torch.float64)
    exact = torch.linalg.svdvals(matrices)[:, 0]
    for _ in range(500):
        norms, v = power_step(matrices, v)
        assert (norms <= exact * (1 + 1e-9)).all()
    torch.testing.assert_close(norms, exact, rtol=1e-6, atol=0)


def test_kernels_that_pass_on_what_they_get_have_norm_one() -> None:
    kernel = torch.zeros(1, 3, 1, 5, 5)
    kernel[..., 2, 2] = 1
    assert depthwise_norms(kernel).item() == pytest.approx(1)
    assert power_step(torch.eye(4).unsqueeze(0), F.normalize(torch.randn(1, 4)))[0].item() == pytest.approx(1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_stretches_more_than_its_constant(name: str, stride: int) -> None:
    """The Jacobian, in eval mode, where ReLU is on: of each layer its norm; their product is the constant."""
    torch.manual_seed(0)
    module = operation(name, 4, stride, affine=False).double().eval()
    for m in module.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_var.copy_(torch.rand(4) + 0.5)
    bound = without_convolutions(torch.nn.Sequential(module) if "pool" in name else module, "l2")
    for kernel in convolutions(module):
        is_matrix = kernel.dim() == 2
        bound *= (torch.linalg.matrix_norm(kernel, 2) if is_matrix else depthwise_norms(kernel.unsqueeze(0))[0]).item()
    x = torch.rand(1, 4, 6, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module, x).flatten(4).flatten(0, 3)
    stretched = torch.linalg.matrix_norm(jacobian, 2).item()
    assert stretched <= bound * 1.02  # frequencies between those of the grid
    if name in ("none", "skip_connect"):
        assert stretched == pytest.approx(bound)


@pytest.mark.parametrize("pools", ["one", "l2"])
def test_the_constants_of_a_supernet(pools: str) -> None:
    torch.manual_seed(0)
    net = FastSupernet(SPACE, 10)
    lipschitz = Lipschitz(net.shape, pools)
    table = lipschitz(net, steps=200).exp()
    assert table.shape == (3, 5, 8)
    column = {name: table[:, :, k] for k, name in enumerate(OPERATIONS)}
    assert (column["none"] == 0).all()
    assert (table[:, :, 4:] > 0).all()
    normal, reduce = 0, 1
    assert reductions(3) == {1, 2}
    assert (column["skip_connect"][normal] == 1).all()
    assert column["max_pool_3x3"][normal, 0].item() == (1 if pools == "one" else 3)
    assert column["max_pool_3x3"][reduce, 0].item() == (1 if pools == "one" else 2)
    assert column["avg_pool_3x3"][normal, 0].item() == pytest.approx(1 if pools == "one" else 7 / 6)
    sep = net.cells[0].edges[0].operations["4"]
    kernels = list(convolutions(sep))
    assert [k.dim() for k in kernels] == [4, 2, 4, 2]
    by_hand = torch.linalg.matrix_norm(kernels[1], 2) * torch.linalg.matrix_norm(kernels[3], 2)
    by_hand = by_hand * depthwise_norms(torch.stack([kernels[0], kernels[2]])).prod()
    assert column["sep_conv_3x3"][0, 0].item() == pytest.approx(by_hand.item(), rel=1e-3)


def test_smaller_weights_before_bn_win_nothing() -> None:
    """BN's running variance follows the weights, and the constant stays."""
    net = Supernet(SPACE, 10)
    lipschitz = Lipschitz(net.shape)
    dilated = net.cells[0].edges[0].operations["6"]
    before = lipschitz(net, steps=50)[0, 0, 6]
    with torch.no_grad():
        dilated[2].weight.mul_(0.1)
        dilated[3].running_var.mul_(0.01)
    torch.testing.assert_close(lipschitz(net, steps=50)[0, 0, 6], before, rtol=1e-3, atol=1e-3)


# --- distributions


def test_the_gauge_is_one_and_changes_no_ratio() -> None:
    torch.manual_seed(0)
    distributions = Distributions(SPACE, sigma=0.3)
    with torch.no_grad():
        for p in distributions.parameters():
            p.add_(torch.randn_like(p))
    before = [v.mu.detach().clone() for v in distributions.variables]
    distributions.fix_gauge()
    for alpha, beta in zip(distributions.variables[:2], distributions.variables[2:], strict=True):
        torch.testing.assert_close(alpha.sample().sum(1), torch.ones(5))
        assert [beta.sample()[rows].sum().item() for rows in edges_of_nodes(2)] == pytest.approx([1, 1])
    shifted = [v.mu.detach() - b for v, b in zip(distributions.variables, before, strict=True)]
    assert all(s.std(1).max() < 1e-5 for s in shifted[:2])
    torch.testing.assert_close(distributions.weights().mix[0].sum(), torch.tensor(2.0))


def test_samples_have_the_law() -> None:
    variables = Variables((1,), sigma=0.5)
    with torch.no_grad():
        variables.mu.fill_(0.3)
        drawn = variables.sample(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert drawn.log().mean().item() == pytest.approx(0.3, abs=0.01)
    assert drawn.log().std().item() == pytest.approx(0.5, abs=0.01)
    assert variables.sample().item() == pytest.approx(drawn.mean().item(), rel=0.01)


# --- steps


def racl(net: Supernet, **settings: object) -> Engine:
    return searching(net, method=Racl, kind=Settings, out=Path(), **{"space": net.space, **settings})


@torch.no_grad()
def settle(net: Supernet, x: Tensor) -> None:
    """Let BN's running statistics be about those of `x`."""
    for _ in range(40):
        net(x, net.architecture.weights())


@pytest.mark.parametrize("of", ["distributions", "weights"])
def test_the_input_gradients_term_against_double_backward(of: str) -> None:
    """Of the plain supernet as a step draws it, shifted by so little that no ReLU notices (docs/decisions/026)."""
    torch.manual_seed(0)
    net = Supernet(SPACE, 10).double()
    engine, (x, y) = racl(net), images(8, 8)
    x = x.double().requires_grad_()
    settle(net, x.detach())
    noise = net.architecture.distributions.draw(engine.generator)
    parameters = list(net.architecture.parameters()) if of == "distributions" else net.thetas
    slope = engine.input_term(ImageCrossEntropy(), [(1.0, x.detach())], y, parameters, noise, eps=1e-7)
    net.eval()
    loss = F.cross_entropy(net(x, net.architecture.weights(*noise)), y, reduction="sum")
    value = torch.autograd.grad(loss, x, create_graph=True)[0].flatten(1).norm(dim=1).mean()
    expected = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    ours, theirs = (torch.cat([g.flatten() for g in grads]) for grads in (slope.grads, expected))
    assert slope.loss.item() == pytest.approx(value.item())
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=0.05)


def ten_losses(net: type[Supernet]) -> list[float]:
    """The losses of weights and distributions of five steps each, under a bound that binds, in float64."""
    torch.manual_seed(0)
    engine = racl(net(SPACE, 10), alpha_lr=0.01, warmup=0)
    engine.net.double()
    engine.method.decide(engine)
    x, y = images(16, 8)
    batches = iter([(x[:8].double(), y[:8]), (x[8:].double(), y[8:])] * 5)
    losses = []
    for train, validation in zip(batches, batches, strict=True):
        losses.append(engine.method.descend_weights(engine, *train).loss.item())
        losses.append(engine.method.descend_distributions(engine, *validation).loss.item())
    assert engine.method.dual.rho > 0
    return losses


GOLDEN = Path(__file__).parents[1] / "golden" / "racl_losses.json"


def test_racl_losses_are_those_recorded() -> None:
    """Of the plain supernet; `python tests/nas/test_racl.py` records them anew."""
    assert ten_losses(FastSupernet) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-6)


def test_steps_under_a_bound_lower_the_quantile() -> None:
    torch.manual_seed(0)
    engine = racl(FastSupernet(SPACE, 10), alpha_lr=0.05, warmup=0, lipschitz="0.5x", input_gradient=0.0)
    method, (x, y) = engine.method, images(16, 8)
    settle(engine.net, x)
    before = method.decide(engine)["ln_lambda"]
    for _ in range(10):
        method.descend_distributions(engine, x, y)
    told = method.decide(engine)
    assert told["bound"] == pytest.approx(before + 6 * math.log(0.5))
    assert told["ln_lambda"] < before - 0.5
    assert told["dual"] > 0
    assert 0 < told["confidence"] < 0.9


# --- the whole


def test_one_epoch_on_digits(tmp_path: Path) -> None:
    search(Settings(out=tmp_path, epochs=1, sampled=True, **SMALL))
    event = next(e for e in read_log(tmp_path) if e["event"] == "epoch")
    assert event["phase"] == "search"
    assert np.isfinite([event[k] for k in ("ln_lambda", "bound", "confidence", "dual", "alpha_loss")]).all()
    assert json.loads(event["sampled_genotype"]) == json.loads((tmp_path / "genotype.json").read_text())
    assert Racl.cost(Settings(out=tmp_path), 15, 10.0) == (0, 40)
    assert Racl.cost(Settings(out=tmp_path), 16, 10.0) == (0, 80)


def test_resumed_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its dual, bound and ρ, cut off in the middle of a random step after the warm-up."""
    settings = Settings(out=tmp_path / "whole", epochs=3, warmup=1, **SMALL)
    search(settings)
    done, step = 0, int(np.random.default_rng().integers(4, 12))
    slope = Engine.slope

    def cut(self: Engine, *args: object, **kwargs: object) -> object:
        nonlocal done
        if self.epoch > 1:
            done += 1
        if done > step:
            raise KeyboardInterrupt
        return slope(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "slope", cut)
        with pytest.raises(KeyboardInterrupt):
            search(replace(settings, out=tmp_path / "cut"))
    search(replace(settings, out=tmp_path / "cut", resume=True))
    whole, resumed = (torch.load(tmp_path / f / "checkpoint.pt", weights_only=True)["net"] for f in ("whole", "cut"))
    assert whole["architecture._extra_state"]["rho"] is not None
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(t, resumed[k]) if isinstance(t, Tensor) else t == resumed[k] for k, t in whole.items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"confidence": 1.0},
        {"sigma": 0.0},
        {"lipschitz": "small"},
        {"lipschitz": "-1"},
        {"warmup": 50},
        {"input_gradient": -1.0},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(RnasError, match=name.replace("_", "-")):
        Settings(out=Path(), **wrong)


def test_an_absolute_bound_and_none() -> None:
    for text, bound in (("1e3", math.log(1e3)), ("none", None)):
        engine = racl(FastSupernet(TINY, 10), warmup=0, lipschitz=text)
        engine.method.decide(engine)
        assert engine.method.bound == (None if bound is None else pytest.approx(bound))
        engine.method.descend_distributions(engine, *images())
        assert engine.method.decide(engine)["bound"] == engine.method.bound


def test_shape_of_the_power_iterations_is_in_the_state() -> None:
    method = Racl(Settings(out=Path(), space=TINY))
    method.begin(Shape(TINY))
    assert any(name.startswith("lipschitz.v") for name in method.state_dict())
    assert "lipschitz.given" not in method.state_dict()


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(ten_losses(Supernet), indent=1) + "\n")
