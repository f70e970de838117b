"""What runs on a GPU, without one: torch's `meta` device has shapes but no values.

There every read of a value by the host raises, and so does every operation that mixes devices. What passes here never
makes the host wait for a GPU, and its kernels can be counted.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rnas.attacks import CW, FGSM, PGD
from rnas.frozen import _Fast
from rnas.methods.rnas import Rnas
from rnas.nets.fast import FastSupernet
from rnas.nets.supernet import Supernet
from rnas.nets.zoo import build
from rnas.settings import Search, SearchSpace
from rnas.steps import Running, weight_step

META = torch.device("meta")
SMALL = SearchSpace(cells=3, channels=2, nodes=2)


def images(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 32, 32, device=META), torch.zeros(n, dtype=torch.long, device=META)


@contextmanager
def on_meta() -> Iterator[None]:
    with torch.device(META):
        yield


def supernet(kind: type[Supernet] = FastSupernet, space: SearchSpace = SMALL) -> Supernet:
    with on_meta():
        return kind(space, 10)


def test_a_value_cannot_be_read_there() -> None:
    """Or else the other tests would show nothing."""
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros((), device=META).item()
    with pytest.raises(RuntimeError, match="meta"):
        _ = torch.zeros(2, device=META) + torch.zeros(2)


@pytest.mark.parametrize("save_memory", [False, True])
def test_a_search_never_waits_for_the_device(save_memory: bool) -> None:
    net, (x, y) = supernet(), images()
    assert isinstance(net, FastSupernet)
    net.save_memory(save_memory)
    method = Rnas(net, PGD(), Search(out=Path()))
    optimizer = torch.optim.SGD(net.thetas, 0.01, momentum=0.9, weight_decay=3e-4)
    running = Running(META)
    for _ in range(2):
        running.add(*weight_step(net, net.thetas, optimizer, method.attack, x, y, clip=5.0), y)
        running.add(*method.arch_step(x, y), y)
        gradients = torch.autograd.grad(method.vulnerability(x, x), net.alphas)
    assert all(
        t.device == META for t in [running.sums, *gradients, *(p.grad for p in net.thetas if p.grad is not None)]
    )


@pytest.mark.parametrize("beta", [None, 6.0], ids=["PGD", "TRADES"])
@pytest.mark.parametrize("arch", ["RNAS-L", "ResNet18"])
def test_training_never_waits_for_the_device(arch: str, beta: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Fast, "_equals", lambda *_: True)  # it reads values: once for a network, on its first batch
    with on_meta():
        net = build(arch, classes=10, **({} if arch == "ResNet18" else {"cells": 5, "channels": 4}))
    thetas, (x, y) = list(net.parameters()), images()
    optimizer = torch.optim.SGD(thetas, 0.1, momentum=0.9)
    loss, logits = weight_step(net, thetas, optimizer, PGD(), x, y, clip=5.0, trades_beta=beta)
    assert loss.device == logits.device == META


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=3), PGD(steps=3, norm="l2"), CW(steps=3)])
def test_an_attack_never_waits_for_the_device(attack: FGSM | PGD | CW) -> None:
    net, (x, y) = supernet().eval(), images()
    assert isinstance(net, FastSupernet)
    assert attack.perturb(net.frozen_view(), x, y).device == META


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something: about the kernels that a GPU would have to launch."""

    NONE = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not returns_view and not str(func).startswith(self.NONE):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def kernels(run: Callable[[], object]) -> int:
    with Kernels() as counted:
        run()
    return counted.counts.total()


def test_the_fast_supernet_launches_a_fraction_of_the_kernels() -> None:
    """Of the plain one's, at the paper's size: a GPU that waits for launches is as fast as they are few."""
    x, y = images(2)
    plain, fast = (_launched(supernet(kind, SearchSpace()), x, y) for kind in (Supernet, FastSupernet))
    assert fast["weight"] < 0.35 * plain["weight"], (fast, plain)
    assert fast["pgd"] < 0.3 * plain["pgd"], (fast, plain)


def _launched(net: Supernet, x: Tensor, y: Tensor) -> dict[str, int]:
    """Kernels of a pass and its backward pass: for the weights, and for the images in an attack."""
    weight = kernels(lambda: _backward(net.train()(x), y, net.thetas))
    fixed = net.eval().frozen_view() if isinstance(net, FastSupernet) else net.eval()
    net.requires_grad_(False)
    x = x.clone().requires_grad_()
    return {"weight": weight, "pgd": kernels(lambda: _backward(fixed(x), y, [x]))}


def _backward(logits: Tensor, y: Tensor, wanted: list[Any]) -> None:
    torch.autograd.grad(nn.functional.cross_entropy(logits, y), wanted)
