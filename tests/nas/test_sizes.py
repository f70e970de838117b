"""The strongest cells that are small enough."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rnas.cli import main
from rnas.errors import RnasError
from rnas.genotype import Cell, CellCodes, Genotype
from rnas.nas.derive import Limits, Size, discretise
from rnas.nas.methods.random import Random
from rnas.nas.methods.random import Settings as RandomSettings
from rnas.nas.methods.robnet import Robnet
from rnas.nas.methods.robnet import Settings as RobnetSettings
from rnas.nas.sampling import of_candidate
from rnas.nas.sizes import Target, limits_of, size_of
from rnas.nets import count
from rnas.nets.derived import DerivedNetwork
from rnas.settings import Search, SearchSpace

SPACE = SearchSpace(cells=3, channels=4, nodes=2, operations=("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"))
SMALL = Search(out=Path(), space=SPACE, target_cells=5, target_channels=4, max_params=10**9)


def limits(settings: Search = SMALL) -> Limits:
    found = limits_of(settings, 10, (16, 16))
    assert found is not None
    return found


def test_sizes_are_those_of_the_network() -> None:
    generator = of_candidate(0, 0)
    random, robnet = Random(RandomSettings(out=Path())), Robnet(RobnetSettings(out=Path(), cell_free=True))
    for found in (random.draw(generator), random.draw(generator), robnet.draw(generator), CellCodes((("01", "10"),))):
        nodes = len(found.cell(0, False).nodes)
        net = DerivedNetwork(found, 10, found.depth or 5, 4)
        assert size_of(found, Target(5, 4, nodes, 10, (16, 8))) == Size(count.parameters(net), count.macs(net, (16, 8)))


def every(space: SearchSpace, rows: list[list[float]]) -> list[tuple[float, Cell]]:
    """All cells that discretisation can give, with the sum of their strengths."""
    edges = [(operation, source) for source in range(3) for operation in space.operations[1:]]
    nodes = []
    for node in range(2):
        here = [e for e in edges if e[1] < node + 2]
        pairs = [p for p in itertools.combinations(here, 2) if p[0][1] != p[1][1]]
        first = node * (node + 3) // 2
        nodes.append([(sum(rows[first + s][space.operations.index(o)] for o, s in p), p) for p in pairs])
    return [(a + b, Cell((p, q), (2, 3))) for (a, p), (b, q) in itertools.product(*nodes)]


@pytest.mark.parametrize("measure", ["params", "macs", "both"])
def test_the_strongest_that_fits(measure: str) -> None:
    """Against all pairs of cells, in a space where they can be counted."""
    draws, whole = np.random.default_rng(0), limits()
    normal, reduce = ([list(row) for row in draws.dirichlet(np.ones(4), 5)] for _ in range(2))
    free = whole.size(discretise(SPACE, normal, reduce))
    params, macs = (low + 0.5 * (high - low) for low, high in zip(whole.base, free, strict=True))
    most = Size(params if measure != "macs" else np.inf, macs if measure != "params" else np.inf)
    found = discretise(SPACE, normal, reduce, limits=replace(whole, most=most))
    assert whole.size(found).fits(most)
    size = {c: whole.size(Genotype(c, c)) for c in {c for _, c in every(SPACE, normal)}}
    strength = {k: {c: s for s, c in every(SPACE, rows)} for k, rows in (("n", normal), ("r", reduce))}
    added = {}
    empty = Cell(((("max_pool_3x3", 0), ("max_pool_3x3", 1)),) * 2, (2, 3))
    for c in size:
        added[c] = whole.size(Genotype(c, empty)), whole.size(Genotype(empty, c))
    best = max(
        strength["n"][a] + strength["r"][b]
        for a, b in itertools.product(size, size)
        if Size(
            added[a][0].params + added[b][1].params - whole.base.params,
            added[a][0].macs + added[b][1].macs - whole.base.macs,
        ).fits(most)
    )
    assert strength["n"][found.normal] + strength["r"][found.reduce] == pytest.approx(best)


def test_what_fits_anyway_is_what_it_was() -> None:
    draws = np.random.default_rng(1)
    rows = [list(row) for row in draws.dirichlet(np.ones(4), 5)]
    assert discretise(SPACE, rows, rows, limits=limits()) == discretise(SPACE, rows, rows)


def test_pruned_operations_stay_away() -> None:
    whole = limits()
    rows = [[0.0, 0.0, 0.0, 1.0]] * 5
    with pytest.raises(RnasError, match="max-params"):
        discretise(SPACE, rows, rows, limits=replace(whole, most=Size(whole.base.params + 1, np.inf)))


@pytest.mark.parametrize(("method", "settings"), [(Random, RandomSettings), (Robnet, RobnetSettings)])
def test_drawn_candidates_fit(method: type, settings: type) -> None:
    chosen = settings(out=Path(), target_channels=4, target_cells=5, max_params=10**9)
    one = method(chosen)
    sizes = sorted(limits(chosen).size(one.candidate(of_candidate(0, n))).params for n in range(20))
    one.limits = limits(replace(chosen, max_params=int(sizes[4])))
    assert all(one.limits.size(one.candidate(of_candidate(0, n))).params <= sizes[4] for n in range(20))
    one.limits = replace(one.limits, most=Size(sizes[0] / 4, np.inf))
    with pytest.raises(RnasError):
        one.candidate(of_candidate(0, 0))


def test_a_limit_that_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["search", "--method", "darts", "--max-params", "1000", "--out", str(tmp_path / "s"), "--device", "cpu"])
    assert stop.value.code == 2
    assert "max-params" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
