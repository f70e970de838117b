"""The frame of a search: data halves, checkpoint, log, measurements. What happens in an epoch is a method's to say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnas.compute import checkpoint
from rnas.compute.device import choose_device, hardware, reseed
from rnas.compute.precision import full_precision
from rnas.console import Console
from rnas.data import Dataset, halves
from rnas.data.sources import fingerprint, load_data
from rnas.errors import RnasError
from rnas.evaluation.trust import above_chance, chance
from rnas.fast.recording import forget
from rnas.fast.supernet import FastSupernet
from rnas.files import write_text
from rnas.genotype import Architecture, CellCodes
from rnas.nas.engine import WEIGHTS_DRAWN, Batch, Engine, Halves, Measured
from rnas.nas.methods import load
from rnas.nas.methods.base import Method
from rnas.nas.progress import Progress
from rnas.nas.sizes import limits_of
from rnas.nets.derived import check_image_size
from rnas.nets.space import Shape, Weights
from rnas.records.arrays import write_arrays
from rnas.records.folder import Run, read_log
from rnas.records.layout import ALPHAS, GENOTYPE, LOG, STRENGTHS
from rnas.settings import Search, SearchSpace
from rnas.training.adversarial import training_attack
from rnas.training.meters import Running
from rnas.training.schedule import set_lr
from rnas.training.step import check_finite


@dataclass
class State:
    """All that changes while a search runs; exactly what a checkpoint holds."""

    engine: Engine
    data: Dataset
    epoch: int = 0
    strengths: list[list[Tensor]] = field(default_factory=list)
    """(edges, operations) of each kind of cell, after every epoch, and at the start."""
    alphas: list[list[Tensor]] = field(default_factory=list)

    def build(self, shape: Shape, epoch: int) -> None:
        """A new supernet of this shape for the epochs from `epoch` on, unless it is there."""
        settings, method = self.engine.settings, self.engine.method
        if hasattr(self.engine, "net"):
            if shape == self.engine.net.shape:
                return
            forget(self.engine.net)
        reseed(settings.seed, WEIGHTS_DRAWN, *([epoch] if epoch > 1 else []))
        net = FastSupernet(shape, len(self.data.classes), *self.data.statistics())
        method.begin(shape)
        net.architecture = method
        net.save_memory(settings.save_memory)
        check_weights(method.weights(), shape, settings.method)
        self.engine.use(net.to(self.engine.device))

    def save(self, run: Run) -> None:
        engine = self.engine
        state = {
            "shape": {
                **{f.name: getattr(engine.net.shape, f.name) for f in fields(Shape)},
                "space": asdict(engine.net.space),
            },
            "net": engine.net.state_dict(),
            "optimizer": engine.optimizer.state_dict(),
            "alpha_optimizer": engine.optimiser.state_dict() if engine.optimiser else None,
            "epoch": self.epoch,
            "strengths": self.strengths,
            "history": self.alphas,
        }
        checkpoint.save(run, state)

    def restore(self, saved: dict[str, Any]) -> None:
        saved = as_today(saved)
        self.epoch = saved["epoch"]
        shape = {"space": asdict(self.engine.settings.space), **saved["shape"]}
        self.build(Shape(**{**shape, "space": SearchSpace(**shape["space"])}), self.epoch)
        self.engine.net.load_state_dict(saved["net"])
        self.engine.optimizer.load_state_dict(saved["optimizer"])
        if self.engine.optimiser:
            self.engine.optimiser.load_state_dict(saved["alpha_optimizer"])
        self.strengths, self.alphas = saved["strengths"], saved["history"]

    def remember(self) -> None:
        method = self.engine.method
        self.strengths.append([s.detach().double().cpu().clone() for s in method.strengths()])
        self.alphas.append([a.detach().cpu().clone() for a in method.alphas()])


def as_today(saved: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as it is written now; of version 0.1.0's the α were the network's, and the bound beside it."""
    if "strengths" in saved:
        return saved
    net = {name.replace("alpha_", "architecture.alpha."): t for name, t in saved["net"].items()}
    net["architecture._extra_state"] = {"bound": saved["bound"]}
    strengths = [[a.double().softmax(-1) for a in point] for point in saved["history"]]
    return {**saved, "net": net, "strengths": strengths, "shape": {}}


def check_weights(weights: Weights, shape: Shape, method: str) -> None:
    """RnasError unless `weights` are such as a supernet of this `shape` takes."""
    cells = shape.space.cells if shape.per_cell else 2
    wanted = shape.space.edges, len(shape.space.operations)
    mix = weights.mix if isinstance(weights, Weights) else ()
    if len(mix) != cells or any(m.shape != wanted for m in mix):
        found = [tuple(m.shape) for m in mix] or type(weights).__name__
        raise RnasError(f"method {method}: weights() returns {found}: expected Weights of {cells} tensors of {wanted}")
    if not all(torch.isfinite(t).all() for t in weights.tensors):
        raise RnasError(f"method {method}: weights() returns NaN or infinite numbers")


@full_precision()
def search(
    settings: Search,
    console: Console | None = None,
    method: type[Method] | None = None,
    announce: Callable[[Dataset], None] = lambda data: None,
) -> Architecture:
    """Search an architecture; writes the run folder `settings.out` and returns what it found.

    The method is the one that the settings name, or `method`; `announce` is called with the images when a new search is
    about to begin. RnasError for bad input, before anything is written, and for a loss that is no longer finite.
    """
    console = console or Console(quiet=True)
    settings, method, of_method = _chosen(settings, method)
    device = choose_device(settings.device)
    data = load_data(settings.source, settings.seed, console, settings.out)
    check_image_size(data.image_size, 8, 4, "the supernet")
    images = _images(settings, data, method, device)
    engine = Engine(method(settings), training_attack(settings.perturbation, data), images, console)
    engine.method.limits = limits_of(settings, len(data.classes), data.image_size)
    state = State(engine, data)
    state.build(engine.method.shape(1), 1)

    facts = {**fingerprint(data), **of_method, "precision": engine.precision.name}
    with Run.open(settings.out, settings, resume=settings.resume, device=hardware(device), facts=facts) as run:
        engine.run = run
        return _search(state, run, console, announce)


def _search(state: State, run: Run, console: Console, announce: Callable[[Dataset], None]) -> Architecture:
    """What is not done yet of `run`."""
    engine, settings = state.engine, state.engine.settings
    saved = checkpoint.load(run)
    if saved is None:
        announce(state.data)
        state.remember()
        engine.method.start(engine)
    else:
        state.restore(saved)
    run.rewind(state.epoch)
    if saved is not None and (run.folder / GENOTYPE).exists():
        console.say(f"the search in {run.folder} is finished: nothing is left to do")
    elif saved is not None:
        console.say(f"search: going on after epoch {state.epoch} of {settings.epochs}")
    with console.stages(lines=False) as show:
        engine.progress = progress = Progress(_passes(engine), state.epoch, show)
        while state.epoch < settings.epochs:
            state.epoch += 1
            state.build(engine.method.shape(state.epoch), state.epoch)
            progress.begin(state.epoch)
            event = _epoch(state)
            state.remember()
            run.log(**event)
            state.save(run)
            line = _line(event, settings.epochs) + engine.method.summary(event)
            console.say(f"{line}, {event['seconds']:.1f} s{progress.left()}")
    engine.progress = None
    if settings.epochs > 0:
        _warn(run, engine.method, console)
        _say_if_at_chance(run.folder, console)
    architecture = engine.method.choose(engine)
    forget(engine.net)
    _save_arrays(run.folder, settings, state)
    write_text(run.folder / GENOTYPE, json.dumps(architecture.to_json()) + "\n")
    return architecture


def _passes(engine: Engine) -> Iterator[float]:
    """Passes of a batch in each epoch, those of its measurements included."""
    settings, attacking = engine.settings, engine.attack.steps
    watching = 2 * settings.monitor / settings.batch_size * (attacking + 2)
    for epoch in range(1, settings.epochs + 1):
        cost = engine.method.cost(settings, epoch, engine.iterations)
        yield cost.attacks * attacking + cost.passes + watching


def _chosen(settings: Search, method: type[Method] | None) -> tuple[Search, type[Method], dict[str, str]]:
    """The settings as the method's own, the method, and what tells a file of someone's own from others."""
    if method is not None:
        return settings, method, {}
    found = load(settings.method)
    if not isinstance(settings, found.settings):  # the settings that all methods share, the others as by default
        settings = found.settings(**{f.name: getattr(settings, f.name) for f in fields(settings)})
    return settings, found.method, {"method_file": found.digest} if found.digest else {}


def _images(settings: Search, data: Dataset, method: type[Method], device: torch.device) -> Halves:
    first, second = halves(data.train, settings.seed)
    train, fewest = (data.train, len(data.train)) if method.data == "all" else (first, min(len(first), len(second)))
    iterations = fewest // settings.batch_size
    if iterations < 1:
        raise RnasError(
            f"{settings.source.data} has {len(second)} images in half of its training set: "
            f"fewer than one batch of {settings.batch_size}; use a smaller --batch-size"
        )
    return Halves(train.to(device), second.to(device), iterations, settings, device)


def _epoch(state: State) -> dict[str, Any]:
    """One epoch of the method, measured. Returns the log's event."""
    started = time.perf_counter()
    engine, method = state.engine, state.engine.method
    lr = method.lr(state.epoch)
    set_lr(engine.optimizer, lr)
    engine.begin(state.epoch)
    fields = method.epoch(engine)
    weights, architecture = engine.weights_seen, engine.architecture_seen
    on_train, on_validation = (engine.measure(m) for m in (engine.monitored_train, engine.monitored))
    for measured in (on_train, on_validation):  # what the last step made of the network, before it is saved
        for what, value in _finite(measured).items():
            check_finite(torch.tensor(value), what, state.epoch, weights.batches)
    known = method.measured(engine, on_validation)
    seconds = time.perf_counter() - started
    return {
        "event": "epoch",
        "epoch": state.epoch,
        "phase": "search",
        "theta_loss": _loss(weights),
        "alpha_loss": _loss(architecture),
        "train": _performance(on_train),
        "val": _performance(on_validation),
        **_chance(engine.monitored, on_validation),
        "F": on_validation.vulnerability,
        **fields,
        **known,
        "none_share": _none_share(method),
        "genotype": method.derive().to_json(),
        "lr": lr,
        "seconds": seconds,
        "images_per_second": engine.steps * engine.settings.batch_size / seconds,
    }


def _loss(running: Running) -> float | None:
    return running.loss if running.batches else None


def _finite(measured: Measured) -> dict[str, float]:
    return {
        "clean": measured.clean_loss,
        "adversarial": measured.adversarial_loss,
        "vulnerability": measured.vulnerability,
    }


def _performance(measured: Measured) -> dict[str, float]:
    return {
        "clean_loss": measured.clean_loss,
        "clean_accuracy": measured.clean_accuracy,
        "adversarial_loss": measured.adversarial_loss,
        "adversarial_accuracy": measured.adversarial_accuracy,
    }


def _none_share(method: Method) -> float | None:
    """Mean strength of `none` over all edges: a large one lowers F without robustness."""
    operations = method.settings.space.operations
    if "none" not in operations:
        return None
    column = operations.index("none")
    return float(torch.stack([s[:, column].mean() for s in method.strengths()]).mean())


def _line(event: dict[str, Any], epochs: int) -> str:
    val = event["val"]
    loss = "" if event["theta_loss"] is None else f"loss {event['theta_loss']:.3f}, "
    return (
        f"search {event['epoch']}/{epochs} {event['phase']}: {loss}validation clean "
        f"{val['clean_accuracy']:.1%}, adversarial {val['adversarial_accuracy']:.1%}, F {event['F']:.2e}"
    )


def _say_if_at_chance(folder: Path, console: Console) -> None:
    event = [e for e in read_log(folder) if e.get("event") == "epoch"][-1]
    if event.get("at_chance"):
        console.say(
            f"warning: the supernet classifies {event['val']['clean_accuracy']:.1%} of the validation images, which is "
            f"not shown to be above chance ({event['chance']:.1%}): its cell says little; search for more --epochs"
        )


def _chance(images: Sequence[Batch], measured: Measured) -> dict[str, float | bool]:
    """The accuracy of always answering the largest class of `images`, and whether the network's is no better."""
    y = torch.cat([y for _, y in images]).cpu().numpy()
    by_chance = chance(y)
    return {"chance": by_chance, "at_chance": not above_chance(measured.clean_accuracy, by_chance, len(y))}


def _warn(run: Run, method: Method, console: Console) -> None:
    """Say and log, once, what the method warns of. RnasError if the log is gone."""
    events = [e for e in read_log(run.folder) if e.get("event") in ("epoch", "warning") and "F" in e]
    if not events:
        raise RnasError(f"{run.folder / LOG} tells of no epoch, but the search is through: choose another --out")
    epochs = [e for e in events if e["event"] == "epoch"]
    warning = method.warning(epochs) if epochs else None
    if warning is not None:
        console.say(f"warning: {warning['message']}")
        if events[-1]["event"] == "epoch":
            run.log(event="warning", **warning)


def _save_arrays(folder: Path, settings: Search, state: State) -> None:
    """strengths.npz: of each kind of cell (epochs + 1, edges, operations), 0 for what is pruned; of a method with
    weights for each cell cell0, cell1, ...; and alphas.npz of a method whose weights are a softmax."""
    operations = np.array(settings.space.operations)
    for name, history in ((STRENGTHS, state.strengths), (ALPHAS, state.alphas)):
        n, found = len(history[0]), state.engine.method.derive()
        of_cells = isinstance(found, CellCodes) and found.depth is not None
        kinds = [f"cell{i}" for i in range(n)] if of_cells else ["normal", "reduce"][:n]
        courses = {k: np.stack([point[i].numpy() for point in history]) for i, k in enumerate(kinds)}
        if courses:
            write_arrays(folder / name, {**courses, "operations": operations})
