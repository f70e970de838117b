"""Supernets with architecture parameters of their own, for tests that need no search method."""

import torch
from torch import Tensor, nn

from rnas.nets.space import Weights
from rnas.nets.supernet import Supernet


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
