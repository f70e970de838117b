"""Supernets for tests, with α of their own or in a search's engine; and steps for any network."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.compute.precision import FP32, Precision
from rnas.nas.engine import Engine, Halves
from rnas.nas.methods.base import Method
from rnas.nas.methods.rnas import Rnas, Settings
from rnas.nets.space import Weights, uniform
from rnas.nets.supernet import Supernet
from rnas.training import adversarial, step


class Alphas(nn.Module):
    """α of both kinds of cell, each (edges, operations); the weights are its softmax."""

    def __init__(self, net: Supernet):
        super().__init__()
        shape = net.space.edges, len(net.space.operations)
        self.normal = nn.Parameter(1e-3 * torch.randn(shape))
        self.reduce = nn.Parameter(1e-3 * torch.randn(shape))

    def weights(self) -> Weights:
        return Weights(tuple(alpha.softmax(-1) for alpha in self.parameters()))


def with_alphas(net: Supernet) -> Supernet:
    """The network with α as its `architecture`."""
    net.architecture = Alphas(net)
    return net


def alphas(net: Supernet) -> list[Tensor]:
    """[normal, reduce]"""
    return list(net.architecture.parameters())


def weights(net: Supernet) -> Weights:
    """Those of α."""
    return net.architecture.weights()


def searching(
    net: Supernet, attack: PGD | None = None, method: type[Method] = Rnas, kind: type = Settings, **settings: Any
) -> Engine:
    """The engine of a search on `net` in its first epoch, without images; the method is new."""
    where = next(net.parameters())
    chosen = method(kind(**{"out": Path(), "epochs": 3, "warmup": 1, **settings} if kind is Settings else settings))
    chosen.begin(net.shape)
    net.architecture = chosen.to(where.device, where.dtype)
    engine = Engine(chosen, attack or PGD(), Halves(None, None, 1, chosen.settings, where.device))
    engine.use(net)
    engine.begin(1)
    return engine


def drawn_by_numpy(net: nn.Module) -> None:
    """Weights and α that are the same on every processor: torch's normal numbers differ in the eighth digit."""
    draws = np.random.default_rng(0)
    with torch.no_grad():
        for p in (p for p in net.parameters() if p.dim() > 1):
            p.copy_(torch.from_numpy(draws.uniform(-1, 1, p.shape)) * (2 / p[0].numel()) ** 0.5)


def given(net: nn.Module) -> tuple[Weights, ...]:
    """What a network takes beside images: of a supernet the weights of its operations, all alike."""
    if not isinstance(net, Supernet):
        return ()
    where = next(net.parameters())
    return (Weights(tuple(mix.to(where.dtype) for mix in uniform(net.shape, where.device).mix)),)


def craft(attack: PGD, net: nn.Module, x: Tensor, y: Tensor, precision: Precision = FP32) -> Tensor:
    return adversarial.craft(attack, net, x, y, precision, *given(net))


def weight_step(net: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return step.weight_step(net, *args, **kwargs, weights=given(net))
