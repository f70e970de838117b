"""`rnas reproduce`, planning: which runs a table needs, what tables share, what stays empty, what it will cost."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

from rnas.errors import RnasError
from rnas.evaluation.battery import NAMES
from rnas.nas.methods.rnas import Settings
from rnas.planning import cost
from rnas.planning.budgets import BUDGETS, Budget, paper
from rnas.planning.cost import FORWARD, Facts, Speed, facts, measure, passes, survivors
from rnas.reproduce import describe
from rnas.reproduce import plan as planning
from rnas.reproduce.caption import WORDS, caption, cuts
from rnas.reproduce.cost import Costs
from rnas.reproduce.plan import Plan, make_plan
from rnas.settings import PAPER_RESULTS, Distortion, Evaluate, Reproduce, Search, Source, Train

OUT = Path("results")


def plan_of(what: str, budget: str = "paper", **options: object) -> Plan:
    return make_plan(Reproduce(what, OUT, budget, **options))  # type: ignore[arg-type]


def trainings(plan: Plan) -> list[Train]:
    return [step for step in plan.steps.values() if isinstance(step, Train)]


def searches(plan: Plan) -> list[Search]:
    return [step for step in plan.steps.values() if isinstance(step, Search)]


def evaluations(plan: Plan) -> list[Evaluate]:
    return [step for step in plan.steps.values() if isinstance(step, Evaluate)]


def test_paper_is_exactly_section_5_1() -> None:
    for step in trainings(plan_of("table1")):
        assert (step.epochs, step.batch_size, step.lr, step.momentum, step.weight_decay) == (600, 128, 0.1, 0.9, 3e-4)
        assert (step.cells, step.channels) == (20, 36)
        assert step.perturbation.attack_steps == 7
        assert step.source == Source("cifar10")
    plan = plan_of("table5")
    ours = [search for search in searches(plan) if search.method == "rnas"]
    for search in ours:
        assert (search.epochs, search.batch_size, search.lr, search.alpha_lr) == (60, 128, 0.01, 6e-4)
        assert (search.space.cells, search.space.channels) == (8, 16)
        assert search.source.data == "tiny-imagenet"
    assert {search.bound for search in ours} == {"1e-4", "1e-5"}
    for evaluation in evaluations(plan):
        assert evaluation.attacks == ("fgsm", "pgd20", "pgd100", "cw", "aa")
        assert evaluation.limit is None
    assert "the settings of §5.1" in " ".join(caption(plan))


def test_table1_trains_every_architecture_both_ways_but_dsrna() -> None:
    plan = plan_of("table1")
    assert len(plan.rows) == 19
    assert len(trainings(plan)) == len(evaluations(plan)) == 2 * 18
    (empty,) = [row for row in plan.rows if row.reason]
    assert empty.model == "DSRNA"
    assert "no genotype" in str(empty.reason)
    standard = {step.run for step in evaluations(plan) if step.attacks == ("fgsm",)}
    assert standard == {step.out for step in trainings(plan) if step.standard}


@pytest.mark.parametrize(("table", "data"), [("table2", "cifar100"), ("table3", "svhn"), ("table4", "tiny-imagenet")])
def test_transfer_trains_the_published_cells_on_other_images(table: str, data: str) -> None:
    plan = plan_of(table, seeds=2)
    assert not searches(plan)
    assert {step.source.data for step in trainings(plan)} == {data}
    assert len(trainings(plan)) == 2 * 10  # two seeds of 11 rows without DSRNA
    assert {step.seed for step in trainings(plan)} == {0, 1}
    assert "MobileNetV2" in {step.arch for step in trainings(plan)}  # the tables spell it Mobilnetv2


def test_table5_searches_with_the_methods_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "names", lambda: ["rnas"])
    plan = plan_of("table5")
    reasons = {row.model: row.reason for row in plan.rows}
    assert [m for m, reason in reasons.items() if reason is None] == ["ResNet18", "DenseNet121", "RNAS-H", "RNAS-L"]
    assert reasons["DARTS"] == "its search method is not implemented (there are: rnas)"
    assert {step.arch for step in trainings(plan)} >= {str(search.out) for search in searches(plan)}
    monkeypatch.setattr(planning, "names", lambda: ["darts", "rnas"])
    plan = plan_of("table5")
    assert next(row for row in plan.rows if row.model == "DARTS").reason is None
    assert {search.method for search in searches(plan)} == {"darts", "rnas"}


def test_tables_and_figures_share_their_runs() -> None:
    table1, fig1, fig3, fig5 = (plan_of(what) for what in ("table1", "fig1", "fig3", "fig5"))
    adversarial = {step.out for step in trainings(table1) if not step.standard}
    assert {step.out for step in trainings(fig1)} == adversarial
    rnas_l = next(step.out for step in trainings(table1) if step.arch == "RNAS-L" and not step.standard)
    assert rnas_l in {step.out for step in trainings(fig5)}
    assert not searches(plan_of("fig5", bounds=("0.0001", "1e-5")))  # RNAS-H and RNAS-L, however H is written
    on_cifar10 = {step.out for step in trainings(fig3) if step.source.data == "cifar10"}
    assert on_cifar10 <= {step.out for step in trainings(table1)}
    on_cifar100 = {step.out for step in trainings(fig5) if step.source.data == "cifar100"}
    assert len(on_cifar100 & {step.out for step in trainings(plan_of("table2"))}) == 2  # RNAS-H and RNAS-L


def test_a_folder_is_named_after_what_makes_the_run() -> None:
    first = {step.out for step in trainings(plan_of("table1"))}
    assert first == {step.out for step in trainings(plan_of("table1", data_root=Path("elsewhere"), device="cpu"))}
    assert first.isdisjoint(step.out for step in trainings(plan_of("table1", "day")))
    assert first.isdisjoint(step.out for step in trainings(plan_of("table1", data="mine/cifar10.npz")))
    assert first < {step.out for step in trainings(plan_of("table1", seeds=3))}


def test_every_step_comes_after_what_it_needs() -> None:
    for what in PAPER_RESULTS:
        done: set[str] = set()
        for path, step in plan_of(what, "smoke", seeds=2).steps.items():
            if isinstance(step, Train) and "search" in step.arch:
                assert step.arch in done
            if isinstance(step, Evaluate):
                assert str(step.run) in done
            if isinstance(step, Distortion):
                assert set(step.networks) <= done
            done.add(str(path))
    assert not plan_of("fig4").steps


def test_data_takes_the_place_of_the_papers_and_the_caption_says_so() -> None:
    plan = plan_of("fig5", "smoke", data="some/cifar10.npz", data_note="lossy: JPEG quality 75")
    assert {row.data for row in plan.rows} == {"some/cifar10.npz"}
    text = " ".join(caption(plan_of("table1", "smoke", data="some/cifar10.npz", data_note="lossy: JPEG quality 75")))
    assert "cifar10.npz (lossy: JPEG quality 75), given with --data in place of the paper's" in text
    assert "mean little" in text


def differing(budget: object, usual: object, above: str = "") -> set[str]:
    """The paths of the settings in which two budgets differ."""
    found = set()
    for f in fields(budget):  # type: ignore[arg-type]
        value, other, path = getattr(budget, f.name), getattr(usual, f.name), f"{above}{f.name}"
        if is_dataclass(value):
            found |= differing(value, other, f"{path}.")
        elif value != other:
            found.add(path)
    return found


def test_the_caption_names_every_cut() -> None:
    """But for how many images distortions are drawn from, and the attacks, which a table itself chooses."""
    for name in ("day", "hour", "smoke"):
        budget: Budget[Settings] = BUDGETS[name](Settings)
        cut = differing(budget, paper(Settings)) - {"evaluate.attacks", "distortion.limit"}
        assert cut - {"search.source.limit_per_class", "search.source.image_size"} <= WORDS.keys()
        assert budget.search.source == budget.train.source
        text = " ".join(caption(plan_of("table5", name)))
        told = cuts(budget, ("search", "train", "evaluate"))
        assert len(told) == len({path for path in cut if path in WORDS and not path.startswith("distortion")})
        assert all(words in text for words in told)
    assert "8 training epochs instead of 600" in cuts(BUDGETS["hour"](Settings), ("train",))
    assert "RobNet-free keeps its 20 cells" in " ".join(caption(plan_of("table1", "smoke")))


def test_the_caption_names_what_distortions_cut_and_what_keeps_its_size() -> None:
    for what in ("fig2", "fig3"):
        text = " ".join(caption(plan_of(what, "smoke")))
        assert "5 steps of PGD instead of 20" in text
        assert "hand-made networks keep their size" in text
    assert "steps of PGD" not in " ".join(caption(plan_of("fig3", "hour")))
    assert "RNAS-H under H = 1e-4; RNAS-L under H = 1e-5" in " ".join(caption(plan_of("table5", "smoke")))


def test_the_caption_says_which_searches_missed_their_bound(tmp_path: Path) -> None:
    plan = make_plan(Reproduce("fig5", tmp_path, "smoke", bounds=("1e-2", "1e-3")))
    for folder, step in plan.steps.items():
        if isinstance(step, Search):
            folder.mkdir(parents=True)
            (folder / "genotype.json").write_text("{}")
            log = {"event": "epoch", "epoch": 1, "F": 2e-3, "H": float(step.bound)}
            (folder / "log.jsonl").write_text(json.dumps(log) + "\n")
    text = " ".join(caption(plan))
    assert "ended over their bound, so that it says little of their cells: H = 0.001: F = 0.002." in text


@pytest.mark.parametrize(("what", "only"), [("fig3", "VGG16"), ("table2", "SqueezeNet")])
def test_only_names_what_there_is(what: str, only: str) -> None:
    with pytest.raises(RnasError, match=r"leave out --only|table2 has none of SqueezeNet"):
        plan_of(what, "smoke", only=(only,))


def test_robnet_keeps_its_depth() -> None:
    cells = {step.arch: step.cells for step in trainings(plan_of("table1", "smoke"))}
    assert cells["RobNet-free"] == 20
    assert cells["RNAS-L"] == 3


def test_only_some_architectures() -> None:
    plan = plan_of("table1", "smoke", only=("rnasl", "ResNet18"))
    assert {step.arch for step in trainings(plan)} == {"RNAS-L", "ResNet18"}
    assert sum(row.reason == "not among the architectures asked for (--only)" for row in plan.rows) == 17
    with pytest.raises(RnasError, match="unknown architecture 'RNAS-X'"):
        plan_of("table1", only=("RNAS-X",))


def test_bad_input_names_what_would_be_right() -> None:
    with pytest.raises(RnasError, match="unknown table or figure 'tabel1': did you mean table1"):
        Reproduce("tabel1", OUT, "smoke")
    with pytest.raises(RnasError, match="seeds is 0"):
        Reproduce("table1", OUT, "smoke", seeds=0)
    with pytest.raises(RnasError, match="bound is 'low'"):
        Reproduce("fig5", OUT, "smoke", bounds=("low",))


def test_planning_loads_no_named_set() -> None:
    assert facts(Source("svhn")).train == 73_257
    assert facts(Source("tiny-imagenet", limit_per_class=10, image_size=16)) == Facts(2000, 10_000, 200, (16, 16))
    assert facts(Source("digits")) == Facts(1437, 360, 10, (16, 16))


def test_costs_are_passes_times_their_measured_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = []

    def measure(net: torch.nn.Module, *rest: object) -> Speed:
        measured.append(net)
        return Speed(gradient=0.001, weights=0.002)

    monkeypatch.setattr(cost, "measure", measure)
    plan = make_plan(Reproduce("table1", tmp_path, "hour", only=("RNAS-L",), device="cpu"))
    costs = Costs(plan)
    for step in trainings(plan):
        images = 8 * 5000  # epochs, 500 images of each of 10 classes
        assert costs.seconds(step) == pytest.approx(images * (0.002 + (0 if step.standard else 7 * 0.001)))
    for evaluation in evaluations(plan):
        spent = FORWARD + (1 if evaluation.attacks == ("fgsm",) else 1 + 20 + 100 + 100 + passes("aa", 0.25))
        spent += 20 + 2 * FORWARD  # F, under PGD-20
        assert costs.seconds(evaluation) == pytest.approx(256 * 0.001 * spent)
    assert len(measured) == 1
    assert len(Costs(plan).speeds) == 1  # from the file
    text = describe(plan, Costs(plan))
    assert len(measured) == 1
    assert "4 steps" in text[-1]
    (tmp_path / "throughput.json").write_text('{"a": 1}')
    with pytest.raises(RnasError, match="damaged"):
        Costs(plan)


def test_a_search_costs_its_two_phases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cost, "measure", lambda *rest: Speed(gradient=1.0, weights=10.0))
    plan = make_plan(Reproduce("table5", tmp_path, "paper", only=("RNAS-L",), data="cifar10", device="cpu"))
    (search,) = searches(plan)
    half, attack = 25_000, 7.0
    first = 15 * half * (attack + 10)
    second = 45 * half / 2 * ((attack + 10) + (attack + 20) + (attack / 5 + 20))
    watched = 60 * 2 * 256 * (attack + 2)
    assert Costs(plan).seconds(search) == pytest.approx(first + second + watched)
    assert Costs(plan).seconds(replace(search, projection_steps=1)) < Costs(plan).seconds(search)


def test_measured_speeds_are_positive_and_leave_the_weights() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
    before = net[1].weight.clone()
    speed = measure(net, Facts(10, 10, 5, (8, 8)), 4, torch.device("cpu"))
    assert speed.gradient > 0
    assert speed.weights > 0
    assert torch.equal(net[1].weight, before)


def test_weaker_networks_leave_autoattack_less_to_do() -> None:
    paper, hour, smoke = (Train("RNAS-L", epochs=epochs, out=Path()) for epochs in (600, 8, 2))
    clean = replace(paper, standard=True)
    shares = [survivors(training) for training in (clean, smoke, hour, paper)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.5, abs=0.01)
    spent = [passes("aa", share) for share in shares]
    assert spent == sorted(spent)
    assert spent[0] > passes("apgd-ce"), "its first part attacks every image"


def test_passes_of_attacks() -> None:
    assert [passes(a) for a in ("fgsm", "pgd20", "pgd100-any", "cw")] == [1, 20, 100, 100]
    assert all(passes(name) > 0 for name in NAMES), "every attack that can be asked for has a cost"
    with pytest.raises(RnasError, match="cost of pgd"):
        passes("pgd")
