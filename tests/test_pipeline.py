"""`rnas run`, whole, on real digits at a size of seconds: every file that DESIGN promises, and nothing done twice."""

import json
import sys
from pathlib import Path

import pytest

import rnas
from rnas.cli import main
from rnas.planning.budgets import plan
from rnas.settings import Run, Source

SMALL = (
    "run --channels 4 --cells 2 --search-epochs 2 --train-epochs 1 --batch-size 32 --limit 40 --limit-per-class 8 "
    "--attacks fgsm pgd2"
).split()


def test_the_whole_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A plain installation, without the extra `export`, lacks the ONNX file only: told at the start, and at the end with
    # the command for it.
    with monkeypatch.context() as plain:
        plain.setitem(sys.modules, "onnx", None)
        main([*SMALL, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "onnx" in said.splitlines()[0]
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "model.onnx").exists()
    command = next(line for line in said.splitlines() if "rnas export" in line).partition("rnas export ")[2]
    main(["export", *command.split()])

    for name in ("search/genotype.json", "search/alphas.npz", "train/model.safetensors", "train/evaluation.json"):
        assert (tmp_path / name).exists(), name
    for name in ("train/masks.npz", "train-standard/evaluation.json", "model.onnx", "report.html", "settings.json"):
        assert (tmp_path / name).exists(), name
    assert "report.html" in said
    evaluation = json.loads((tmp_path / "train" / "evaluation.json").read_text())
    assert set(evaluation["attacks"]) == {"fgsm", "pgd2"}
    assert rnas.load(tmp_path).training is False

    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name in ("genotype.json", "model.safetensors")}
    main([*SMALL, "--out", str(tmp_path), "--resume"])
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "what is finished is not done again"
    with pytest.raises(SystemExit):
        main([*SMALL, "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        main([*SMALL, "--out", str(tmp_path), "--resume", "--precision", "bf16"])
    assert "precision was" in capsys.readouterr().err

    main(["evaluate", str(tmp_path), "--attacks", "fgsm", "--limit", "10"])
    main([*SMALL, "--out", str(tmp_path), "--resume"])
    again = json.loads((tmp_path / "train" / "evaluation.json").read_text())
    assert (again["n"], set(again["attacks"])) == (40, {"fgsm", "pgd2"}), "another evaluation is not this run's"
    assert again["attacks"]["pgd2"]["accuracy"] == evaluation["attacks"]["pgd2"]["accuracy"]


def test_budgets() -> None:
    paper = plan(Run(source=Source(data="cifar10"), budget="paper"), 50_000)
    assert (paper.search.epochs, paper.search.batch_size, paper.search.space.cells) == (60, 128, 8)
    assert (paper.train.epochs, paper.train.cells, paper.train.channels, paper.train.lr) == (600, 20, 36, 0.1)
    assert "aa" in paper.evaluate.attacks
    assert plan(Run(source=Source(data="digits")), 1437).search.space.channels == 8
    own = Source(data="own/")
    assert plan(Run(source=own, budget="small", channels=12), 500).train.channels == 12
    assert plan(Run(source=own, budget="small"), 80).search.batch_size == 40, "a budget's batch fits small data"
    for budget in ("demo", "small", "paper"):
        lean = plan(Run(source=own, budget=budget, precision="bf16", save_memory=True), 500)
        for job in (lean.search, *lean.trainings.values()):
            assert (job.precision, job.save_memory) == ("bf16", True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--attacks", "pgd-20"], "pgd20"),
        (["--batch-size", "4000"], "smaller --batch-size"),
        (["--image-size", "18"], "choose one with --image-size"),
        (["--budget", "small", "--minutes", "9"], "leave out one"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_bad_input_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
