"""PC-DARTS, DSRNA and AdvRush: what they compute in closed form, against double backward, and as recorded."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.errors import RnasError
from rnas.fast.supernet import FastSupernet
from rnas.nas.engine import Engine, Halves, Slope
from rnas.nas.methods import advrush, dsrna, load, pc_darts
from rnas.nas.objectives import ImageCrossEntropy, ImageLoss
from rnas.nas.search import search
from rnas.nets.space import Shape
from rnas.nets.supernet import Supernet
from rnas.records.folder import read_log
from rnas.settings import Perturbation, SearchSpace, Source
from supernets import searching

SPACE = SearchSpace(cells=3, channels=4, nodes=2)
NAMES = ("pc_darts", "dsrna", "advrush")
GOLDEN = Path(__file__).parents[1] / "golden" / "first_order_losses.json"
NO_KINK = 1e-7
"""A shift so small that no ReLU and no pool switches (docs/decisions/024)."""


def begun(shape: Shape) -> pc_darts.PcDarts:
    torch.manual_seed(0)
    method = pc_darts.PcDarts(pc_darts.Settings(out=Path(), space=shape.space, part=shape.part))
    method.begin(shape)
    return method


# --- PC-DARTS


def test_edge_weights_sum_to_one_at_every_node() -> None:
    method = begun(Shape(SearchSpace(), part=4))
    w = method.weights()
    assert w.bypass is not None
    for mix, bypass in zip(w.mix, w.bypass, strict=True):
        torch.testing.assert_close(torch.stack([b.sum() for b in bypass.split([2, 3, 4, 5])]), torch.ones(4))
        torch.testing.assert_close(mix.sum(1), bypass)  # the operations of an edge share its weight


def test_of_all_channels_and_with_equal_edges_it_is_darts_over_the_number_of_edges() -> None:
    method = begun(Shape(SPACE))
    with torch.no_grad():
        method.edges.beta_normal.fill_(0.7)
    w = method.weights()
    assert w.bypass is None
    by = torch.tensor([2.0, 2, 3, 3, 3])[:, None]
    torch.testing.assert_close(w.mix[0], method.edges.alpha.normal.softmax(-1) / by)


def test_a_constant_on_all_edges_of_a_node_changes_nothing() -> None:
    method = begun(Shape(SPACE, part=2))
    before = method.weights()
    with torch.no_grad():
        method.edges.beta_reduce += torch.tensor([3.0, 3, -1, -1, -1])
    torch.testing.assert_close(method.weights().tensors, before.tensors)


def test_edge_weights_choose_edges_and_alphas_operations() -> None:
    method = begun(Shape(SPACE, part=2))
    with torch.no_grad():
        method.edges.alpha.normal[2:, 5] = torch.tensor([1.0, 2.0, 3.0])
        by_alpha = method.derive().normal.nodes[1]
        method.edges.beta_normal[2:] = torch.tensor([4.0, 2.0, 0.0])
        by_both = method.derive().normal.nodes[1]
    name = SPACE.operations[5]
    assert by_alpha == ((name, 1), (name, 2))
    assert by_both == ((name, 0), (name, 1))


def test_alpha_and_beta_rest_for_the_first_epochs() -> None:
    settings = pc_darts.Settings(out=Path())
    assert settings.frozen == 15
    costs = [pc_darts.PcDarts.cost(settings, epoch, 10.0).passes for epoch in (1, 15, 16, 50)]
    assert costs == [10, 10, 20, 20]
    with pytest.raises(RnasError):
        pc_darts.Settings(out=Path(), epochs=5, warmup=5)


# --- toys whose terms are known


class Linear(nn.Module):
    """Logits a·W x of normalised images, a being the architecture."""

    def __init__(self, matrix: Tensor, std: float = 1.0):
        super().__init__()
        self.matrix = matrix
        self.normalize = nn.Module()
        self.normalize.register_buffer("std", torch.full((3, 1, 1), std, dtype=matrix.dtype))
        self.architecture = Scale()

    @property
    def thetas(self) -> list[nn.Parameter]:
        return []

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        return a * (x / self.normalize.std).flatten(1) @ self.matrix.T


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def weights(self) -> Tensor:
        return self.a


@dataclass(frozen=True)
class Quadratic:
    """½ a xᵀA x + bᵀx of normalised images; A is the network's matrix, and b its first row."""

    def __call__(self, net: nn.Module, /, x: Tensor, y: Tensor, *noise: Tensor) -> Tensor:
        flat = (x / net.normalize.std).flatten(1)
        return (0.5 * flat * net(x, net.architecture.weights())).sum(1) + flat @ net.matrix[0]


def toy(matrix: Tensor, std: float, name: str, **settings: object) -> Engine:
    found = load(name)
    method = found.method(found.settings(out=Path(), **settings))
    engine = Engine(method, None, Halves(None, None, 1, method.settings, torch.device("cpu")))
    engine.net = Linear(matrix, std)
    engine.method.weights = engine.net.architecture.weights
    engine.begin(1)
    return engine


def images(n: int, size: int) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- DSRNA


@pytest.mark.parametrize("std", [1.0, 0.25])
@pytest.mark.parametrize("q", [1, 2])
def test_the_jacobian_of_a_linear_network(q: int, std: float) -> None:
    """a·W, whatever the image and however pixels are normalised; all rows are their mean."""
    matrix = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    engine = toy(matrix, std, "dsrna", rows=5)
    x = images(3, 2)
    rows = engine.method.rows(engine, x)
    assert sorted(rows[0].tolist()) == [0, 1, 2, 3, 4]
    term = dsrna.jacobian_norm(engine, x, rows, list(engine.net.architecture.parameters()), q)
    expected = matrix.norm(p=q, dim=1).mean().item()
    assert term.loss.item() == pytest.approx(0.8 * expected)
    assert term.grads[0].item() == pytest.approx(expected)


def test_rows_by_chance_are_right_on_average_and_top_is_the_largest_logit() -> None:
    matrix = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    engine, x = toy(matrix, 1.0, "dsrna"), images(1, 2).repeat(4000, 1, 1, 1)
    drawn = matrix.norm(p=1, dim=1)[engine.method.rows(engine, x)[:, 0]]
    assert drawn.mean() == pytest.approx(matrix.norm(p=1, dim=1).mean().item(), abs=5 * drawn.std().item() / 4000**0.5)
    engine = toy(matrix, 1.0, "dsrna", top=True)
    assert engine.method.rows(engine, x)[:, 0].equal(engine.logits(x).argmax(1))


# --- AdvRush


@pytest.mark.parametrize("std", [1.0, 0.25])
def test_the_curvature_of_a_quadratic(std: float) -> None:
    """‖Hz‖: of a diagonal H h·sqrt(Σ a_i² / d), and 0 of a linear loss or a step of 0."""
    torch.manual_seed(0)
    diagonal = torch.rand(12, dtype=torch.float64) + 0.5
    expected = 1.5 * (diagonal.square().sum() / 12).sqrt().item()

    def measured(matrix: Tensor, h: float = 1.5, squared: bool = False) -> tuple[float, float]:
        engine = toy(matrix, std, "advrush")
        parameters = list(engine.net.architecture.parameters())
        term = advrush.curvature(engine, Quadratic(), images(4, 2), torch.arange(4), parameters, h, squared)
        return term.loss.item(), term.grads[0].item()

    matrix = diagonal.diag()
    assert measured(matrix) == pytest.approx((0.8 * expected, expected))
    assert measured(matrix, squared=True) == pytest.approx(((0.8 * expected) ** 2, 2 * 0.8 * expected**2))
    assert measured(matrix, h=0.0) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert measured(0 * matrix) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_when_the_curvature_counts_and_how_far_it_looks() -> None:
    settings = advrush.Settings(out=Path())
    assert settings.plain == 50
    assert [settings.reach(epoch) for epoch in (1, 2, 3, 4, 5, 6, 60)] == pytest.approx(
        [0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.5]
    )
    costs = [advrush.AdvRush.cost(settings, epoch, 10.0).passes for epoch in (1, 50, 51)]
    assert costs == [20, 20, 90]


# --- against the definition, and as recorded


def trained(name: str, network: type[Supernet], space: SearchSpace = SPACE, **settings: object) -> Engine:
    """An engine whose method's term counts, in float64, its running statistics those of images."""
    torch.manual_seed(0)
    found = load(name)
    settings = {"out": Path(), "space": space, "alpha_lr": 0.01, "warmup": 0, **settings}
    shape = found.method(found.settings(**settings)).shape(1)
    net = network(shape, 10, std=(0.2, 0.25, 0.3))
    engine = searching(net, method=found.method, kind=found.settings, **settings)
    engine.net.double()
    return engine


def term_of(name: str, engine: Engine, x: Tensor, y: Tensor, q: int) -> tuple[ImageLoss, list, Tensor, Slope]:
    """The loss, the images and the rows of a method's term, and the term as the method has it."""
    parameters = list(engine.method.parameters())
    if name == "dsrna":
        return dsrna.Logit(), [(1.0, x)], y, dsrna.jacobian_norm(engine, x, y[:, None], parameters, q, NO_KINK)
    std = engine.net.normalize.std
    sign = engine.input_gradient(ImageCrossEntropy(), x, y).sign()
    z = 1.5 * std * sign / sign[0].numel() ** 0.5
    slope = advrush.curvature(engine, ImageCrossEntropy(), x, y, parameters, 1.5, eps=NO_KINK)
    return ImageCrossEntropy(), [(1.0, x + z), (-1.0, x)], y, slope


@pytest.mark.parametrize(("name", "q"), [("advrush", 2), ("dsrna", 1), ("dsrna", 2)])
def test_terms_are_those_of_double_backward(name: str, q: int) -> None:
    """The definition on the plain supernet; the method's term on the fast one."""
    fast, plain = trained(name, FastSupernet), trained(name, Supernet).net
    x, y = images(4, 8), torch.arange(4)
    for _ in range(20):  # running statistics
        fast.logits(images(16, 8))
    plain.load_state_dict(fast.net.state_dict())
    loss, terms, rows, slope = term_of(name, fast, x, y, q)
    plain.eval()
    d = torch.zeros(())
    for s, at in terms:
        at = at.clone().requires_grad_()
        d = d + s * torch.autograd.grad(loss(plain, at, rows).sum(), at, create_graph=True)[0]
    value = (plain.normalize.std * d).flatten(1).norm(p=q, dim=1).mean()
    expected = torch.autograd.grad(value, list(plain.architecture.parameters()))
    assert slope.loss.item() == pytest.approx(value.item(), rel=1e-6)
    ours, theirs = (torch.cat([g.flatten() for g in grads]) for grads in (slope.grads, expected))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.99


def ten_losses(name: str, network: type[Supernet]) -> list[float]:
    """The losses of α, its term included, and of the weights in five steps each, in float64."""
    engine = trained(name, network, **({"ramp": 0} if name == "advrush" else {}))
    losses: list[float] = []
    saw = engine.saw_architecture
    engine.saw_architecture = lambda slope, y: (losses.append(slope.loss.item()), saw(slope, y))[1]
    x, y = images(16, 8), torch.arange(16) % 10
    for k in range(5):
        at, other = (slice(0, 8), slice(8, 16)) if k % 2 else (slice(8, 16), slice(0, 8))
        engine.method.descend_alphas(engine, x[at], y[at])
        losses.append(engine.descend_weights(x[other], y[other]).loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_recorded(name: str) -> None:
    """Of the plain supernet; `PYTHONPATH=tests python tests/nas/test_methods_first_order.py` records them anew."""
    recorded = json.loads(GOLDEN.read_text())[name]
    assert ten_losses(name, FastSupernet) == pytest.approx(recorded, rel=1e-6)


# --- a search


@pytest.mark.parametrize(("name", "field"), [("pc_darts", None), ("dsrna", "jacobian"), ("advrush", "curvature")])
def test_the_log_tells_the_term_once_it_counts(name: str, field: str | None, tmp_path: Path) -> None:
    settings = load(name).settings(
        out=tmp_path,
        source=Source(data="digits", limit_per_class=8),
        space=SearchSpace(cells=2, channels=4, nodes=1),
        perturbation=Perturbation(attack_steps=1),
        epochs=2,
        warmup=1,
        batch_size=16,
        monitor=20,
        device="cpu",
    )
    search(settings)
    first, second = (e for e in read_log(tmp_path) if e["event"] == "epoch")
    if field is None:
        assert (first["phase"], second["phase"]) == ("warmup", "search")
        assert (first["alpha_loss"], second["alpha_loss"] is None) == (None, False)
    else:
        assert first[field] is None
        assert second[field] > 0


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: ten_losses(name, Supernet) for name in NAMES}, indent=1) + "\n")
