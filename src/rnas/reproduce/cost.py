"""What a plan will cost. The formulas are `rnas.planning.cost`; here are the plan's networks, each timed once."""

from __future__ import annotations

from pathlib import Path

import torch

from rnas.compute.device import choose_device
from rnas.console import Console
from rnas.errors import RnasError
from rnas.files import write_json
from rnas.planning.cost import (
    Facts,
    distortion_seconds,
    evaluate_seconds,
    facts,
    search_seconds,
    stand_in,
    timed,
    train_seconds,
)
from rnas.records import codec
from rnas.records.layout import THROUGHPUT
from rnas.records.schema import Speed
from rnas.reproduce.plan import Plan, Step
from rnas.settings import Distortion, Evaluate, Search, Source, Train

CPU_IMAGES = 8
"""Images to time with on a CPU: a table has many networks, and large ones."""


class Costs:
    """Estimates for the steps of one plan. Speeds are measured once and kept in the plan's folder."""

    def __init__(self, plan: Plan, console: Console | None = None):
        self.plan = plan
        self.console = console or Console(quiet=True)
        self.path = plan.settings.out / THROUGHPUT
        self.device = choose_device(plan.settings.device)
        self.speeds: dict[str, Speed] = _read(self.path)
        self._facts: dict[Source, Facts] = {}

    def seconds(self, step: Step) -> float:
        """About how long `step` takes from its start to its end on this device."""
        match step:
            case Search():
                return search_seconds(step, self.facts(step.source), self._speed(step))
            case Train():
                return train_seconds(step, self.facts(step.source), self._speed(step))
            case Evaluate(run=run):
                trained = self._training(run)
                return evaluate_seconds(step, trained, self.facts(trained.source), self._speed(trained))
            case Distortion(networks=(run,)):
                trained = self._training(Path(run))
                return distortion_seconds(step, self.facts(trained.source), self._speed(trained))
        raise RnasError(f"{step} is nothing that a plan runs")

    def facts(self, source: Source) -> Facts:
        """The counts of a data set, looked up once."""
        if source not in self._facts:
            self._facts[source] = facts(source)
        return self._facts[source]

    def _training(self, run: Path) -> Train:
        step = self.plan.steps[run]
        assert isinstance(step, Train)
        return step

    def _speed(self, step: Search | Train) -> Speed:
        about = self.facts(step.source)
        key = " ".join([_what(step), f"{about.image_size[0]}x{about.image_size[1]}", self._device_name()])
        if key not in self.speeds:
            self.console.say(f"timing {key} ...")
            self.speeds[key] = timed(step, about, self.device, CPU_IMAGES)
            write_json(self.path, codec.encode(self.speeds))
        return self.speeds[key]

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu with {torch.get_num_threads()} threads"


def _what(step: Search | Train) -> str:
    if isinstance(step, Search):
        return f"supernet of {step.space.cells} cells, C = {step.space.channels}"
    return f"{stand_in(step)}, {step.cells} cells, C = {step.channels}"


def _read(path: Path) -> dict[str, Speed]:
    try:
        return codec.read(dict[str, Speed], path) if path.exists() else {}
    except RnasError as e:
        raise RnasError(f"{e}; delete it, it is measured again") from e
