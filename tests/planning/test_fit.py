"""`rnas run` on anyone's images chooses work that fits the time, and a resumed run keeps what was chosen."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rnas.cli import main, parse
from rnas.compute.precision import Precision
from rnas.console import Console
from rnas.data import Dataset, Split
from rnas.errors import RnasError
from rnas.planning import cost
from rnas.planning import fit as fitting
from rnas.planning.budgets import Budget, is_fitted, plan
from rnas.planning.cost import Speed
from rnas.planning.fit import choose, describe, fit, keep, threads
from rnas.settings import Run, Source

QUIET = Console(quiet=True)


def images(train: int = 2000, test: int = 200, classes: int = 4, size: tuple[int, int] = (64, 64)) -> Dataset:
    def split(n: int) -> Split:
        return Split(torch.zeros(1, dtype=torch.uint8).expand(n, 3, *size), torch.arange(n) % classes)

    return Dataset("own", split(train), split(test), tuple(map(str, range(classes))))


class Machine:
    """Takes time in proportion to the cells and channels of a network."""

    def __init__(self, seconds: float = 3.5e-5):
        self.seconds = seconds

    def speeds(self, budget: Budget, *rest: object) -> tuple[Speed, Speed]:
        space, train = budget.search.space, budget.train
        search, network = (self.seconds * n.cells * n.channels for n in (space, train))
        return Speed(2 * search, 8 * search), Speed(network, 4 * network)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """What the tests run on."""
    machine = Machine()
    monkeypatch.setattr(fitting, "speeds", machine.speeds)
    return machine


def own(tmp_path: Path, **options: object) -> Run:
    return Run(source=Source(data="own/"), out=tmp_path / "out", device="cpu", **options)  # type: ignore[arg-type]


def test_the_work_fits_the_time(tmp_path: Path, machine: Machine) -> None:
    data = images()
    epochs, networks = [], []
    for minutes in (10, 20, 60, 240):
        choice = fit(own(tmp_path, minutes=minutes), data, QUIET)
        assert 0.8 * 60 * minutes < choice.seconds <= 60 * minutes
        epochs.append(choice.train_epochs)
        networks.append((choice.train_cells, choice.train_channels))
    assert networks == sorted(networks)
    assert networks[0] == (5, 16) != networks[-1]
    assert min(epochs) >= 7
    assert fit(own(tmp_path), data, QUIET) == fit(own(tmp_path, minutes=20.0), data, QUIET)


def test_a_slow_machine_does_the_least_that_makes_sense_and_says_so(tmp_path: Path, machine: Machine) -> None:
    machine.seconds = 1.0
    run = own(tmp_path, minutes=5)
    choice = fit(run, images(), QUIET)
    assert (choice.search_epochs, choice.train_epochs, choice.attacked) == (4, 7, 200)
    line = describe(choice, plan(run, 2000, choice.budget(8 / 255)), run.minutes)
    assert "more than the 5 asked for" in line
    assert "--image-size" in line


@pytest.mark.parametrize("slow", [2e-4, 1e-2])
def test_what_takes_much_longer_is_not_started_unasked(slow: float, tmp_path: Path, machine: Machine) -> None:
    """Where nobody can be asked, the command that fits is told, or the shortest with its time; it starts."""
    machine.seconds = slow
    run, data = own(tmp_path, minutes=5.0), images()
    with pytest.raises(RnasError, match="--yes") as stop:
        choose(run, data, QUIET)
    assert choose(replace(run, yes=True), data, QUIET).seconds > 300
    words = shlex.split(str(stop.value).partition(": rnas ")[2].partition(". --yes")[0])
    smaller = parse(words)
    assert smaller.out == run.out
    left = smaller.source.limit_per_class
    assert smaller.minutes == 5 or slow > 1e-3
    assert choose(smaller, images(train=4 * left if left else 2000), QUIET)


def test_the_line_says_what_was_chosen_and_how_to_get_more(tmp_path: Path, machine: Machine) -> None:
    run = own(tmp_path)
    choice = fit(run, images(), QUIET)
    line = describe(choice, plan(run, 2000, choice.budget(8 / 255)), run.minutes)
    assert line.startswith(f"about {round(choice.seconds / 60)} min on this machine")
    for said in (
        f"train {choice.train_epochs} epochs",
        "250 images a class at 32 pixels",
        "--minutes",
        "--budget paper",
    ):
        assert said in line
    assert "\n" not in line
    again = describe(choice, plan(run, 2000, choice.budget(8 / 255)), run.minutes, kept=True)
    assert "going on" in again
    assert "about" not in again, "how long it takes was true then"


def test_one_thread_is_taken_where_it_is_quicker(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside busy programs two threads wait for each other; who sets OMP_NUM_THREADS knows better."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def speeds(*arguments: Budget) -> tuple[Speed, Speed]:
        slower = 5 if torch.get_num_threads() > 1 else 1
        return tuple(Speed(slower * s.gradient, slower * s.weights) for s in machine.speeds(*arguments))  # type: ignore[return-value]

    with threads(2):
        idle = fit(own(tmp_path), images(), QUIET)
        monkeypatch.setattr(fitting, "speeds", speeds)
        busy = fit(own(tmp_path), images(), QUIET)
        line = describe(busy, plan(own(tmp_path), 2000, busy.budget(8 / 255)), None)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        told = fit(own(tmp_path), images(), QUIET)
        assert torch.get_num_threads() == 2
    assert (idle.threads, busy.threads, told.threads) == (2, 1, 2)
    assert busy.train_epochs > told.train_epochs
    assert "on 1 of 2 threads" in line


def test_large_images_are_searched_small_and_halved_at_once(tmp_path: Path, machine: Machine) -> None:
    for size, side, stride in (((64, 64), 32, 2), ((32, 32), None, 1), ((16, 48), None, 1), ((36, 36), 32, 1)):
        choice = fit(own(tmp_path), images(size=size), QUIET)
        assert (choice.search_side, choice.stem_stride) == (side, stride), size
        budget = plan(own(tmp_path), 2000, choice.budget(8 / 255))
        assert budget.search.source.image_size == side
        assert budget.train.source.image_size is None, "the network is for the images as they are"
        assert budget.train.stem_stride == stride


@settings(max_examples=40, deadline=None)
@given(
    train=st.integers(2, 200_000),
    classes=st.integers(2, 200),
    speed=st.floats(1e-8, 1.0),
    minutes=st.floats(1, 10_000),
    batch=st.none() | st.integers(1, 300),
)
def test_any_choice_can_be_planned(train: int, classes: int, speed: float, minutes: float, batch: int | None) -> None:
    classes = min(classes, train)
    data = images(train, 50, classes)
    if batch is not None and batch > train // 2:
        batch = None
    run = Run(source=Source(data="own/"), out=Path("nowhere"), device="cpu", minutes=minutes, batch_size=batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "speeds", Machine(speed).speeds)
        choice = fit(run, data, QUIET)
    budget = plan(run, train, choice.budget(8 / 255))
    floors = choice.train_epochs == max(2, min(100, 15_000 // train)) or choice.search_epochs == 4
    assert choice.seconds <= 60 * minutes + 1 or floors
    seen = sum(min(choice.search_per_class or train, len(range(k, train, classes))) for k in range(classes))
    assert budget.search.batch_size <= max(1, seen // 2), "each half of the search's images fills a batch"
    assert budget.search.warmup is not None
    assert budget.search.warmup < budget.search.epochs


def test_options_win_over_the_choice(tmp_path: Path, machine: Machine) -> None:
    run = own(tmp_path, train_epochs=3, search_epochs=2, channels=4, limit=10, attacks=("cw-l2", "square"))
    choice = fit(run, images(), QUIET)
    budget = plan(run, 2000, choice.budget(8 / 255))
    assert (budget.train.epochs, budget.search.epochs, budget.search.space.channels) == (3, 2, 4)
    assert (budget.evaluate.limit, budget.evaluate.attacks) == (10, ("cw-l2", "square"))
    assert choice.seconds < 60 * 20


def test_the_passes_that_are_timed_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed = []

    def measure(net: torch.nn.Module, about: object, batch: int, device: object, precision: Precision) -> Speed:
        timed.append((type(net).__name__, precision.name))
        return Speed(1e-4, 4e-4)

    monkeypatch.setattr(cost, "measure", measure)
    fit(own(tmp_path, precision="bf16", save_memory=True), images(), QUIET)
    assert set(timed) == {("FastSupernet", "bf16"), ("DerivedNetwork", "bf16")}


def test_the_training_attack_reaches_its_radius_in_three_steps(tmp_path: Path, machine: Machine) -> None:
    choice = fit(own(tmp_path), images(), QUIET)
    for eps in (8 / 255, 16 / 255):
        attack = plan(own(tmp_path), 2000, choice.budget(eps)).train.perturbation
        assert attack.step is not None
        assert attack.attack_steps * attack.step >= eps


def test_a_choice_is_kept_and_a_damaged_one_refused(tmp_path: Path, machine: Machine) -> None:
    run = own(tmp_path)
    choice = choose(run, images(), QUIET)
    keep(choice, run.out)
    machine.seconds /= 10
    assert choose(run, images(), QUIET) == choice
    keep(replace(choice, seconds=1), run.out)
    assert choose(run, images(), QUIET) == choice, "the first choice stays"
    path = run.out / "budget.json"
    kept = json.loads(path.read_text())
    for damaged in ([], {}, {**kept, "batch_size": "32"}, {**kept, "train_epochs": 0}, {**kept, "more": 1}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(RnasError, match=r"budget\.json is damaged"):
            choose(run, images(), QUIET)


def test_digits_are_the_demo_unless_a_time_is_asked_for(tmp_path: Path) -> None:
    assert not is_fitted(Run())
    assert is_fitted(Run(minutes=5))
    assert is_fitted(Run(source=Source(data="cifar10")))
    assert not is_fitted(Run(source=Source(data="cifar10"), budget="small"))


def folder(root: Path, size: int = 16) -> Path:
    """Two classes of noise, one bright and one dark."""
    generator = np.random.default_rng(0)
    for part, n in (("train", 8), ("test", 3)):
        for k, name in enumerate(("ant", "Wespe")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = generator.integers(0, 128, (size, size, 3), np.uint8) + np.uint8(120 * k)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_own_images_from_folder_to_report_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class names reach model.json, the report and the exported file; another timing makes no other run."""
    out = tmp_path / "out"
    quick = "--minutes 1 --bound none --channels 2 --attacks fgsm --yes"
    command = f"run --data {folder(tmp_path / 'insects')} --out {out} {quick}".split()
    monkeypatch.setattr(fitting, "CPU_IMAGES", 4)
    monkeypatch.setattr(fitting, "TRAIN_EPOCHS", range(1, 2))
    monkeypatch.setattr(fitting, "SEARCH_EPOCHS", range(2, 3))
    main(command)
    said = capsys.readouterr().out
    assert "decoding insects ..." in said
    assert "min on this machine: search 2 epochs" in said
    assert json.loads((out / "train" / "model.json").read_text())["classes"] == ["Wespe", "ant"]
    report = (out / "report.html").read_text()
    assert "Wespe" in report
    metadata = {p.key: json.loads(p.value) for p in onnx.load(out / "model.onnx").metadata_props}
    assert metadata["classes"] == ["Wespe", "ant"]
    assert json.loads((out / "search" / "settings.json").read_text())["epochs"] == 2
    chosen = (out / "budget.json").read_text()

    (out / "train" / "evaluation.json").unlink()  # as if the run had been cut off there
    monkeypatch.setattr(fitting, "speeds", Machine(100.0).speeds)
    main([*command, "--resume"])
    assert (out / "budget.json").read_text() == chosen
    assert (out / "train" / "evaluation.json").exists()
