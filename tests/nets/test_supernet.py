"""The plain supernet: the definition of the search space (Eq. 1), and how an architecture is read off α."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnas.errors import RnasError
from rnas.genotype import OPERATIONS
from rnas.nas.derive import discretise
from rnas.nets.derived import DerivedNetwork
from rnas.nets.space import Shape, uniform
from rnas.nets.supernet import MixedOperation, Supernet
from rnas.settings import SearchSpace


def test_the_papers_supernet_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        net = Supernet(SearchSpace(), 10)
    assert sum(p.numel() for p in net.thetas) == 1_930_618


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", range(8))
def test_a_one_hot_edge_is_that_operation(stride: int, k: int) -> None:
    edge = MixedOperation(Shape(SearchSpace()), False, 0, 4, stride)
    x = torch.randn(2, 4, 8, 8)
    one_hot = torch.zeros(8)
    one_hot[k] = 1
    torch.testing.assert_close(edge.eval()(x, one_hot), edge.operations[str(k)](x))


def test_every_size_is_a_parameter() -> None:
    space = SearchSpace(cells=3, channels=4, nodes=2, operations=("none", "skip_connect", "sep_conv_3x3"))
    net = Supernet(space, 7)
    logits, cells = net.forward_cells(torch.rand(2, 3, 16, 16), uniform(net.shape))
    assert logits.shape == (2, 7)
    assert [tuple(c.shape[1:]) for c in cells] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]


def test_discretisation_by_hand() -> None:
    """`none` never wins, the two strongest edges enter a node, each with its strongest operation."""
    space = SearchSpace(nodes=2)
    alpha = torch.zeros(5, 8)
    alpha[0, OPERATIONS.index("sep_conv_3x3")] = 2  # node 2 from 0
    alpha[1, OPERATIONS.index("none")] = 9  # node 2 from 1: chosen all the same, there are just two
    alpha[1, OPERATIONS.index("max_pool_3x3")] = 1
    alpha[2, OPERATIONS.index("none")] = 5  # node 3 from 0: its other operations are weak
    alpha[3, OPERATIONS.index("dil_conv_5x5")] = 1  # node 3 from 1
    alpha[4, OPERATIONS.index("skip_connect")] = 3  # node 3 from 2
    strength = alpha.softmax(-1).tolist()
    cell = discretise(space, strength, strength).normal
    assert cell.nodes == (
        (("sep_conv_3x3", 0), ("max_pool_3x3", 1)),
        (("dil_conv_5x5", 1), ("skip_connect", 2)),
    )
    assert cell.concat == (2, 3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_every_alpha_gives_a_network_that_runs(seed: int) -> None:
    space = SearchSpace(cells=3, channels=4)
    alphas = torch.randn(2, 14, 8, generator=torch.Generator().manual_seed(seed))
    net = DerivedNetwork(discretise(space, *alphas.softmax(-1).tolist()), 10, cells=3, channels=4)
    assert net(torch.rand(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("wrong", [{"cells": 0}, {"channels": -1}, {"nodes": 0}, {"operations": ("none",)}])
def test_impossible_spaces(wrong: dict) -> None:
    with pytest.raises(RnasError):
        SearchSpace(**wrong)


def test_unknown_operations_get_the_nearest() -> None:
    with pytest.raises(RnasError, match="did you mean sep_conv_3x3"):
        SearchSpace(operations=("none", "sep_conv_3"))


@pytest.mark.slow
def test_the_papers_size_runs_three_steps_of_each_kind() -> None:
    """8 cells, C = 16, 32x32, batch 16, plain: forward and backward in reasonable time on two cores."""
    net = Supernet(SearchSpace(), 10)
    for _ in range(3):
        loss = net(torch.rand(16, 3, 32, 32), uniform(net.shape)).logsumexp(1).mean()
        torch.autograd.backward(loss)
    assert all(torch.isfinite(p.grad).all() for p in net.thetas)


def test_a_node_that_nothing_enters_is_told_of() -> None:
    space = SearchSpace(nodes=1)
    with pytest.raises(RnasError, match="nothing enters node 2 of the normal cell"):
        discretise(space, [[1.0] + [0.0] * 7] * 2, [[0.125] * 8] * 2)
