"""rnas from Python: what the README shows runs, returns what a notebook goes on with, and leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import rnas
from rnas.errors import RnasError
from rnas.files import read_json
from rnas.genotype import Genotype, architecture_from_json
from rnas.settings import Evaluate, Perturbation, Search, Source, Train, flag_names, from_flags

README = (Path(__file__).parents[1] / "README.md").read_text()
IMAGES = {"image_size": 8, "limit_per_class": 8}
ATTACK = {"attack_steps": 1, "batch_size": 20}
SEARCH: dict[str, Any] = {**IMAGES, **ATTACK, "cells": 3, "channels": 2, "nodes": 1, "monitor": 10}
TRAIN: dict[str, Any] = {**IMAGES, **ATTACK, "cells": 3, "channels": 2, "epochs": 1}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is temporary lies where a test sees it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(rnas, "TemporaryDirectory", partial(TemporaryDirectory, dir=tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)


def test_what_the_readme_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls as they stand there, on less work."""
    (shown,) = re.findall(r"```python\n(.*?rnas\.search.*?)```", README, re.DOTALL)
    on_less: dict[str, dict[str, Any]] = {
        "search": {**SEARCH, "epochs": 2, "projection_steps": 1},
        "train": {**TRAIN, "data": "digits"},
        "evaluate": {"attacks": ["fgsm", "pgd2"]},
        "build": {"cells": 3, "channels": 2, "image_size": 8},
    }
    for name, less in on_less.items():
        called = getattr(rnas, name)
        monkeypatch.setattr(rnas, name, lambda *a, called=called, less=less, **k: called(*a, **{**k, **less}))
    digits = {"x": torch.rand(4, 3, 8, 8), "y": torch.arange(4)}
    found: dict[str, Any] = {"rnas": rnas, **digits}
    exec(compile(shown.replace('"aa"', '"pgd2"'), "README.md", "exec"), found)
    assert isinstance(found["genotype"], Genotype)
    assert found["model"].training is False
    assert found["result"].summary["attacks"].keys() == {"fgsm", "pgd2"}
    assert not list((tmp_path / "temporary").iterdir())


def test_a_search_a_training_of_its_cell_and_an_evaluation(tmp_path: Path) -> None:
    genotype = rnas.search("digits", out="s", epochs=1, warmup=0, bound=1e-3, projection_steps=1, **SEARCH)
    assert genotype == architecture_from_json(read_json(Path("s/genotype.json")), "s")
    assert read_json(Path("s/settings.json"))["bound"] == "0.001"
    rnas.train(genotype, data="digits", out="t", eps="8/255", **TRAIN)
    kept = sorted(Path("t").iterdir())
    result = rnas.evaluate("t", attacks=["fgsm"], limit=10, seed=1)
    assert (result.summary["n"], result.summary["seed"], result.summary["dataset"]) == (10, 1, "digits")
    assert sorted(Path("t").iterdir()) == kept
    again = rnas.evaluate("t", attacks=["fgsm"], limit=10, seed=1, out="e")
    assert again.robust("fgsm") == result.robust("fgsm")
    assert Path("e/evaluation.json").is_file()
    same = rnas.evaluate(rnas.load("t"), data="digits", image_size=8, attacks=["fgsm"], limit=10, seed=1)
    assert (same.masks["fgsm"] == result.masks["fgsm"]).all()
    assert not list((tmp_path / "temporary").iterdir())


def test_an_attack_by_its_name() -> None:
    net = rnas.build("RNAS-L", cells=3, channels=2, image_size=8).eval()
    x, y = torch.rand(3, 3, 8, 8), torch.arange(3)
    x_adv = rnas.attack(net, x, y, "pgd2", eps=0.1, seed=0)
    assert x_adv.shape == x.shape
    assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6
    assert torch.equal(x_adv, rnas.attack(net, x, y, "pgd2", eps=0.1, seed=0))
    with pytest.raises(RnasError, match="pgd20"):
        rnas.attack(net, x, y, "pgd-20")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: rnas.search("digits", epoch=3), "epochs"),
        (lambda: rnas.search("digits", method="darts", bound=1e-4), "rnas"),
        (lambda: rnas.search("digits", method="dart"), "darts"),
        (lambda: rnas.search("digits", epochs="three"), "epochs"),
        (lambda: rnas.train("RNAS-L", trades_beta=3.0), "trades-beta"),
        (lambda: rnas.train("RNAS-L", loss="trade"), "trades"),
        (lambda: rnas.train("RNAS-L", batchsize=3), "batch_size"),
        (lambda: rnas.evaluate("t", atacks=["fgsm"]), "attacks"),
        (lambda: rnas.evaluate("t", attacks="fgsm"), "list"),
        (lambda: rnas.evaluate(torch.nn.Flatten()), "data"),
        (lambda: rnas.evaluate(torch.nn.Flatten(), torch.rand(1, 3, 8, 8)), "labels"),
        (lambda: rnas.evaluate(torch.nn.Flatten(), data="digits", out="e"), "out"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(call: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(RnasError, match=named):
        call()
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


def test_keyword_arguments_are_the_flags_with_settings_in_settings_side_by_side() -> None:
    for kind in (Search, Train, Evaluate):
        names = flag_names(kind)
        assert len(names) == len(set(names))
    given = from_flags(Train, {"arch": Path("a"), "out": "o", "eps": "8/255", "data": Path("d"), "lr": 1})
    assert given == Train("a", Path("o"), Source("d"), Perturbation(eps=8 / 255), lr=1)


def test_torch_waits_until_it_is_needed() -> None:
    code = "import sys, rnas; rnas.search, rnas.attack; assert 'torch' not in sys.modules; rnas.attacks.PGD"
    subprocess.run([sys.executable, "-c", code], check=True)
