"""RobNet and random search: their mathematics in closed form, and a phase of candidates that goes on where it was."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from rnas.attacks import PGD
from rnas.cli import main
from rnas.data import halves, load
from rnas.errors import RnasError
from rnas.fast.supernet import FastSupernet
from rnas.genotype import CellCodes, Genotype, agreement, choices
from rnas.nas import sampling
from rnas.nas.engine import Engine, Halves, Round
from rnas.nas.methods.random import Random, uniform_genotype
from rnas.nas.methods.random import Settings as RandomSettings
from rnas.nas.methods.robnet import SEP, SKIP, Robnet, density, drawn_codes, fsp, fsp_loss
from rnas.nas.methods.robnet import Settings as RobnetSettings
from rnas.nas.search import search
from rnas.nets.derived import DerivedNetwork
from rnas.nets.space import hard
from rnas.nets.supernet import Supernet
from rnas.nets.zoo import find_architecture
from rnas.records.folder import CHECK, read_log
from rnas.report.read import SearchPart, read_parts
from rnas.settings import Perturbation, Search, SearchSpace, Source
from supernets import searching

SPACE = SearchSpace(cells=3, channels=4, nodes=2)
TINY = {
    "source": Source(data="digits", limit_per_class=8),
    "space": SearchSpace(cells=2, channels=2, nodes=1),
    "perturbation": Perturbation(attack_steps=1),
    "batch_size": 16,
    "monitor": 20,
    "device": "cpu",
    "epochs": 1,
    "candidates": 3,
}
METHODS = {"robnet": (RobnetSettings, {"finetune": 1}), "random": (RandomSettings, {"finalists": 2})}


def settings(method: str, out: Path, **changes: object) -> Search:
    kind, own = METHODS[method]
    return kind(**{"out": out, **TINY, **own, **changes})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- RobNet


def test_fsp_of_single_pixels() -> None:
    """With 1x1 features G = a bᵀ: ‖abᵀ − a'b'ᵀ‖² = |a|²|b|² + |a'|²|b'|² − 2(a·a')(b·b')."""
    a, b, a2, b2 = (torch.randn(5, c, 1, 1, dtype=torch.float64, generator=seeded(c)) for c in (3, 4, 3, 4))
    a2, b2 = a2 + 1, b2 - 1

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum((1, 2, 3))

    expected = dot(a, a) * dot(b, b) + dot(a2, a2) * dot(b2, b2) - 2 * dot(a, a2) * dot(b, b2)
    torch.testing.assert_close(fsp_loss((a, b), (a2, b2)), expected.mean())
    torch.testing.assert_close(fsp_loss((3 * a, 3 * b), (3 * a2, 3 * b2)), 3**4 * expected.mean())
    assert fsp_loss((a, b), (a, b)) == 0


def test_fsp_is_the_mean_of_outer_products() -> None:
    before, after = torch.randn(2, 3, 4, 4, generator=seeded()), torch.randn(2, 5, 2, 2, generator=seeded(1))
    pooled = torch.nn.functional.max_pool2d(before, 2)
    outer = [pooled[:, :, s, t, None] * after[:, None, :, s, t] for s, t in itertools.product(range(2), repeat=2)]
    torch.testing.assert_close(fsp(before, after), sum(outer) / 4)


def test_codes_are_uniform_where_every_node_has_an_edge() -> None:
    """1 − Π(1 − 4⁻ⁿ) over nodes of 2, 3, 4, 5 edges: 8.17 % of cells are drawn anew."""
    assert 1 - np.prod([1 - 0.25**n for n in (2, 3, 4, 5)]) == pytest.approx(0.0817, abs=1e-4)
    generator = seeded()
    drawn = [drawn_codes(1, generator) for _ in range(3000)]
    counts = [drawn.count(pair) for pair in itertools.product(("00", "01", "10", "11"), repeat=2)]
    assert counts[0] == 0, "no node without input"
    assert stats.chisquare(counts[1:]).pvalue > 1e-4


def test_density() -> None:
    """RobNet-large has 22 of 28 (METHODS.md, section 6)."""
    assert density(CellCodes((("11", "01"),))) == pytest.approx(3 / 4)


def test_both_operations_are_their_sum() -> None:
    mixed = Supernet(Robnet(RobnetSettings(out=Path(), space=SPACE)).shape(1), 10).eval().cells[0].edges[0]
    x = torch.rand(2, 4, 8, 8, generator=seeded())
    weights = torch.tensor([float(name in (SEP, SKIP)) for name in SPACE.operations])
    separate = [mixed(x, weights * torch.tensor([float(n == name) for n in SPACE.operations])) for name in (SEP, SKIP)]
    torch.testing.assert_close(mixed(x, weights), sum(separate))


def copied(net: Supernet, found: CellCodes | Genotype) -> DerivedNetwork:
    """The derived network of an architecture with the supernet's weights."""
    space = net.space
    derived = DerivedNetwork(found, 10, space.cells, space.channels)
    derived.normalize.load_state_dict(net.normalize.state_dict())
    derived.stem.load_state_dict(net.stem.state_dict())
    derived.classifier.load_state_dict(net.classifier.state_dict())
    for mine, theirs in zip(derived.cells, net.cells, strict=True):
        mine.pre0.load_state_dict(theirs.pre0.state_dict())
        mine.pre1.load_state_dict(theirs.pre1.state_dict())
        row = 0
        for number, node in enumerate(mine.nodes):
            cell = found.cell(list(derived.cells).index(mine), theirs.reduction)
            for module, (operation, source) in zip(node, cell.nodes[number], strict=True):
                taken = theirs.edges[row + source].operations[str(space.operations.index(operation))]
                if not isinstance(module, torch.nn.Identity):
                    module[0].load_state_dict(taken.state_dict())
            row += number + 2
    return derived


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cell_free", [False, True])
def test_hard_weights_are_the_derived_network(cell_free: bool, train: bool) -> None:
    chosen = RobnetSettings(out=Path(), space=SPACE, cell_free=cell_free)
    method = Robnet(chosen)
    net = Supernet(method.shape(1), 10)
    method.begin(net.shape)
    found = method.draw(seeded(3))
    assert found.depth == (3 if cell_free else None)
    x = torch.rand(4, 3, 16, 16, generator=seeded())
    derived = copied(net, found).train(train)
    torch.testing.assert_close(net.train(train)(x, method.hard(found)), derived(x))


def ten_losses(network: type[Supernet]) -> list[float]:
    """Of ten steps of RobNet, in float64, on images and attacks that no rounding can turn."""
    chosen = RobnetSettings(out=Path(), space=SPACE, lr=0.01)
    torch.manual_seed(0)
    net = network(Robnet(chosen).shape(1), 10)
    engine = searching(net, method=Robnet, kind=RobnetSettings, out=Path(), space=SPACE, lr=0.01)
    engine.attack = PGD(eps=1.0, step=0.3, steps=2, random_start=False, norm="l2")
    draws = np.random.default_rng(0)
    net.double()
    with torch.no_grad():
        for p in (p for p in net.thetas if p.dim() > 1):
            p.copy_(torch.from_numpy(draws.uniform(-1, 1, p.shape)) * (2 / p[0].numel()) ** 0.5)
    x = torch.from_numpy(draws.random((10, 8, 3, 8, 8)))
    return [engine.method.step(engine, images, torch.arange(8)).loss.item() for images in x]


GOLDEN = Path(__file__).parents[1] / "golden" / "robnet_losses.json"


@pytest.mark.parametrize("network", [Supernet, FastSupernet])
def test_the_losses_are_those_recorded(network: type[Supernet]) -> None:
    """Of the plain supernet; `python tests/nas/test_sampling_methods.py` records them anew."""
    assert ten_losses(network) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-5)


# --- random search


def test_uniform_genotypes() -> None:
    """Every pair of sources, and every operation, as often as every other; 1·3·6·10·7⁸ cells."""
    space, generator = SearchSpace(), seeded()
    real = space.operations[1:]
    genotypes = [uniform_genotype(space, real, generator) for _ in range(700)]
    drawn = [cell for genotype in genotypes for cell in (genotype.normal, genotype.reduce)]
    operations = [operation for cell in drawn for edges in cell.nodes for operation, _ in edges]
    assert stats.chisquare([operations.count(name) for name in real]).pvalue > 1e-4
    pairs = 1
    for node in range(4):
        ways = list(itertools.combinations(range(node + 2), 2))
        pairs *= len(ways)
        counts = [sum(tuple(s for _, s in cell.nodes[node]) == way for cell in drawn) for way in ways]
        assert len(ways) == 1 or stats.chisquare(counts).pvalue > 1e-4
    assert pairs * 7**8 == 1_037_664_180


def test_mean_weights_are_the_mean_of_the_drawn() -> None:
    for method, kind in ((Random, RandomSettings), (Robnet, RobnetSettings)):
        one = method(kind(out=Path(), space=SPACE))
        shape = one.shape(1)
        one.begin(shape)
        generator = seeded()
        mean = torch.stack([hard(one.draw(generator), shape, one.mean).mix[0] for _ in range(800)]).mean(0)
        assert (mean - one.weights().mix[0]).abs().max() < 0.08, "RobNet's, whose nodes have an edge, is some more"


def test_something_enters_every_node() -> None:
    operations, generator = ("none", SKIP), seeded()
    drawn = [uniform_genotype(SPACE, operations, generator) for _ in range(50)]
    nodes = [node for found in drawn for cell in (found.normal, found.reduce) for node in cell.nodes]
    assert all(any(operation == SKIP for operation, _ in node) for node in nodes)
    assert any(operation == "none" for node in nodes for operation, _ in node)


def test_the_best_candidate_is_found() -> None:
    """Where one operation is exact and the others are noise, the candidate with most of it."""
    chosen = RandomSettings(out=Path(), space=SPACE, candidates=30, finalists=5)
    engine = Engine(Random(chosen), PGD(), Halves(None, None, 1, chosen, torch.device("cpu")))

    def most(found: Genotype) -> tuple[float, dict]:
        return float(sum(operation == SEP for _, _, (operation, _) in choices(found))), {}

    found = engine.candidates(30, engine.method.candidate, [Round("few", most, 5), Round("all", most, 1)])
    every = [engine.method.candidate(sampling.of_candidate(0, number)) for number in range(30)]
    assert most(found[0])[0] == max(most(one)[0] for one in every)


# --- the engine's candidates


def test_fine_tuning_leaves_the_supernet_as_it_was() -> None:
    chosen = {**TINY, "out": Path(), "finetune": 1}
    first, second = halves(load("digits").train, 0)
    few = torch.arange(32)
    net = FastSupernet(Robnet(RobnetSettings(**chosen)).shape(1), 10)
    engine = searching(net, method=Robnet, kind=RobnetSettings, **chosen)
    engine.images = Halves(first[few], second[few], 2, engine.settings, torch.device("cpu"))
    w = engine.method.hard(engine.method.draw(seeded()))
    engine.descend_weights(*next(engine.train()), w)  # momenta are there
    before = {k: v.clone() for k, v in engine.net.state_dict().items() if isinstance(v, Tensor)}
    momenta = [s["momentum_buffer"].clone() for s in engine.optimizer.state.values()]
    optimizer = engine.optimizer
    with engine.calibrated(sampling.calibration(engine), w), engine.finetuned(2, w):
        moved = [k for k, v in before.items() if not torch.equal(v, net.state_dict()[k])]
        assert any("weight" in k for k in moved)
        assert any("running_mean" in k for k in moved)
    after = engine.net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert engine.optimizer is optimizer
    assert all(torch.equal(s["momentum_buffer"], m) for s, m in zip(optimizer.state.values(), momenta, strict=True))
    assert engine.net.training


@pytest.mark.parametrize(("method", "killed_at"), [("random", 2), ("random", 5), ("robnet", 4)])
def test_candidates_go_on_where_they_were(
    method: str, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of one, of either round; what was scored is not scored again."""
    calibrated, calls, killing = Engine.calibrated, 0, 0

    def counted(self: Engine, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == killing:
            raise KeyboardInterrupt
        return calibrated(self, *args)

    monkeypatch.setattr(Engine, "calibrated", counted)
    whole = search(settings(method, tmp_path / "whole"))
    lines = [e for e in read_log(tmp_path / "whole") if e["event"] == "candidate"]
    assert [e["number"] for e in lines[:3]] == [0, 1, 2]
    assert len(lines) == calls == 3 + 2
    assert {e["round"] for e in lines} == ({"fsp", "finetuned"} if method == "robnet" else {"few", "all"})

    out, calls, killing = tmp_path / "cut", 0, killed_at
    with pytest.raises(KeyboardInterrupt):
        search(settings(method, out))
    assert not (out / "genotype.json").exists()
    (part,) = read_parts([out])
    assert isinstance(part, SearchPart)
    assert not part.finished
    calls, killing = 0, 0
    assert search(settings(method, out, resume=True)) == whole
    assert calls == 5 - (killed_at - 1)
    assert [e for e in read_log(out) if e["event"] == "candidate"] == lines


@pytest.mark.parametrize(("key", "value"), [("number", None), ("score", "good"), ("round", 1)])
def test_a_candidate_that_does_not_say_what_it_is(key: str, value: object, tmp_path: Path) -> None:
    event = {"event": "candidate", "round": "all", "number": 0, "score": 0.5, key: value}
    (tmp_path / "log.jsonl").write_text(json.dumps(event) + "\n")
    with pytest.raises(RnasError, match="line 1"):
        read_log(tmp_path)
    assert CHECK not in event


@pytest.mark.parametrize("cell_free", [False, True])
def test_what_robnet_finds_can_be_counted_and_reported(cell_free: bool, tmp_path: Path) -> None:
    chosen = settings("robnet", tmp_path / "s", cell_free=cell_free, fsp_keep=1.0, candidates=2, finetune=0)
    found = search(chosen)
    name, again = find_architecture(str(tmp_path / "s"))
    assert (name, again) == ("genotype", found)
    assert found.depth == (2 if cell_free else None)
    main(["report", str(tmp_path / "s"), "--out", str(tmp_path / "r.html")])
    with np.load(tmp_path / "s" / "strengths.npz") as arrays:
        assert set(arrays) == ({"cell0", "cell1", "operations"} if cell_free else {"normal", "reduce", "operations"})
    main(
        f"train {tmp_path}/s --out {tmp_path}/t --limit-per-class 4 --cells 2 --channels 2 --epochs 1 --batch-size 16 "
        "--attack-steps 1 --device cpu".split()
    )
    assert json.loads((tmp_path / "t" / "model.json").read_text())["genotype"] == found.to_json()


def test_a_cell_without_a_search(tmp_path: Path) -> None:
    found = search(settings("random", tmp_path, epochs=0))
    assert isinstance(found, Genotype)
    assert not [e for e in read_log(tmp_path) if e["event"] in ("epoch", "candidate")]
    assert search(settings("random", tmp_path, epochs=0, resume=True)) == found
    assert search(settings("random", tmp_path / "other", epochs=0, seed=1)) != found
    main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")])


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("robnet", {"fsp_keep": 0.0}),
        ("robnet", {"space": SearchSpace(operations=("none", "sep_conv_3x3"))}),
        ("robnet", {"space": SearchSpace(cells=1)}),
        ("robnet", {"epochs": 0}),
        ("random", {"finalists": 0}),
        ("random", {"epochs": -1}),
    ],
)
def test_settings_that_cannot_be(method: str, changes: dict) -> None:
    with pytest.raises(RnasError):
        settings(method, Path(), **changes)


# --- several seeds


def test_agreement() -> None:
    one = Genotype.from_json(
        {"normal": [["skip_connect", 0], ["sep_conv_3x3", 1]], "normal_concat": [2]}
        | {"reduce": [["skip_connect", 0], ["max_pool_3x3", 1]], "reduce_concat": [2]}
    )
    other = replace(one, reduce=one.normal)
    assert agreement(one, one) == 1
    assert agreement(one, other) == pytest.approx(3 / 4)
    assert agreement(CellCodes((("11", "00"),)), CellCodes((("01", "01"),))) == pytest.approx(2 / 4)


def test_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "search --method random --limit-per-class 8 --cells 2 --channels 2 --nodes 1 --attack-steps 1 --batch-size 16 "
        "--monitor 20 --device cpu --epochs 1 --candidates 1 --seed 5 --seeds 2"
    ).split()
    main([*flags, "--out", str(tmp_path)])
    told = json.loads((tmp_path / "seeds.json").read_text())
    assert [row["seed"] for row in told["seeds"]] == [5, 6]
    values = [row["F"] for row in told["seeds"]]
    assert told["F"]["mean"] == pytest.approx(np.mean(values))
    assert told["F"]["spread"] == pytest.approx(np.std(values, ddof=1))
    genotypes = [Genotype.load(tmp_path / f"seed-{seed}" / "genotype.json") for seed in (5, 6)]
    assert told["agreement"]["mean"] == pytest.approx(agreement(*genotypes))
    out = capsys.readouterr().out
    assert "mean" in out
    (tmp_path / "seed-6" / "genotype.json").unlink()
    main([*flags, "--out", str(tmp_path), "--resume"])
    assert json.loads((tmp_path / "seeds.json").read_text()) == told
    with pytest.raises(SystemExit):
        main([*flags, "--out", str(tmp_path)])


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(ten_losses(Supernet), indent=1) + "\n")
