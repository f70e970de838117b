"""`rnas reproduce`, running: from nothing to the table, after a kill, a second time, and when a run fails."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rnas.console import Console
from rnas.errors import RnasError
from rnas.planning.budgets import BUDGETS, Budget
from rnas.planning.budgets import smoke as smoke_budget
from rnas.reproduce import execute, reproduce
from rnas.reproduce import plan as planning
from rnas.reproduce.execute import finished
from rnas.reproduce.plan import Step, make_plan
from rnas.settings import Evaluate, Reproduce, Search, SearchSpace, Source, Train


def tinier(kind: type[Any]) -> Budget[Any]:
    """`smoke`, and less of it."""
    budget, source = smoke_budget(kind), Source(limit_per_class=2)
    search = replace(budget.search, source=source, space=SearchSpace(2, 2), batch_size=10, monitor=2)
    return Budget(
        replace(search, projection_steps=1) if hasattr(search, "projection_steps") else search,
        replace(budget.train, source=source, epochs=1),
        replace(budget.evaluate, limit=4),
        replace(budget.distortion, limit=2, attack_steps=1),
    )


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "smoke", tinier)
    monkeypatch.setattr(planning, "ATTACKS", ("fgsm", "pgd20"))


def smoke(what: str, out: Path, **options: Any) -> Reproduce:
    return Reproduce(what, out, "smoke", data="digits", device="cpu", **options)


class Killed(BaseException):
    pass


def test_a_table_after_a_kill_is_the_table_of_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("SqueezeNet",)
    whole = reproduce(smoke("table1", tmp_path / "whole", only=only))
    table = whole[0].read_text()
    rows = [row.split(",") for row in table.splitlines() if row.startswith(only)]
    measured = {(row[0], row[1], row[2]) for row in rows if row[3]}
    trained = {(m, "at", a) for m in only for a in ("clean", "fgsm", "pgd20")}
    assert measured == trained | {(m, "st", a) for m in only for a in ("clean", "fgsm")}

    perform, done = execute.perform, []

    def killed_in_the_third(step: Step, console: Console) -> None:
        if len(done) == 2:
            raise Killed
        perform(step, console)
        done.append(step)

    monkeypatch.setattr(execute, "perform", killed_in_the_third)
    settings = smoke("table1", tmp_path / "killed", only=only)
    with pytest.raises(Killed):
        reproduce(settings)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("killed/runs/*/model.safetensors")}
    assert len(before) == 1
    monkeypatch.setattr(execute, "perform", perform)
    reproduce(settings, Console())
    printed = capsys.readouterr().out
    assert printed.count(" done\n") == 2  # a training and its evaluation
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "killed" / "table1.csv").read_text() == table

    def never(step: Step, console: Console) -> None:
        raise AssertionError(f"{step} was done already")

    monkeypatch.setattr(execute, "perform", never)
    reproduce(settings)  # nothing is left to do


def test_a_searched_cell_is_trained(tmp_path: Path) -> None:
    files = reproduce(smoke("table5", tmp_path, only=("RNAS-H",)))
    plan = make_plan(smoke("table5", tmp_path, only=("RNAS-H",)))
    search, train, evaluation = plan.steps.values()
    assert isinstance(search, Search)
    assert isinstance(train, Train)
    assert isinstance(evaluation, Evaluate)
    found = json.loads((search.out / "genotype.json").read_text())
    assert json.loads((train.out / "model.json").read_text())["genotype"] == found
    assert all(map(finished, plan.steps.values()))
    text = files[1].read_text()
    assert "2 search epochs instead of 60" in text


def test_fig2_shows_feature_maps_of_both_trainings(tmp_path: Path) -> None:
    svg, _, note = reproduce(smoke("fig2", tmp_path))
    text = svg.read_text()
    assert "ST conv4_3" in text
    assert "AT conv4_3" in text
    assert text.count("<image") == 2 * 8 * (2 + 2 * 5)  # clean and adversarial, channels, conv4_3 and five depths
    assert "digits, given with --data" in note.read_text()
    assert "2 test images, l∞ attacks with ε = 16/255" in note.read_text()  # of the distortion


def test_other_settings_are_another_evaluation(tmp_path: Path) -> None:
    plan = make_plan(smoke("table2", tmp_path, only=("SqueezeNet", "ResNet18")))
    step = next(s for s in plan.steps.values() if isinstance(s, Evaluate))
    step.run.mkdir(parents=True)
    model = {"arch": "ResNet18", "classes": ["0", "1"], "image_size": [8, 8], "weights": "abc"}
    (step.run / "model.json").write_text(json.dumps(model))
    (step.run / "masks.npz").touch()
    path = step.run / "evaluation.json"
    half = {"accuracy": 0.5}
    done = {"attacks": dict.fromkeys(("fgsm", "pgd20", "aa"), half), "limit": 4, "eps": 16 / 255, "norm": "linf"}
    done |= {"seed": 0, "n": 4, "clean": half, "data": None, "weights": "abc", "dataset": "digits"}
    path.write_text(json.dumps({key: done[key] for key in ("eps", "norm", "n", "clean", "attacks")}))
    assert not finished(step)  # nobody knows with which settings
    path.write_text(json.dumps(done))
    assert finished(step)  # more attacks are no harm
    for change in ({"attacks": {"fgsm": half}}, {"limit": 2}, {"eps": 8 / 255}, {"weights": "def"}, {"data": "x.npz"}):
        path.write_text(json.dumps({**done, **change}))
        assert not finished(step)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RnasError("training loss became nan in epoch 1, step 1"), "training loss became nan"),
        pytest.param(
            torch.OutOfMemoryError("CUDA out of memory."),
            "out of memory (CUDA out of memory.)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_failed_run_leaves_its_cells_empty_and_the_rest_goes_on(
    error: Exception, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    perform = execute.perform

    def diverging(step: Step, console: Console) -> None:
        if isinstance(step, Train) and step.arch == "SqueezeNet":
            raise error
        perform(step, console)

    monkeypatch.setattr(execute, "perform", diverging)
    monkeypatch.setattr(planning, "ATTACKS", ("fgsm",))
    files = reproduce(smoke("table1", tmp_path, only=("SqueezeNet", "RNAS-L")), Console())
    assert f"failed: {why}" in capsys.readouterr().out
    rows = files[0].read_text().splitlines()
    assert sum(f"failed: {why}" in row for row in rows) == 8
    assert sum(row.startswith("RNAS-L,") and row.split(",")[3] != "" for row in rows) == 4
    with pytest.raises(RnasError, match=re.escape(f"no run of table1 succeeded: {why}")):
        reproduce(smoke("table1", tmp_path / "none", only=("SqueezeNet",)))


def test_plan_only_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(smoke("table1", tmp_path, only=("SqueezeNet",), plan=True), Console()) == []
    printed = capsys.readouterr().out
    assert "table1 at budget smoke: 4 steps, about " in printed
    assert [path.name for path in tmp_path.iterdir()] == ["throughput.json"]


def test_missing_images_are_told_before_anything_is_run(tmp_path: Path) -> None:
    with pytest.raises(RnasError, match=r"none\.npz"):
        reproduce(Reproduce("table1", tmp_path / "out", "smoke", data=str(tmp_path / "none.npz")))
    assert not (tmp_path / "out").exists()
