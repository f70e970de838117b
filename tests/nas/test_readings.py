"""What F is measured on: with `none` shared out, `none` cannot lower it; of the cell it is its network's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.nas.test_search import SMALL
from tests.supernets import searching
from torch import Tensor

from rnas.nas.engine import Engine
from rnas.nas.methods.rnas import Rnas
from rnas.nas.readings import READINGS, Reading, straight_through, without_none
from rnas.nas.search import search
from rnas.nets.space import Weights, hard
from rnas.nets.supernet import Supernet
from rnas.records.folder import read_events, read_log
from rnas.records.schema import SearchEpoch
from rnas.settings import SearchSpace

SPACE = SearchSpace(cells=3, channels=4, nodes=2)
NONE = SPACE.operations.index("none")


def engine(reading: Reading) -> Engine:
    torch.manual_seed(0)
    return searching(Supernet(SPACE, 3).double(), bound_on=reading, space=SPACE)


def images() -> tuple[Tensor, Tensor]:
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    return x, (x + 0.1 * torch.sign(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))).clamp(0, 1)


def method_of(engine: Engine) -> Rnas:
    assert isinstance(engine.method, Rnas)
    return engine.method


def slope(engine: Engine) -> tuple[float, list[Tensor]]:
    value, grads = method_of(engine).slope_of_f(engine, *images())
    return float(value), [g.clone() for g in grads]


def test_none_lowers_f_of_the_supernet_and_cannot_lower_it_without_none() -> None:
    for reading in ("supernet", "without-none"):
        e = engine(reading)
        before, grads = slope(e)
        with torch.no_grad():
            for alpha in e.method.parameters():
                alpha[:, NONE] += 3
        after, _ = slope(e)
        if reading == "supernet":
            assert after < 0.8 * before
            assert max(float(g[:, NONE].abs().max()) for g in grads) > 0
        else:
            assert after == pytest.approx(before, rel=1e-9)
            assert max(float(g[:, NONE].abs().max()) for g in grads) < 1e-12


def test_what_none_had_is_shared_out_as_the_others_stand() -> None:
    space = replace(SPACE, operations=("none", "skip_connect", "sep_conv_3x3"))
    mix = torch.tensor([[0.5, 0.2, 0.3], [0.0, 0.9, 0.1], [1.0, 0.0, 0.0]])
    (shared,) = without_none(Weights((mix,)), space).mix
    torch.testing.assert_close(shared, torch.tensor([[0.0, 0.4, 0.6], [0.0, 0.9, 0.1], [0.0, 0.0, 0.0]]))
    assert without_none(Weights((mix,)), replace(space, operations=space.operations[1:])).mix == (mix,)


def test_f_of_the_cell_is_that_of_its_network_and_its_gradient_goes_to_the_softmax() -> None:
    e = engine("cell")
    method, (x, x_adv) = method_of(e), images()
    value, grads = slope(e)
    cell = hard(method.derive(), e.net.shape, method.alpha.normal)
    assert value == pytest.approx(float(method.vulnerability()(e.net, x, x_adv, cell)[0].detach()), rel=1e-9)
    # By the chain rule: the gradient by the mix at the cell, through the softmax at α.
    mix = [m.clone().requires_grad_() for m in cell.mix]
    f = method.vulnerability()(e.net, x, x_adv, Weights(tuple(mix)))[1]
    by_mix = torch.autograd.grad(f, mix)
    for alpha, g, given in zip(method.parameters(), by_mix, grads, strict=True):
        s = alpha.detach().softmax(-1)
        torch.testing.assert_close(given, s * (g - (s * g).sum(-1, keepdim=True)), rtol=1e-6, atol=1e-12)


def test_a_one_hot_alpha_is_its_cell() -> None:
    """Two edges of each node with one operation, `none` on the others: all that softmax can say of a cell."""
    e = engine("cell")
    method = method_of(e)
    cell = hard(method.derive(), e.net.shape, method.alpha.normal)
    with torch.no_grad():
        for alpha, mix in zip(method.parameters(), cell.mix, strict=True):
            alpha.copy_(60 * mix)
            alpha[mix.sum(-1) == 0, NONE] = 60
    (x, x_adv), f = images(), method.vulnerability()
    supernet, of_cell = (float(f(e.net, x, x_adv, w)[0].detach()) for w in (method.weights(), cell))
    assert supernet == pytest.approx(of_cell, rel=1e-9)
    assert slope(e)[0] == pytest.approx(of_cell, rel=1e-9)


def test_straight_through_has_the_value_of_the_cell() -> None:
    w, cell = Weights((torch.rand(3, 4, requires_grad=True),)), Weights((torch.eye(4)[:3],))
    (mix,) = straight_through(w, cell).mix
    assert torch.equal(mix.detach().round(decimals=5), cell.mix[0])
    assert torch.equal(torch.autograd.grad((2 * mix).sum(), w.mix)[0], torch.full((3, 4), 2.0))


@pytest.mark.parametrize("reading", ["cell", *(pytest.param(r, marks=pytest.mark.slow) for r in READINGS[:2])])
def test_a_search_binds_what_it_is_told_to_and_logs_all(reading: Reading, tmp_path: Path) -> None:
    search(
        replace(SMALL, out=tmp_path, bound="0.6x", bound_on=reading, epochs=2, projection_steps=10, projection_cap=20)
    )
    warm, last = (e for e in read_log(tmp_path) if e["event"] == "epoch")
    key = f"F_{reading.replace('-', '_')}"
    assert last["F"] == last[key]
    assert last["H"] == pytest.approx(0.6 * warm[key], rel=1e-12)
    assert last["projection_end"] in ("feasible", "stalled", "steps")
    assert (last["F"] <= last["H"]) == (last["projection_end"] == "feasible")
    assert last["F_smallest"] <= last["F_before"]
    assert all(math.isfinite(last[f"F_{r.replace('-', '_')}"]) for r in READINGS)
    epochs, _ = read_events(tmp_path, SearchEpoch)
    assert (epochs[-1].F_cell, epochs[-1].projection_end) == (last["F_cell"], last["projection_end"])
