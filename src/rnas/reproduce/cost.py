"""What a plan will cost: a few timed passes of every network, times the passes that its runs make."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rnas.compute.device import choose_device, own_random_numbers, reseed
from rnas.console import Console
from rnas.data import load
from rnas.data.official.catalogue import SETS
from rnas.errors import RnasError
from rnas.fast.supernet import FastSupernet
from rnas.files import write_json
from rnas.nets import zoo
from rnas.planning.cost import FORWARD, Facts, evaluate_seconds, measure, search_seconds, train_seconds
from rnas.records import codec
from rnas.records.layout import THROUGHPUT
from rnas.records.schema import Speed
from rnas.reproduce.plan import Plan, Step
from rnas.settings import Distortion, Evaluate, Search, Source, Train

CPU_IMAGES = 8


def facts(source: Source) -> Facts:
    """The counts of `source`; named sets are not loaded, let alone downloaded: planning does neither."""
    official = SETS.get(source.data)
    if official is not None:
        found = Facts(*official.counts, official.class_count, (official.image_size, official.image_size))
    else:
        data = load(source.data, root=source.data_root)
        found = Facts(len(data.train), len(data.test), len(data.classes), data.image_size)
    size = (source.image_size, source.image_size) if source.image_size else found.image_size
    most = found.train if source.limit_per_class is None else source.limit_per_class * found.classes
    return Facts(min(found.train, most), found.test, found.classes, size)


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
                n = min(step.limit, self.facts(trained.source).test)
                return n * self._speed(trained).gradient * (step.attack_steps + 2 * FORWARD)
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
            batch = CPU_IMAGES if self.device.type == "cpu" else step.batch_size
            net = self._build(step, about)
            self.speeds[key] = measure(net, about, batch, self.device)
            write_json(self.path, codec.encode(self.speeds))
        return self.speeds[key]

    def _build(self, step: Search | Train, about: Facts) -> nn.Module:
        with own_random_numbers(self.device):
            reseed(0)
            if isinstance(step, Search):
                return FastSupernet(step.space, about.classes, zoo.MEAN, zoo.STD)
            arch = _timed(step)
            return zoo.build(arch, about.classes, cells=step.cells, channels=step.channels, image_size=about.image_size)

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu with {torch.get_num_threads()} threads"


def _what(step: Search | Train) -> str:
    if isinstance(step, Search):
        return f"supernet of {step.space.cells} cells, C = {step.space.channels}"
    return f"{_timed(step)}, {step.cells} cells, C = {step.channels}"


def _timed(step: Train) -> str:
    """The network to time for a training: where the cell is yet to be found, RNAS-L stands in for it."""
    return "RNAS-L" if "/" in step.arch or "\\" in step.arch else step.arch


def _read(path: Path) -> dict[str, Speed]:
    try:
        return codec.read(dict[str, Speed], path) if path.exists() else {}
    except RnasError as e:
        raise RnasError(f"{e}; delete it, it is measured again") from e
