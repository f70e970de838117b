"""Options of a command line that would have no effect: refused before anything begins, for whoever gives one expects
one. Settings made in Python may hold them. No torch."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from rnas import published as paper
from rnas.errors import RnasError
from rnas.settings import Reproduce, Train

CELL_NETWORKS = ("cells", "channels", "stem_stride", "drop_path", "save_memory")
"""Options of a training that only networks of cells have."""


def check_effect(command: Any) -> None:
    """RnasError for an option of `command` that was given and would do nothing."""
    match command:
        case Train():
            _check_train(command)
        case Reproduce() if command.what != "fig5":
            _refuse(_given(command, "bounds"), f"the bounds are those of fig5, and this is {command.what}")


def _check_train(settings: Train) -> None:
    if settings.standard:
        attack = ["loss"] if settings.loss != "pgd" else []
        attack += _given(settings.perturbation, "eps", "step", "attack_steps")
        _refuse(attack, "with --standard, training is on clean images")
    if settings.loss != "trades":
        _refuse(_given(settings, "trades_beta"), "that is for --loss trades")
    if _is_hand_made(settings.arch):
        _refuse(_given(settings, *CELL_NETWORKS), f"that is for networks of cells, and {settings.arch} has none")


def _is_hand_made(arch: str) -> bool:
    try:
        return not Path(arch).exists() and paper.find(arch).kind == "hand-made"
    except RnasError:  # a path, or nothing: the training says so
        return False


def _given(settings: Any, *names: str) -> list[str]:
    """Those of `names` whose values are not the default."""
    defaults = {f.name: f.default for f in fields(settings)}
    return [name for name in names if getattr(settings, name) != defaults[name]]


def _refuse(names: list[str], why: str) -> None:
    if names:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in names)
        raise RnasError(f"{options} would have no effect: {why}; leave it out")
