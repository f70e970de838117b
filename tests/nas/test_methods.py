"""Search methods: what the engine promises them, DARTS in closed form, and a method of one's own."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.cli import main
from rnas.fast.supernet import FastSupernet
from rnas.nas.engine import Engine, Halves
from rnas.nas.methods import load, names
from rnas.nas.methods.darts import Darts, second_order, virtual_step
from rnas.nas.methods.darts import Settings as DartsSettings
from rnas.nas.objectives import ImageCrossEntropy
from rnas.nas.search import search
from rnas.nets.space import Shape, Weights, uniform
from rnas.nets.supernet import Supernet
from rnas.records.folder import read_log
from rnas.settings import Perturbation, SearchSpace, Source
from supernets import searching

SPACE = SearchSpace(cells=3, channels=4, nodes=2)
TINY = SearchSpace(cells=2, channels=2, nodes=1)
SMALL = {
    "source": Source(data="digits", limit_per_class=8),
    "space": SearchSpace(cells=2, channels=4, nodes=1),
    "perturbation": Perturbation(attack_steps=1),
    "batch_size": 16,
    "monitor": 20,
    "device": "cpu",
}
FLAGS = (
    "--data digits --limit-per-class 8 --cells 2 --channels 2 --nodes 1 --attack-steps 1 --batch-size 16 --monitor 20 "
    "--device cpu --epochs 1"
).split()


def images(n: int = 4, size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)), torch.arange(n)


# --- the engine


def test_shifted_weights_come_back_bit_for_bit() -> None:
    net = FastSupernet(SPACE, 10)
    engine = searching(net)
    before = {name: t.clone() for name, t in net.state_dict().items() if isinstance(t, Tensor)}
    direction = [torch.randn_like(p) for p in net.thetas]
    with engine.shifted(net.thetas, direction, 0.1):
        torch.testing.assert_close(net.thetas[0].detach(), before["stem.0.weight"] + 0.1 * direction[0])
        engine.logits(images()[0])  # in train mode: running statistics move
    after = net.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_calibrated_statistics_are_the_means_of_batches_and_come_back() -> None:
    net = FastSupernet(SPACE, 10)
    engine = searching(net)
    bn = net.stem[1]
    before = bn.running_mean.clone()
    batches = [images(8)[0], 1 - images(8)[0]]
    with engine.calibrated(batches), torch.no_grad():
        expected = torch.stack([net.stem[0](net.normalize(x)).mean((0, 2, 3)) for x in batches]).mean(0)
        torch.testing.assert_close(bn.running_mean, expected)
    assert torch.equal(bn.running_mean, before)
    assert bn.momentum == 0.1


def double_backward(net: Supernet, terms: list, y: Tensor, wanted: list, norm: str, squared: bool) -> tuple:
    """R and its gradients by the definition."""
    d = 0.0
    for s, x in terms:
        x = x.clone().requires_grad_()
        loss = F.cross_entropy(net(x, net.architecture.weights()), y, reduction="sum")
        d = d + s * torch.autograd.grad(loss, x, create_graph=True)[0]
    size = d.flatten(1).norm(p=1 if norm == "l1" else 2, dim=1)
    value = (size.square() if squared else size).mean()
    return value, torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(("norm", "squared"), [("l2", False), ("l2", True), ("l1", False)])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("two", [False, True], ids=["one term", "two terms"])
def test_the_gradient_of_an_input_gradients_norm(two: bool, train: bool, norm: str, squared: bool) -> None:
    """On the fast supernet, which is differentiable once; the definition on the plain one. In float64, where so small a
    shift meets no kink."""
    torch.manual_seed(0)
    plain, fast = Supernet(TINY, 10).double(), FastSupernet(TINY, 10).double()
    engines = [searching(net) for net in (plain, fast)]
    fast.load_state_dict(plain.state_dict())
    x, y = images()
    x = x.double()
    terms = [(1.0, x + 0.05 * torch.randn_like(x)), (-1.0, x)] if two else [(1.0, x)]
    wanted = list(plain.architecture.parameters())
    plain.train(train)
    value, expected = double_backward(plain, terms, y, wanted, norm, squared)
    before = [b.clone() for b in fast.buffers()]
    parameters = list(fast.architecture.parameters())
    slope = engines[1].input_term(
        ImageCrossEntropy(),
        terms,
        y,
        parameters,
        norm=norm,
        squared=squared,
        eps=1e-8,
        train=train,
    )
    assert slope.loss.item() == pytest.approx(value.item(), rel=1e-6)
    ours, theirs = (torch.cat([g.flatten() for g in grads]) for grads in (slope.grads, expected))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=0.1)
    assert all(map(torch.equal, before, fast.buffers()))


# --- DARTS


class Toy(nn.Module):
    """A network of one vector w, beside an architecture of one vector α."""

    def __init__(self, w: Tensor, alpha: Tensor):
        super().__init__()
        self.w = nn.Parameter(w)
        self.architecture = nn.ParameterList([nn.Parameter(alpha)])

    @property
    def thetas(self) -> list[nn.Parameter]:
        return [self.w]


@dataclass(frozen=True)
class Quadratic:
    """½‖A w − B α‖², with A and B as inputs."""

    def __call__(self, net: Toy, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        loss = 0.5 * (a @ net.w - b @ net.architecture[0] - c).square().sum()
        return loss, loss


def toy(w: Tensor, alpha: Tensor, xi: float) -> Engine:
    settings = DartsSettings(out=Path(), weight_decay=0.01, clip=1e9)
    engine = Engine(Darts(settings), None, Halves(None, None, 1, settings, torch.device("cpu")))
    engine.net = Toy(w, alpha)
    engine.optimizer = torch.optim.SGD(engine.net.thetas, xi, 0.9, weight_decay=0.01)
    return engine


def test_the_second_order_is_exact_for_quadratics() -> None:
    """−ξ·(∂²L_train/∂α∂w)·∇L_val(w') = ξ·BᵀA·∇L_val(w'); with momentum and weight decay in w'."""
    torch.manual_seed(0)
    a, b, v = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    w, alpha, c = (torch.randn(n, dtype=torch.float64) for n in (3, 3, 4))
    xi, zero, momentum = 0.1, torch.zeros(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    engine = toy(w, alpha, xi)
    engine.optimizer.state[engine.net.w]["momentum_buffer"] = momentum
    train, validation = (a, b, torch.zeros(4, dtype=torch.float64)), (v, zero, c)
    slope = second_order(engine, list(engine.net.architecture), Quadratic(), train, lambda: validation)
    ahead = w - xi * (0.9 * momentum + a.T @ (a @ w - b @ alpha) + 0.01 * w)
    expected = xi * b.T @ a @ v.T @ (v @ ahead - c)
    torch.testing.assert_close(slope.grads[0], expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(engine.net.w.detach(), w), "put back"


def test_a_scalar_by_hand() -> None:
    """L_train = ½(w − α)², L_val = ½(w − c)²: ∇_α = ξ(w' − c)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    engine = toy(torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64), 0.1)
    engine.optimizer.param_groups[0]["weight_decay"] = 0.0
    nothing, c = torch.zeros(1, dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    slope = second_order(
        engine, list(engine.net.architecture), Quadratic(), (one, one, nothing), lambda: (one, 0 * one, c)
    )
    assert slope.grads[0].item() == pytest.approx(0.1 * (2 - 0.1 * 1.5 - 1))


def test_the_virtual_step_is_the_real_one() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], 0.1, 0.9, weight_decay=0.01)
    for _ in range(3):
        grad = 3 * torch.randn(5, dtype=torch.float64)
        expected = p.detach() - 0.1 * virtual_step(optimizer, [p], [grad], 1.0)[0]
        p.grad = grad.clone()
        nn.utils.clip_grad_norm_([p], 1.0)
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected)


def ten_losses(order: int, adversarial: bool, net: type[Supernet]) -> list[float]:
    """The training losses of weights and α of five steps each, in float64, on images that no rounding can turn."""
    torch.manual_seed(0)
    engine = searching(
        net(SPACE, 10),
        method=Darts,
        kind=DartsSettings,
        out=Path(),
        order=order,
        adversarial=adversarial,
        alpha_lr=0.01,
    )
    engine.attack = replace(engine.attack, norm="l2", eps=1.0, step=0.3, steps=2, random_start=False)
    engine.net.double()
    x, y = images(16, 8)
    batches = iter([(x[:8].double(), y[:8] % 10), (x[8:].double(), y[8:] % 10)] * 5)
    losses = []
    for (x, y), (x_val, y_val) in zip(batches, batches, strict=True):
        losses.append(engine.method.descend_alphas(engine, x, y, x_val, y_val).loss.item())
        losses.append(engine.descend_weights(engine.adversarial(x, y) if adversarial else x, y).loss.item())
    return losses


GOLDEN = Path(__file__).parents[1] / "golden" / "darts_losses.json"


@pytest.mark.parametrize("adversarial", [False, True], ids=["clean", "adversarial"])
@pytest.mark.parametrize("order", [1, 2])
def test_darts_losses_are_those_recorded(order: int, adversarial: bool) -> None:
    """Of the plain supernet; `python tests/test_methods.py` records them anew."""
    recorded = json.loads(GOLDEN.read_text())[f"{order} {adversarial}"]
    assert ten_losses(order, adversarial, FastSupernet) == pytest.approx(recorded, rel=1e-5)


# --- every method

QUICK = {"rnas": {"warmup": 0}, "robnet": {"candidates": 2, "finetune": 1}, "random": {"candidates": 2}}
"""What of a method's settings makes a small search of it."""


@pytest.mark.parametrize("name", names())
def test_one_epoch_of_every_method(name: str, tmp_path: Path) -> None:
    """The same files and the same fields, whatever the method."""
    found = load(name)
    architecture = search(found.settings(out=tmp_path, epochs=1, **QUICK.get(name, {}), **SMALL))
    assert architecture.to_json() == json.loads((tmp_path / "genotype.json").read_text())
    event = next(e for e in read_log(tmp_path) if e["event"] == "epoch")
    assert event["genotype"] is not None
    assert np.isfinite([event["theta_loss"], event["F"], event["train"]["clean_accuracy"], event["lr"]]).all()
    with np.load(tmp_path / "strengths.npz") as strengths:
        assert strengths["operations"].tolist() == list(SMALL["space"].operations)
        assert all(strengths[k].shape == (2, 2, 8) and (strengths[k] >= 0).all() for k in ("normal", "reduce"))
    costs = [found.method.cost(found.settings(out=tmp_path), epoch, 100.0) for epoch in (1, 50)]
    assert all(c.passes > 0 and c.attacks >= 0 for c in costs)


@pytest.mark.parametrize("name", [n for n in names() if n != "rnas"])
def test_resumed_is_uninterrupted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off in the middle of a random step."""
    settings = load(name).settings(out=tmp_path / "whole", epochs=3, **QUICK.get(name, {}), **SMALL)
    search(settings)
    step, steps = 0, int(np.random.default_rng().integers(3, 6))  # of two in an epoch: after the first
    slope = Engine.slope

    def cut(self: Engine, *args: object, **kwargs: object) -> object:
        nonlocal step
        step += 1
        if step > steps:
            raise KeyboardInterrupt
        return slope(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "slope", cut)
        with pytest.raises(KeyboardInterrupt):
            search(replace(settings, out=tmp_path / "cut"))
    search(replace(settings, out=tmp_path / "cut", resume=True))
    ours, theirs = (torch.load(tmp_path / f / "checkpoint.pt", weights_only=True)["net"] for f in ("whole", "cut"))
    assert all(torch.equal(t, theirs[k]) if isinstance(t, Tensor) else t == theirs[k] for k, t in ours.items())
    assert len({(tmp_path / f / "genotype.json").read_text() for f in ("whole", "cut")}) == 1


# --- a method of one's own


def example() -> str:
    """The whole method of the documentation."""
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def test_the_documented_method_runs(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(example(), encoding="utf-8")
    main(["search", "--method", str(file), "--entropy", "0.2", *FLAGS, "--out", str(tmp_path / "run")])
    (event,) = (e for e in read_log(tmp_path / "run") if e["event"] == "epoch")
    assert event["entropy_factor"] == pytest.approx(0.2)
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["entropy"] == 0.2
    file.write_text(example() + "\n# another file\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["search", "--method", str(file), "--entropy", "0.2", *FLAGS, "--out", str(tmp_path / "run"), "--resume"])


HEAD = """
import torch
from rnas.nas.methods.base import Method
from rnas.nets.space import Weights

class Mine(Method):
    def begin(self, shape): pass
    def weights(self): return {}
    def epoch(self, engine): return {{}}
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import nothing_of_this_name", "mine.py, line 1,"),
        ("x = (", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
        ("x = 1", "0 subclasses of Method"),
        (HEAD.format("None") + "\nclass Other(Mine): pass", "2 subclasses of Method"),
        (HEAD.format("None"), "NoneType"),
        (HEAD.format("Weights((torch.ones(2, 7),) * 2)"), "(2, 7)"),
        (HEAD.format("Weights((torch.full((2, 8), float('nan')),) * 2)"), "NaN"),
        (HEAD.format("Weights((torch.ones(2, 8),) * 3)"), "2 tensors"),
    ],
)
def test_a_file_that_holds_no_method(text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as exit_:
        main(["search", "--method", str(file), *FLAGS, "--out", str(tmp_path / "run")])
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--method", "dart"], "darts"),
        (["--method", "nowhere/mine.py"], "nowhere/mine.py"),
        (["--method", "darts", "--bound", "0.5x"], "rnas"),
        (["--method=darts", "--projection-steps=3"], "rnas"),
    ],
)
def test_bad_command_lines(arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["search", *arguments, *FLAGS, "--out", str(tmp_path / "run")])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]
    assert not (tmp_path / "run").exists()


def test_each_methods_help_shows_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for name, flag in (("darts", "--order"), ("rnas", "--bound")):
        with pytest.raises(SystemExit):
            main(["search", "--method", name, "--help"])
        assert flag in capsys.readouterr().out


def test_weights_come_apart_and_together() -> None:
    from rnas.nets.space import apart, together

    w = uniform(Shape(SPACE, part=4))
    tensors, forms = apart([torch.ones(1), w, torch.zeros(2)])
    assert len(tensors) == 6
    assert hash(forms) == hash(apart([torch.zeros(1), w, torch.zeros(2)])[1])
    first, again, last = together(tensors, forms)
    assert isinstance(again, Weights)
    assert all(map(torch.equal, again.tensors, w.tensors))
    assert (len(first), len(last)) == (1, 2)


if __name__ == "__main__":
    cases = {f"{order} {adv}": ten_losses(order, adv, Supernet) for order in (1, 2) for adv in (False, True)}
    GOLDEN.write_text(json.dumps(cases, indent=1) + "\n")
