"""Our own networks in their form for attacks: equal in eval mode, following every change, leaving no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.compute.freezing import Model, frozen, unfolded
from rnas.nets.folding import folded
from rnas.nets.handmade import Branches, Residual, Stages
from rnas.nets.ops import FactorizedReduce, Normalize
from rnas.nets.zoo import build


def small() -> Stages:
    """What the folding must see through: shared ReLUs, a joined BN, and BN that stands alone."""
    left = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 5, 2, 4, 2, groups=8, bias=False), nn.Conv2d(8, 8, 1))
    right = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8, affine=False))
    return Stages(
        Normalize((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)),
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)),
        Branches(left, right, FactorizedReduce(8, 8, True)),
        nn.Sequential(nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, 1)),
        Residual(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)), 8, 8),
        nn.Sequential(nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(8 * 16, 5)),
    )


def trained(net: nn.Module, side: int = 16, dtype: torch.dtype = torch.float64) -> nn.Module:
    """`net` with BN statistics and parameters that are not the initial ones, in training mode."""
    torch.manual_seed(0)
    net.to(dtype).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    net(torch.rand(8, 3, side, side, dtype=dtype))
    return net


def answers(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of one function of them for the images."""
    x = x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad((logits * logits.detach().sin()).sum(), x)
    return logits.detach(), gradient


def assert_equal_in_float64(net: nn.Module, x: Tensor) -> None:
    with unfolded(net) as plain:
        expected = answers(plain, x)
    with frozen(net) as fast:
        assert fast is not net
        for got, want in zip(answers(fast, x), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (14, 12)])
def test_the_folded_form_is_the_network_in_eval_mode(height: int, width: int) -> None:
    assert_equal_in_float64(trained(small()), torch.rand(4, 3, height, width, dtype=torch.float64))


@pytest.mark.parametrize(
    "name", ["RNAS-L", "AdvRush", "ResNet18", "MobileNetV2", "ShuffleNetV2", "SqueezeNet", "DenseNet121"]
)
def test_networks_of_the_zoo_have_one(name: str) -> None:
    cells = {"cells": 3, "channels": 4} if name in ("RNAS-L", "AdvRush") else {}
    net = trained(build(name, classes=10, **cells))
    assert_equal_in_float64(net, torch.rand(2, 3, 16, 16, dtype=torch.float64))


def test_it_follows_training_loading_moving_and_exchanged_parts() -> None:
    net = trained(small())
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    assert_equal_in_float64(net, x)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    net(x)  # new BN statistics
    assert_equal_in_float64(net, x)
    net.load_state_dict({k: v * 1.1 for k, v in net.state_dict().items()})
    assert_equal_in_float64(net, x)
    net[5][2] = nn.Linear(8 * 16, 3).double()
    assert_equal_in_float64(net, x)
    net[4].body.append(net[4].body[1])  # the same part a second time
    assert_equal_in_float64(net, x)
    net.float()
    with frozen(net) as fast:
        assert fast(x.float()).dtype == torch.float32
    net.double()
    net[0].mean = torch.full((3, 1, 1), 0.2, dtype=torch.float64)
    assert_equal_in_float64(net, x)


def test_the_structure_is_kept_for_the_next_step() -> None:
    net = trained(small()).eval()
    assert folded(net) is folded(net)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Louder(Stages):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(net: Stages) -> nn.Module:
    net[3].register_forward_hook(lambda module, inputs, out: 2 * out)
    return net


def patched(net: Stages) -> nn.Module:
    forward = net[3].forward
    net[3].forward = lambda x: 2 * forward(x)
    return net


@pytest.mark.parametrize(
    "change",
    [hooked, patched, lambda net: Louder(*net), lambda net: net.append(Doubled())],
    ids=["hook", "patched forward", "subclass", "another's module"],
)
def test_a_network_of_which_a_part_is_somebody_elses_runs_as_it_is(change: object) -> None:
    net = trained(small())
    with frozen(net) as fast:
        assert fast is not net
    changed = change(net)  # type: ignore[operator]
    with frozen(changed) as fixed:
        assert fixed is changed


def test_a_network_keeps_its_parameters_gradients_and_modules() -> None:
    net = trained(small(), dtype=torch.float32)
    names = [name for name, _ in net.named_modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for _ in range(2):
        PGD(steps=2)(net, torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))
    assert [name for name, _ in net.named_modules()] == names
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
