"""The first line of a search and of a training: what will be done, and the options of a run that fits an hour."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rnas.cli import parse
from rnas.console import Console
from rnas.data import Dataset, load
from rnas.fast.supernet import FastSupernet
from rnas.nas.methods.rnas import Settings as Search
from rnas.nets import zoo
from rnas.nets.derived import DerivedNetwork
from rnas.planning import forecast
from rnas.planning.cost import Facts, Speed, search_seconds, train_seconds
from rnas.planning.forecast import announce_search, announce_train
from rnas.settings import Perturbation, Train

CPU = torch.device("cpu")


def speed(net: torch.nn.Module, *_: object) -> Speed:
    """In proportion to the parameters."""
    seconds = 1e-9 * sum(p.numel() for p in net.parameters())
    return Speed(seconds, 3 * seconds)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(forecast, "measure", speed)
    return load("digits")


def said(settings: Search | Train, data: Dataset) -> list[str]:
    stream = io.StringIO()
    if isinstance(settings, Search):
        announce_search(settings, Console(stream), data)
    else:

        def build(s: Train) -> torch.nn.Module:
            return zoo.build(s.arch, cells=s.cells, channels=s.channels)

        announce_train(settings, Console(stream), build, data)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    "settings",
    [
        Search(Path("out"), epochs=600),
        Search(Path("out"), epochs=600, warmup=300),
        Train("RNAS-L", Path("out"), epochs=6000),
        Train("ResNet18", Path("out"), epochs=30_000),
    ],
)
def test_what_takes_long_is_told_with_the_options_of_a_run_that_fits(settings: Search | Train, data: Dataset) -> None:
    first, note = said(settings, data)
    assert str(settings.epochs) in first
    words = shlex.split(note.rpartition(": ")[2])
    command = ["search"] if isinstance(settings, Search) else ["train", settings.arch]
    shorter = parse([*command, "--out", "out", *words])
    classes = 10
    about = Facts(min(1437, classes * (shorter.source.limit_per_class or 1437)), 360, classes, (16, 16))
    if isinstance(shorter, Search):
        assert (shorter.warmup or 0) < shorter.epochs
        net: torch.nn.Module = FastSupernet(shorter.space, classes, zoo.MEAN, zoo.STD)
        assert search_seconds(shorter, about, speed(net)) <= 3600
    else:
        net = zoo.build(shorter.arch, cells=shorter.cells, channels=shorter.channels)
        assert isinstance(net, DerivedNetwork) or "--cells" not in words
        assert train_seconds(shorter, about, speed(net)) <= 3600


def test_a_short_run_is_one_line(data: Dataset) -> None:
    assert len(said(Train("SqueezeNet", Path("out"), epochs=1), data)) == 1
    assert len(said(replace(Search(Path("out")), epochs=2, monitor=10), data)) == 1


def test_a_step_larger_than_the_ball_is_told(data: Dataset) -> None:
    perturbation = Perturbation(eps=8 / 255, step=12 / 255, attack_steps=3)
    lines = said(Train("SqueezeNet", Path("out"), epochs=1, perturbation=perturbation), data)
    assert "12/255" in lines[1]


def test_timing_draws_no_random_number(data: Dataset) -> None:
    state = torch.get_rng_state()
    said(Train("SqueezeNet", Path("out"), epochs=1), data)
    assert torch.equal(torch.get_rng_state(), state)
