"""bfloat16 passes, recomputed cells, no TF32: what `--precision` and `--save-memory` change, and what they must not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.fast.test_supernet import images, in_both_forms, pair
from tests.nas.test_search import SMALL as SMALL_SEARCH
from tests.nas.test_search import assert_same_run
from tests.training.test_train import SMALL as SMALL_TRAIN
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.compute.freezing import frozen
from rnas.compute.precision import Precision, full_precision
from rnas.data import load
from rnas.errors import RnasError
from rnas.fast.cpu_kernels import centered
from rnas.fast.supernet import FastCell, FastSupernet
from rnas.genotype import OPERATIONS
from rnas.nas.search import search
from rnas.nets.derived import DerivedNetwork
from rnas.nets.space import CellWeights, Shape
from rnas.nets.supernet import Supernet, SupernetCell
from rnas.nets.zoo import build
from rnas.settings import Perturbation, SearchSpace, Source
from rnas.training.train import fit, train
from rnas.vulnerability import network_vulnerability
from supernets import craft, given, searching, weight_step, weights

SEARCH = replace(
    SMALL_SEARCH,
    source=Source(data="digits", limit_per_class=6),
    perturbation=Perturbation(attack_steps=1),
    epochs=2,
    batch_size=16,
    monitor=20,
    projection_steps=3,
)
TRAIN = replace(SMALL_TRAIN, source=Source(data="digits", limit_per_class=6), epochs=1)
FP32, BF16 = Precision(), Precision(bf16=True)
CPU = torch.device("cpu")


def off(a: list[Tensor], b: list[Tensor]) -> float:
    """The norm of the difference of two lists of tensors, relative to the norm of the first."""
    differences = torch.stack([(p.double() - q.double()).norm() for p, q in zip(a, b, strict=True)])
    return float(differences.norm() / torch.stack([p.double().norm() for p in a]).norm())


def passed(
    forward: Callable[[Tensor], tuple[Tensor, list[Tensor]]], net: nn.Module, x: Tensor, precision: Precision
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, BN's buffers, and the gradients for `x` and every parameter."""
    x = x.clone().requires_grad_()
    with precision.autocast(x.device):
        last, others = forward(x)
    outputs = [last, *others]
    generator = torch.Generator().manual_seed(2)
    loss = sum((out.float() * torch.randn(out.shape, generator=generator)).mean() for out in outputs)
    gradients = torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True, materialize_grads=True)
    return [out.detach() for out in outputs], [b.clone() for b in net.buffers()], list(gradients)


@in_both_forms
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_fast_supernet_is_as_close_to_float32_as_the_plain_one(train: bool) -> None:
    """Torch's own autocast of the plain supernet is the measure; in an untrained network gradients are far off."""
    x = images(4, 16, torch.float32)
    plain, fast = (net.train(train) for net in pair(dtype=torch.float32))
    expected = passed(lambda x: plain.forward_cells(x, weights(plain)), plain, x, FP32)
    plain, fast = (net.train(train) for net in pair(dtype=torch.float32))
    torchs = passed(lambda x: plain.forward_cells(x, weights(plain)), plain, x, BF16)
    ours = passed(lambda x: fast.forward_cells(x, weights(fast)), fast, x, BF16)
    for tolerance, exact, theirs, own in zip((0.03, 2e-3, 0.5), expected, torchs, ours, strict=True):
        assert off(exact, own) <= min(1.5 * off(exact, theirs), tolerance)
    assert all(out.dtype == torch.bfloat16 for out in ours[0])
    assert all(b.dtype in (torch.float32, torch.int64) for b in ours[1])
    assert all(g.dtype == torch.float32 for g in ours[2])


@in_both_forms
@pytest.mark.parametrize(
    "operations",
    [OPERATIONS, ("none", "max_pool_3x3"), ("none", "skip_connect")],
    ids=["all", "pool", "skip"],
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_one_cell_in_bfloat16(reduction: bool, train: bool, operations: tuple[str, ...]) -> None:
    """Where no depth magnifies the rounding: outputs to half a per cent, running statistics to a thousandth."""
    space = SearchSpace(nodes=1, operations=operations)
    torch.manual_seed(3)
    plain = SupernetCell(Shape(space), 6, 8, 8, reduction, False).train(train)
    fast = FastCell(Shape(space), 6, 8, 8, reduction, False).train(train)
    fast.load_state_dict(plain.state_dict())
    weights = torch.rand(space.edges, len(space.operations))
    x = torch.randn(8, 14, 8, 8)
    results = []
    for cell, precision in ((plain, FP32), (fast, BF16)):
        results.append(
            passed(lambda x, cell=cell: (cell(x[:, :6], x[:, 6:], CellWeights(weights)), []), cell, x, precision)
        )
    for expected, ours, tolerance in zip(*results, (0.01, 1e-3, 0.12), strict=True):
        assert off(expected, ours) < tolerance


def test_statistics_are_summed_in_float32() -> None:
    """4096 values near 100: their sum and the sum of their squares need more than bfloat16's eight bits."""
    x = (100 + torch.randn(4, 2, 32, 32)).bfloat16()
    exact = x.double()
    z, mean, var = centered(x)
    assert z.dtype == torch.bfloat16
    assert mean.dtype == var.dtype == torch.float32
    assert torch.allclose(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6)
    assert torch.allclose(var.double(), exact.var((0, 2, 3), unbiased=False), rtol=5e-3)


def test_f_is_float32() -> None:
    """Of bfloat16 features, but the softmax and the KL are not: they are those of the same features in float64."""
    _, fast = pair(dtype=torch.float32)
    method = searching(fast).method
    x, x_adv = images(4, 16, torch.float32), images(4, 16, torch.float32).flip(0)
    value = method.vulnerability(BF16)(fast, x, x_adv)[1]
    with BF16.autocast(CPU):
        features = [fast.forward_cells(images, method.weights())[1] for images in (x, x_adv)]
    assert all(f.dtype == torch.bfloat16 for f in features[0])
    assert value.dtype == torch.float32
    exact = network_vulnerability(*([f.double() for f in side] for side in features))
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)
    assert value.item() == pytest.approx(method.vulnerability()(fast, x, x_adv)[1].item(), rel=0.05)


@pytest.mark.parametrize("name", ["supernet", "RNAS-L", "ResNet18"])
def test_a_step_in_bfloat16(name: str) -> None:
    """The attack and the update: loss, logits, weights and momentum are float32, and the loss is close to float32's."""
    torch.manual_seed(0)
    size = {"cells": 3, "channels": 4} if name == "RNAS-L" else {}
    net = FastSupernet(SearchSpace(cells=3, channels=4), 10) if name == "supernet" else build(name, 10, **size)
    x, y = images(8, 16, torch.float32), torch.arange(8)
    losses = []
    for precision in (FP32, BF16):
        twin = copy.deepcopy(net)
        thetas = twin.thetas if isinstance(twin, FastSupernet) else list(twin.parameters())
        optimizer = torch.optim.SGD(thetas, 0.01, momentum=0.9)
        attack = PGD(steps=2, random_start=False)
        loss, logits = weight_step(twin, thetas, optimizer, attack, x, y, 5.0, precision=precision)
        assert loss.dtype == logits.dtype == torch.float32
        assert all(t.dtype in (torch.float32, torch.int64) for t in twin.state_dict().values())
        assert all(s["momentum_buffer"].dtype == torch.float32 for s in optimizer.state.values())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0], "nothing was computed in bfloat16"


@pytest.mark.parametrize("name", ["RNAS-L", "ResNet18"])
def test_an_attack_keeps_the_fast_form_of_a_network(name: str) -> None:
    """The folded weights are converted once, and are float32 again without autocast."""
    size = {"cells": 3, "channels": 4} if name == "RNAS-L" else {}
    net = build(name, 10, **size).eval()
    x = images(4, 16, torch.float32)
    expected = net(x).detach()
    with BF16.autocast(CPU), frozen(net) as fixed:
        logits = fixed(x).detach()
        assert all(c.weight.dtype == torch.bfloat16 for c in fixed.convolutions)
    assert logits.dtype == torch.bfloat16
    assert off([expected], [logits]) < 0.03
    with frozen(net) as fixed:
        assert torch.allclose(fixed(x), expected, rtol=1e-4, atol=1e-5)


def test_an_attack_in_bfloat16_leaves_the_supernet_alone() -> None:
    _, fast = pair(dtype=torch.float32)
    fast.train()
    before = copy.deepcopy(fast.state_dict())
    x, y = images(4, 16, torch.float32), torch.arange(4)
    with frozen(fast, *given(fast)) as fixed, torch.no_grad():
        expected = fixed(x)
    with BF16.autocast(CPU), frozen(fast, *given(fast)) as fixed, torch.no_grad():
        assert off([expected], [fixed(x)]) < 0.02
    x_adv = craft(PGD(steps=3), fast, x, y, BF16)
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
    with torch.no_grad():
        losses = [F.cross_entropy(fast.eval()(images, *given(fast)), y) for images in (x, x_adv)]
    assert losses[1] > losses[0]
    assert all(torch.equal(before[name], t) for name, t in fast.state_dict().items())


def test_searches_in_either_precision_are_two_runs(tmp_path: Path) -> None:
    """A run from before there was a choice goes on in float32; memory makes no other run."""
    settings = replace(SEARCH, out=tmp_path, precision="bf16")
    search(settings)
    with pytest.raises(RnasError, match='precision was "bf16", now "fp32"'):
        search(replace(settings, precision="auto", resume=True))
    search(replace(settings, resume=True, save_memory=True))
    settings = replace(settings, out=tmp_path / "old", precision="auto")
    search(settings)
    file = tmp_path / "old" / "settings.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "precision"}))
    search(replace(settings, precision="fp32", resume=True))
    with pytest.raises(RnasError, match='precision was "fp32", now "bf16"'):
        search(replace(settings, precision="bf16", resume=True))


def test_a_search_that_saves_memory_is_the_same_search(tmp_path: Path) -> None:
    settings = replace(SEARCH, bound="0.5x")
    search(replace(settings, out=tmp_path / "plain"))
    search(replace(settings, out=tmp_path / "saving", save_memory=True))
    assert_same_run(tmp_path / "plain", tmp_path / "saving")


@pytest.mark.parametrize("beta", [None, 6.0], ids=["pgd", "trades"])
def test_a_training_that_saves_memory_is_the_same_training(beta: float | None) -> None:
    """Drop-path drops the same paths, and BN's running statistics are updated once: bit for bit."""
    torch.manual_seed(0)
    net = build("RNAS-L", 10, cells=3, channels=4)
    net.set_drop_path(0.5)
    x, y = images(6, 16, torch.float32), torch.arange(6)
    states = []
    for save in (False, True):
        twin = copy.deepcopy(net)
        twin.save_memory(save)
        parameters = list(twin.parameters())
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
        torch.manual_seed(1)
        losses = [weight_step(twin, parameters, optimizer, PGD(steps=1), x, y, 5.0, beta)[0] for _ in range(3)]
        states.append([*losses, *twin.state_dict().values(), torch.rand(1)])
    assert all(map(torch.equal, *states))


def test_training_takes_the_flags(tmp_path: Path) -> None:
    net = train(replace(TRAIN, out=tmp_path, save_memory=True, precision="bf16"))
    assert isinstance(net, DerivedNetwork)
    assert net.saving_memory
    assert json.loads((tmp_path / "settings.json").read_text())["precision"] == "bf16"
    with pytest.raises(RnasError, match='precision was "bf16", now "fp32"'):
        train(replace(TRAIN, out=tmp_path, resume=True))


def kept_bytes(net: Supernet | nn.Module, x: Tensor) -> int:
    """What autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = net.train()(x, *given(net))
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["supernet", "RNAS-L"])
def test_saving_memory_saves_memory(kind: str) -> None:
    net = FastSupernet(SearchSpace(cells=4, channels=4), 10) if kind == "supernet" else build(kind, 10, cells=4)
    x = images(4, 16, torch.float32)
    before = kept_bytes(net, x)
    net.save_memory()
    assert kept_bytes(net, x) < 0.3 * before
    net.save_memory(False)
    assert kept_bytes(net, x) > 0.7 * before


def test_saving_memory_is_for_cell_networks(tmp_path: Path) -> None:
    with pytest.raises(RnasError, match="save-memory is for cell networks, and ResNet18 is none"):
        train(replace(TRAIN, arch="ResNet18", out=tmp_path / "run", save_memory=True))
    assert not (tmp_path / "run").exists()


def test_float32_is_float32(tmp_path: Path) -> None:
    """No TF32 while a run computes; afterwards, and after an error, what the process had chosen."""
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    seen = []

    class Looking(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.append([part.fp32_precision for part in parts])
            return super().forward(x)

    before = [part.fp32_precision for part in parts]
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        net = Looking(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
        fit(net, load("digits"), replace(TRAIN, out=tmp_path, standard=True, epochs=1, batch_size=512))
        assert seen
        assert all("tf32" not in precisions for precisions in seen)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        with pytest.raises(ZeroDivisionError), full_precision():
            raise ZeroDivisionError
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


@pytest.mark.gpu
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_bfloat16_on_a_gpu(train: bool) -> None:
    plain, fast = (net.cuda().train(train) for net in pair(dtype=torch.float32))
    x = images(4, 16, torch.float32).cuda()
    with full_precision(), torch.no_grad():
        expected = plain.forward_cells(x, weights(plain))[1]
        with BF16.autocast(x.device):
            ours = fast.forward_cells(x, weights(fast))[1]
    assert all(out.dtype == torch.bfloat16 for out in ours)
    assert off(expected, ours) < 0.03
