"""P-DARTS: its stages, its dropout, what it prunes and the skips that it lets stand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rnas.errors import RnasError
from rnas.fast.supernet import FastSupernet
from rnas.nas.derive import cap_skips, discretise, strongest
from rnas.nas.engine import Engine
from rnas.nas.methods.p_darts import PDarts, Position, Settings, cells, operations
from rnas.nas.search import search
from rnas.nets.space import Shape
from rnas.nets.supernet import Supernet
from rnas.records.folder import read_log
from rnas.settings import Perturbation, SearchSpace, Source
from supernets import drawn_by_numpy, searching

PAPER = Settings(out=Path())
SMALL = Settings(
    out=Path(),
    source=Source(data="digits", limit_per_class=8),
    space=SearchSpace(cells=2, channels=2, nodes=1),
    perturbation=Perturbation(attack_steps=1),
    batch_size=16,
    monitor=20,
    device="cpu",
    epochs=3,
)


def test_the_papers_stages() -> None:
    at = [Position.of(PAPER, epoch) for epoch in range(1, 76)]
    assert [p.stage for p in at] == [0] * 25 + [1] * 25 + [2] * 25
    assert [p.epoch for p in at] == 3 * list(range(25))
    assert sum(p.warms for p in at) == 30
    assert [cells(PAPER, stage) for stage in range(3)] == [5, 11, 17]
    assert [operations(PAPER, stage) for stage in range(3)] == [8, 5, 3]
    method = PDarts(PAPER)
    rates = [method.lr(epoch) for epoch in (1, 25, 26, 75)]
    assert rates[0] == rates[2] == 0.025
    assert rates[1] == rates[3] == pytest.approx(0.025 * 0.5 * (1 + np.cos(np.pi * 24 / 25)))


def test_the_papers_dropout_jumps_at_the_end_of_the_warm_up() -> None:
    rates = [Position.of(PAPER, 25 + 1 + e).dropout(0.4) / 0.4 for e in (0, 9, 10, 24)]
    assert rates == pytest.approx([0.96, 0.6, 1.0, np.exp(-2.8)])


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 10])
def test_stages_of_any_length_follow_each_other(epochs: int) -> None:
    at = [Position.of(replace(PAPER, epochs=epochs), epoch) for epoch in range(1, epochs + 1)]
    assert [p.stage for p in at] == sorted(p.stage for p in at)
    assert at[0].stage == 0
    assert at[-1].stage == min(2, epochs - 1)
    for stage in range(at[-1].stage + 1):
        own = [p for p in at if p.stage == stage]
        assert [p.epoch for p in own] == list(range(own[0].epochs))


def test_an_edge_keeps_its_strongest_operations() -> None:
    assert strongest([[0.1, 0.5, 0.2, 0.2], [0.4, 0.3, 0.2, 0.1]], 2) == (
        (False, True, True, False),
        (True, True, False, False),
    )


def test_what_left_has_no_weight_and_no_gradient() -> None:
    space, left = SearchSpace(nodes=1), strongest(np.random.default_rng(0).random((2, 8)).tolist(), 3)
    method = PDarts(PAPER)
    method.begin(Shape(space, (left, left)))
    mix = method.weights().mix[0]
    off = ~torch.tensor(left)
    torch.testing.assert_close(mix.sum(1), torch.ones(2))
    assert (mix[off] == 0).all()
    mix[:, 1].sum().backward()
    assert (method.alpha.normal.grad[off] == 0).all()
    assert method.weights().dropout is None, "a measurement drops nothing"
    assert method.weights(torch.tensor(0.3)).dropout is not None


SPACE = SearchSpace(nodes=3, operations=("none", "skip_connect", "sep_conv_3x3"))
SKIPPING = [(s, c) for s, c in (
    (0.9, 0.05), (0.8, 0.15),  # node 2
    (0.7, 0.1), (0.6, 0.3), (0.5, 0.2),  # node 3
    (0.55, 0.25), (0.1, 0.65), (0.2, 0.35), (0.1, 0.3),  # node 4
)]  # fmt: skip


def test_the_skip_cap_by_hand() -> None:
    """Five skips are kept: 0.9, 0.8 | 0.7, 0.6 | 0.55 beside a convolution. 0.55 goes, and node 4 has convolutions from
    1 and 2; 0.6 goes, and the skip of 0.5 from node 2 comes in; that goes, and 0.3 from 1 comes; then goes 0.7."""
    rows = [[1 - s - c, s, c] for s, c in SKIPPING]
    before = discretise(SPACE, rows, rows)
    assert [o for edges in before.normal.nodes for o, _ in edges].count("skip_connect") == 5
    capped = cap_skips(SPACE, rows, 2)
    cell = discretise(SPACE, capped, rows)
    sep, skip = "sep_conv_3x3", "skip_connect"
    assert cell.normal.nodes == (((skip, 0), (skip, 1)), ((sep, 1), (sep, 2)), ((sep, 1), (sep, 2)))
    assert cell.reduce == before.reduce
    assert [edge for edge, row in enumerate(capped) if row[1] == 0] == [2, 3, 4, 5]
    assert cap_skips(SPACE, rows, 5) == rows


def test_a_cap_that_leaves_a_node_nothing_says_so() -> None:
    space = SearchSpace(nodes=1, operations=("none", "skip_connect"))
    with pytest.raises(RnasError, match="node 2"):
        cap_skips(space, [[0.5, 0.5]] * 2, 0)


@pytest.mark.parametrize("changed", [{"warmup": 25}, {"skip_dropout": (0.0, 0.4, 1.0)}, {"max_skips": -1}])
def test_bad_settings(changed: dict[str, Any]) -> None:
    with pytest.raises(RnasError):
        replace(PAPER, **changed)


GOLDEN = Path(__file__).parents[1] / "golden" / "p_darts_losses.json"


def ten_losses(network: type[Supernet]) -> list[float]:
    """The losses of five steps of α and of the weights each, of a second stage with a dropout of 0.4, in float64."""
    torch.manual_seed(0)
    space = SearchSpace(cells=3, channels=4, nodes=2)
    draws = np.random.default_rng(1)
    normal, reduce = (strongest(draws.random((5, 8)).tolist(), 5) for _ in range(2))
    engine = searching(network(Shape(space, (normal, reduce)), 10), method=PDarts, kind=Settings, out=Path(), lr=0.1)
    engine.net.double()
    drawn_by_numpy(engine.net)
    x = torch.from_numpy(draws.random((16, 3, 8, 8)))
    y, rate, losses = torch.arange(16) % 10, torch.tensor(0.4, dtype=torch.float64), []
    for _ in range(5):
        losses.append(engine.method.descend_alphas(engine, x[8:], y[8:], rate).loss.item())
        losses.append(engine.descend_weights(x[:8], y[:8], engine.method.weights(rate)).loss.item())
    return losses


def test_the_losses_are_those_recorded() -> None:
    assert ten_losses(FastSupernet) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-6)


def test_a_search_in_three_stages_and_one_cut_off_in_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch each, of two iterations with a step of α and one of the weights. Cut off in the third, it begins with
    the second stage's network, and goes on in the third's with what was left by the second."""
    found = search(replace(SMALL, out=tmp_path / "whole"))
    events = [e for e in read_log(tmp_path / "whole") if e["event"] == "epoch"]
    assert [e["stage"] for e in events] == [1, 2, 3]
    with np.load(tmp_path / "whole" / "strengths.npz") as strengths:
        for kind in ("normal", "reduce"):
            assert (strengths[kind] > 0).sum(2).tolist() == [[n] * 2 for n in (8, 8, 5, 3)]
    assert sum(o == "skip_connect" for edges in found.normal.nodes for o, _ in edges) <= 2
    slope, steps = Engine.slope, 0

    def cut(self: Engine, *args: object, **kwargs: object) -> object:
        nonlocal steps
        steps += 1
        if steps > 10:
            raise KeyboardInterrupt
        return slope(self, *args, **kwargs)

    settings = replace(SMALL, out=tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "slope", cut)
        with pytest.raises(KeyboardInterrupt):
            search(settings)
    assert search(replace(settings, resume=True)) == found
    ours, theirs = (torch.load(tmp_path / f / "checkpoint.pt", weights_only=True) for f in ("whole", "cut"))
    assert ours["shape"] == theirs["shape"]
    for name, value in ours["net"].items():
        other = theirs["net"][name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def test_planning_counts_the_networks_of_the_stages() -> None:
    """5, 11 and 17 of 8 cells with 8, 5 and 3 of 8 operations; both parts of a step after the warm-up."""
    passes = [PDarts.cost(PAPER, epoch, 100.0).passes for epoch in (1, 25, 50, 75)]
    assert passes == pytest.approx([62.5, 125, 200 * 11 / 8 * 5 / 8, 200 * 17 / 8 * 3 / 8])


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(ten_losses(Supernet), indent=1) + "\n")
