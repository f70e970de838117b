"""What runs on a GPU, without one: torch's `meta` device has shapes but no values.

There every read of a value by the host raises, and so does every operation that mixes devices. What passes here never
makes the host wait for a GPU, and its kernels can be counted.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import search_step
from benchmarks.kernels import batch_shares, count, launched
from torch import Tensor

from rnas.attacks import CW, FGSM, PGD
from rnas.compute import checkpoint
from rnas.fast.supernet import FastSupernet
from rnas.nets.zoo import build
from rnas.records.folder import Run
from rnas.settings import SearchSpace
from supernets import given, searching, weight_step

META = torch.device("meta")


def images(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 32, 32, device=META), torch.zeros(n, dtype=torch.long, device=META)


def supernet() -> FastSupernet:
    with META:
        return FastSupernet(SearchSpace(cells=3, channels=2, nodes=2), 10)


def test_a_value_cannot_be_read_there() -> None:
    """Or else the other tests would show nothing."""
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros((), device=META).item()
    with pytest.raises(RuntimeError, match="meta"):
        _ = torch.zeros(2, device=META) + torch.zeros(2)


@pytest.mark.parametrize("save_memory", [False, True])
def test_a_search_never_waits_for_the_device(save_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = supernet(), images()
    net.save_memory(save_memory)
    monkeypatch.setattr("rnas.nas.engine.check_finite", lambda *_: None)  # it reads the loss: once a step
    with META:
        engine = searching(net)
    for _ in range(2):
        engine.descend_weights(engine.adversarial(x, y), y)
        engine.method.descend_alphas(engine, x, y)
        _, gradients = engine.method.slope_of_f(engine, x, x)
    seen = [engine.weights_seen.sums, engine.architecture_seen.sums]
    assert all(t.device == META for t in [*seen, *gradients, *(p.grad for p in net.thetas if p.grad is not None)])


@pytest.mark.parametrize("beta", [None, 6.0], ids=["PGD", "TRADES"])
@pytest.mark.parametrize("arch", ["RNAS-L", "ResNet18"])
def test_training_never_waits_for_the_device(arch: str, beta: float | None) -> None:
    with META:
        net = build(arch, classes=10, **({} if arch == "ResNet18" else {"cells": 5, "channels": 4}))
    thetas, (x, y) = list(net.parameters()), images()
    optimizer = torch.optim.SGD(thetas, 0.1, momentum=0.9)
    loss, logits = weight_step(net, thetas, optimizer, PGD(), x, y, clip=5.0, trades_beta=beta)
    assert loss.device == logits.device == META


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=3), PGD(steps=3, norm="l2"), CW(steps=3)])
def test_an_attack_never_waits_for_the_device(attack: FGSM | PGD | CW) -> None:
    x, y = images()
    net = supernet().eval()
    assert attack.perturb(net.frozen_view(*given(net)), x, y).device == META


def test_the_fast_supernet_launches_a_fraction_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plain one's: a GPU that waits for launches is as fast as they are few. Three cells of eight."""
    monkeypatch.setattr(search_step, "SearchSpace", lambda: SearchSpace(cells=3, channels=2))
    for step, counted in count(("pgd", "weight")).items():
        assert counted["fast"] < 0.3 * counted["published"], (step, counted)
        assert counted["fast"] < 0.35 * counted["frozen"], (step, counted)


@pytest.mark.parametrize("size", [32, 64])
def test_a_batch_costs_under_three_percent_of_a_step(size: int) -> None:
    """As far as it can be known without a GPU; its time there is for test_data_batches.py to ask."""
    shares = batch_shares(size)
    assert min(shares.values()) > 0
    assert sum(shares.values()) < 0.03, shares


def test_views_are_no_kernels() -> None:
    x = torch.zeros(2, 3, device=META)
    assert launched(lambda: x.view(3, 2).t().unbind()) == (0, 0)
    assert launched(lambda: x + x[:1].expand(2, 3)) == (1, 3 * 24)
    assert launched(lambda: (x + 1).relu_())[0] == 2


def test_a_resumed_optimiser_counts_its_steps_on_the_host(tmp_path: Path) -> None:
    """Adam reads the count: from a GPU, where a checkpoint loaded there would put it, that makes the host wait."""

    def adam(device: str) -> torch.optim.Adam:
        return torch.optim.Adam([torch.nn.Parameter(torch.ones(3, device=device))])

    before = adam("cpu")
    before.param_groups[0]["params"][0].grad = torch.ones(3)
    before.step()
    run = Run(tmp_path, {})
    checkpoint.save(run, {"optimizer": before.state_dict()})
    saved = checkpoint.load(run)
    assert saved is not None
    resumed = adam("meta")
    resumed.load_state_dict(saved["optimizer"])
    (state,) = resumed.state.values()
    assert state["exp_avg"].device.type == "meta", "moved to where its parameter is"
    assert state["step"].device.type == "cpu"
