"""On a GPU: the whole pipeline, attacks that agree with the CPU's, and steps that never make the host wait."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rnas
from rnas.attacks import PGD
from rnas.cli import main
from rnas.compute.device import own_random_numbers, reseed
from rnas.compute.precision import Precision
from rnas.data import load
from rnas.deploy.export import export
from rnas.fast import recording as graphs
from rnas.fast.supernet import FastSupernet
from rnas.settings import SearchSpace
from rnas.training.adversarial import craft_trades
from supernets import craft, searching, weight_step

pytestmark = pytest.mark.gpu
SMALL = (
    "run --device cuda --channels 4 --cells 2 --search-epochs 2 --train-epochs 1 --batch-size 32 --limit 40 "
    "--limit-per-class 8 --attacks fgsm pgd2"
).split()


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x.sum() > 0),
    "cpu": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(3).cuda(),
    "a mask as index": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
}
MIXING: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda x, host: x + host,
    "convolution": lambda x, host: torch.nn.functional.conv1d(x.view(1, 1, 3), host.view(1, 1, 3)),
    "index of a GPU's": lambda x, host: host[x.long()],
    "values of the host's": lambda x, host: x.index_put_((torch.arange(3, device="cuda"),), host),
    "generator of the host's": lambda x, host: x.uniform_(generator=torch.Generator()),
}


@pytest.mark.parametrize("what", WAITING)
def test_waiting_is_noticed(what: str) -> None:
    """Or else the tests that nothing waits would show nothing; after a recording, too."""
    x = torch.ones(3, device="cuda")
    WAITING[what](x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x.mul_(2).sum()
        with pytest.raises(RuntimeError, match="synchronizing"):
            WAITING[what](x)
        replay, twice = graphs.record(lambda: 2 * x, x.device)
        with pytest.raises(RuntimeError, match="synchronizing"):
            WAITING[what](x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x.fill_(3)
    replay()
    assert twice.tolist() == [6, 6, 6]


@pytest.mark.parametrize("what", MIXING)
def test_mixing_devices_is_refused(what: str) -> None:
    """Or else tests would pass here and the code would fail elsewhere."""
    with pytest.raises(RuntimeError, match=r"device|type|indices"):
        MIXING[what](torch.zeros(3, device="cuda"), torch.zeros(3))


def test_forked_random_numbers_are_nobody_elses() -> None:
    """On the GPU as on the host; without the context both generators would start anew."""
    device = torch.device("cuda")
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    with own_random_numbers(device):
        reseed(1)
        torch.rand(3, device=device)
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_network_on_a_gpu_is_exported(tmp_path: Path) -> None:
    net = rnas.build("RNAS-L", classes=10, cells=3, channels=4, image_size=(16, 16)).cuda()
    before = copy.deepcopy(net.state_dict())
    export(net, {"classes": [str(k) for k in range(10)]}, "onnx", tmp_path / "model.onnx", image_size=16)
    assert (tmp_path / "model.onnx").exists()
    assert all(t.device.type == "cuda" and torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_whole_pipeline(precision: str, tmp_path: Path) -> None:
    main([*SMALL, "--precision", precision, "--out", str(tmp_path)])
    for name in ("model.onnx", "report.html", "search/alphas.npz", "train/masks.npz"):
        assert (tmp_path / name).exists(), name
    on = json.loads((tmp_path / "environment.json").read_text())["device"]
    assert on.startswith(f"cuda ({torch.cuda.get_device_name()}, ")
    assert set(json.loads((tmp_path / "train" / "evaluation.json").read_text())["attacks"]) == {"fgsm", "pgd2"}
    (tmp_path / "search" / "genotype.json").unlink()  # as if killed before the end: go on from the last checkpoint
    main([*SMALL, "--precision", precision, "--out", str(tmp_path), "--resume"])
    assert (tmp_path / "search" / "genotype.json").exists()


def test_an_evaluation_agrees_with_the_cpu() -> None:
    """Every image has a random stream of its own, on every device: what differs is rounding."""
    digits = load("digits")
    model = rnas.build("RNAS-L", classes=10, cells=3, channels=4, image_size=(16, 16)).eval()
    x, y = digits.test.images[:64].float() / 255, digits.test.labels[:64]
    attacks = ["fgsm", "pgd20", "cw", "apgd-ce", "apgd-t", "fab-t", "square"]
    results = [
        rnas.evaluate(model.to(device), x.to(device), y.to(device), attacks=attacks, eps=2 / 255, seed=0)
        for device in ("cpu", "cuda")
    ]
    for name in ("clean", *attacks):
        assert (results[0].masks[name] != results[1].masks[name]).sum() <= 2, name


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_of_a_search_makes_the_host_wait(
    precision: str, save_memory: bool, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNAS_CUDA_GRAPHS", str(int(recorded)))
    monkeypatch.setattr(graphs, "is_quicker", lambda launched, replayed_in: True)
    net = FastSupernet(SearchSpace(cells=3, channels=4, nodes=2), 10).cuda()
    net.save_memory(save_memory)
    monkeypatch.setattr("rnas.nas.engine.check_finite", lambda *_: None)  # it reads the loss: once a step
    engine = searching(net, precision=precision)
    x, y = torch.rand(8, 3, 16, 16, device="cuda"), torch.arange(8, device="cuda")

    def steps() -> None:
        engine.descend_weights(engine.adversarial(x, y), y)
        engine.method.descend_alphas(engine, x, y)
        engine.method.slope_of_f(engine, x, x)

    for _ in range(2):  # prepares kernels and optimisers; tries recordings of the attack and the steps
        steps()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(engine.weights_seen.sums + engine.architecture_seen.sums).all()
    if recorded:
        assert all(isinstance(r, graphs.Recorded) for r in graphs._kept[net].recorded.values())
        assert len(graphs._kept[net].recorded) == 4


@pytest.mark.parametrize("precision", [Precision(), Precision(bf16=True)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("crafting", ["linf", "l2", "TRADES"])
@pytest.mark.parametrize("arch", ["supernet", "RNAS-L", "ResNet18"])
def test_a_recorded_attack_is_the_attack(
    arch: str, crafting: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the weights of the moment. A warning (the recording failed, or gave another result) fails the test too."""
    monkeypatch.setattr(graphs, "is_quicker", lambda launched, replayed_in: True)
    torch.manual_seed(0)
    if arch == "supernet":
        net: torch.nn.Module = FastSupernet(SearchSpace(cells=3, channels=4, nodes=2), 10).cuda()
    else:
        size = {} if arch == "ResNet18" else {"cells": 5, "channels": 8, "image_size": (16, 16)}
        net = rnas.build(arch, classes=10, **size).cuda()
    attack = PGD(eps=1.0, step=0.25, norm="l2") if crafting == "l2" else PGD()
    x, y = torch.rand(8, 3, 16, 16, device="cuda"), torch.arange(8, device="cuda")

    def crafted(graphs: str) -> Tensor:
        monkeypatch.setenv("RNAS_CUDA_GRAPHS", graphs)
        torch.manual_seed(1)
        if crafting == "TRADES":
            if arch == "supernet":
                pytest.skip("a search has no such attack")
            return craft_trades(attack, net, x, precision)
        return craft(attack, net, x, y, precision)

    before = torch.zeros_like(x)
    for step in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            replayed = crafted("1")
        drawn = torch.cuda.get_rng_state()
        launched = crafted("0")
        assert torch.equal(torch.cuda.get_rng_state(), drawn), step
        moved = (launched - x).abs().mean()
        assert (replayed - launched).abs().mean() < 0.05 * moved, step
        assert (before - launched).abs().mean() > 0.2 * moved, "or else old weights would pass too"
        before = launched
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(torch.randn_like(p).sign())  # of the same size: TRADES finds no gradient at huge logits
    assert any(isinstance(r, graphs.Recorded) for r in graphs._kept[net].recorded.values())


def differ(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().sum() / wanted.abs().sum().clamp_min(1e-12))


@pytest.mark.parametrize("precision", [Precision(), Precision(bf16=True)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["supernet", "supernet, saving memory", "RNAS-L", "RNAS-L, TRADES", "ResNet18"])
def test_recorded_steps_are_the_steps(arch: str, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same state, on the weights, images, labels and random numbers of the moment: what they return, the
    gradients, the running statistics and the numbers drawn. A warning fails the test too."""
    monkeypatch.setattr(graphs, "is_quicker", lambda launched, replayed_in: True)
    torch.manual_seed(0)
    if arch.startswith("supernet"):
        net: torch.nn.Module = FastSupernet(SearchSpace(cells=3, channels=4, nodes=2), 10).cuda()
        net.save_memory("saving" in arch)
    else:
        size = {} if arch == "ResNet18" else {"cells": 5, "channels": 8, "image_size": (16, 16)}
        net = rnas.build(arch.split(",")[0], classes=10, **size).cuda()
        if size:
            net.set_drop_path(0.2)
    thetas = list(getattr(net, "thetas", net.parameters()))
    engine = searching(net, precision=precision.name) if isinstance(net, FastSupernet) else None
    parameters = list(net.parameters())
    beta = 6.0 if "TRADES" in arch else None

    def after(graphs: str, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Loss, logits, gradients and running statistics of a step of each kind (rates are 0: nothing else moves)."""
        monkeypatch.setenv("RNAS_CUDA_GRAPHS", graphs)
        torch.manual_seed(int(y.sum()))
        attack = PGD(steps=1) if beta else None
        result = list(weight_step(net, thetas, still, attack, x, y, 1e9, trades_beta=beta, precision=precision))
        grads = [p.grad.flatten().clone() for p in thetas if p.grad is not None]
        if engine is not None:
            engine.optimiser.param_groups[0].update(lr=0.0, weight_decay=0.0)
            slope = engine.method.descend_alphas(engine, x, y)
            result += [slope.loss, slope.aux, *(g.clone() for g in slope.grads)]
            f, grads = engine.method.slope_of_f(engine, x, (x + 0.05).clamp(0, 1))
            result += [f, *(g.clone() for g in grads)]
        floats = [b.flatten() for b in net.buffers() if b.is_floating_point()]
        counts = torch.stack([b for b in net.buffers() if not b.is_floating_point()])
        return *result, torch.cat(grads), torch.cat(floats), counts.double(), torch.cuda.get_rng_state().double()

    still = torch.optim.SGD(thetas, 0.0)
    before: tuple[Tensor, ...] | None = None
    for step in range(5):
        x, y = torch.rand(8, 3, 16, 16, device="cuda"), torch.randint(10, (8,), device="cuda")
        state = copy.deepcopy(net.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            replayed = after("1", x, y)
        net.load_state_dict(state)
        launched = after("0", x, y)
        tolerance = 0.15 if precision.bf16 or beta else 0.05  # TRADES's images differ, too: see above
        assert max(map(differ, replayed, launched)) < tolerance, (step, [*map(differ, replayed, launched)])
        assert torch.equal(replayed[-2], launched[-2])
        assert torch.equal(replayed[-1], launched[-1])
        if before is not None:
            assert differ(before[-4], launched[-4]) > 0.5, "or else old gradients would pass too"
        before = launched
        with torch.no_grad():
            for p in parameters:
                p.add_(0.1 * p.abs().mean() * torch.randn_like(p))
    recordings = graphs._kept[net].recorded
    assert any(key[0] is graphs.WEIGHTS for key in recordings)
    assert all(isinstance(r, graphs.Recorded) for r in recordings.values())


def test_recordings_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """And give it back with the last of them; then others are made."""
    monkeypatch.setenv("RNAS_CUDA_GRAPHS", "1")
    monkeypatch.setattr(graphs, "is_quicker", lambda launched, replayed_in: True)
    device = torch.device("cuda", 0)
    x, y = torch.rand(8, 3, 16, 16, device=device), torch.arange(8, device=device)
    for _ in range(2):
        nets = [FastSupernet(SearchSpace(cells=3, channels=4, nodes=2), 10).cuda() for _ in range(2)]
        for net in nets:
            optimizer = torch.optim.SGD(net.thetas, 0.01)
            for _ in range(4):
                weight_step(net, net.thetas, optimizer, PGD(steps=1), x, y, clip=5.0)
        assert len(graphs._graphs[device]) == 4
        assert len({graph.pool() for graph in graphs._graphs[device]}) == 1
        for net in nets:
            graphs.forget(net)
        assert len(graphs._graphs[device]) == 0


def test_a_recording_that_fails_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.__version__ < "2.13":
        pytest.skip("it would spoil torch's random numbers, which is why nothing is recorded there unasked")
    net = FastSupernet(SearchSpace(cells=3, channels=4, nodes=2), 10).cuda()
    monkeypatch.setenv("RNAS_CUDA_GRAPHS", "1")
    monkeypatch.setattr(FastSupernet, "frozen_view", lambda net, w: lambda x: net(x, w) * float(x.mean().item()))
    x, y = torch.rand(8, 3, 16, 16, device="cuda"), torch.arange(8, device="cuda")
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match="could not be recorded"):
        images = [craft(PGD(), net, x, y) for _ in range(3)]
    numbers = torch.rand(3, device="cuda")
    torch.manual_seed(1)
    monkeypatch.setenv("RNAS_CUDA_GRAPHS", "0")
    expected = [craft(PGD(), net, x, y) for _ in range(3)]
    assert torch.equal(numbers, torch.rand(3, device="cuda"))
    for a, b in zip(images, expected, strict=True):
        assert (a - b).abs().mean() < 0.05 * (b - x).abs().mean()
