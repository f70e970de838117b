"""Budgets: functions that return full settings. What they return is recorded: another setting is another run."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from rnas.nas.methods import load, names
from rnas.nas.methods.rnas import Settings
from rnas.planning.budgets import BUDGETS, paper, plan
from rnas.reproduce.plan import make_plan
from rnas.settings import Reproduce, Run, flags

DEMO = {
    "search": (
        "--out runs/demo/search --cells 3 --channels 8 --attack-steps 4 --epochs 5 --batch-size 64 --lr 0.05 "
        "--monitor 64 --resume --bound 0.5x --warmup 3 --alpha-lr 0.01 --projection-steps 30 --projection-lr 0.4"
    ),
    "train": (
        "--arch runs/demo/search --out runs/demo/train --cells 3 --channels 8 --epochs 8 --batch-size 64 "
        "--drop-path 0.0 --resume"
    ),
    "evaluate": "--run runs/demo/train --attacks fgsm pgd20 cw --resume",
}
"""What `rnas run` does without options, as options of its parts."""

FOLDERS = {
    "paper": {"search-rnas-1e-3-cifar10-s0-ca27cdda", "RNAS-L-cifar10-at-s0-fb67ab9c"},
    "day": {"search-rnas-1e-3-cifar10-s0-6eb1ad36", "RNAS-L-cifar10-at-s0-43693427"},
    "hour": {"search-rnas-1e-3-cifar10-s0-51ddf660", "RNAS-L-cifar10-at-s0-682e7c17"},
    "smoke": {"search-rnas-1e-3-cifar10-s0-a65c877e", "RNAS-L-cifar10-at-s0-774e321b"},
}
"""Folders of `rnas reproduce`, whose names end with a digest of all settings."""


def test_the_demo_is_the_recorded_one() -> None:
    demo = asdict(plan(Run(), 1437))
    for part, words in DEMO.items():
        assert shlex.join(flags(getattr(plan(Run(), 1437), part))) == words
    assert demo["train"]["source"] == demo["search"]["source"] == asdict(Run())["source"]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_papers_runs_are_the_recorded_ones(name: str) -> None:
    made = make_plan(Reproduce("fig5", Path("o"), name, bounds=("1e-3", "1e-5")))  # type: ignore[arg-type]
    assert FOLDERS[name] <= {path.name for path in made.steps}


@pytest.mark.parametrize("method", names())
@pytest.mark.parametrize("name", BUDGETS)
def test_each_budget_is_one_of_any_method(name: str, method: str) -> None:
    kind = load(method).settings
    assert type(BUDGETS[name](kind).search) is kind


def test_the_papers_budget_is_the_settings_as_they_are() -> None:
    assert paper(Settings).search == Settings(Path())
