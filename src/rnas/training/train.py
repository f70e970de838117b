"""The training loop of a target network: adversarial (AT) or standard (ST)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.attacks.checks import answer, missing_gradient
from rnas.compute import checkpoint
from rnas.compute.device import choose_device, choose_precision, hardware, own_random_numbers, reseed
from rnas.compute.freezing import unfolded
from rnas.compute.precision import Precision, full_precision
from rnas.console import Console, Stage
from rnas.data import Dataset, Split, batches
from rnas.data.dataset import white
from rnas.data.sources import fingerprint, load_data
from rnas.errors import RnasError
from rnas.fast.recording import forget
from rnas.nets import zoo
from rnas.nets.derived import DerivedNetwork
from rnas.nets.own import check_complete, is_own, name_of
from rnas.nets.saved import build_from_meta, save_model
from rnas.nets.zoo import find_architecture, searched_on
from rnas.records.folder import Run
from rnas.records.schema import Description
from rnas.settings import Train, identity
from rnas.training.adversarial import training_attack
from rnas.training.meters import Running
from rnas.training.schedule import cosine, set_lr
from rnas.training.step import check_finite, weight_step
from rnas.wording import roughly

_WEIGHTS, _LOOP = range(2)  # streams of random numbers


Announce = Callable[[Callable[[Train], nn.Module], Dataset], None]
"""Called with what builds the network, and the images, when a new training is about to begin."""


def train(settings: Train, console: Console | None = None, announce: Announce | None = None) -> nn.Module:
    """Train `settings.arch`; writes the run folder `settings.out` and returns the network, in eval mode.

    RnasError for bad input, before anything is written, and for a loss that is no longer finite.
    """
    data = load_data(settings.source, settings.seed, console, settings.out)
    name, genotype = find_architecture(settings.arch)
    mean, std = data.statistics()
    options: dict[str, Any] = {
        "stem_stride": settings.stem_stride,
        "image_size": data.image_size,
        "mean": mean,
        "std": std,
    }
    searched, trained = searched_on(Path(settings.arch)), identity(settings)["source"]["data"]
    if console is not None and searched not in (None, trained):
        console.say(f"note: {settings.arch} was searched on {searched}, and is now trained on {trained}")

    def build(settings: Train) -> nn.Module:
        sizes = {"cells": settings.cells, "channels": settings.channels}
        if genotype is None:
            return zoo.build(name, len(data.classes), **{**options, **sizes})
        return zoo.build_genotype(genotype, len(data.classes), **{**options, **sizes})

    reseed(settings.seed, _WEIGHTS)
    net = build(settings)
    facts = {"genotype": genotype.to_json()} if genotype else {}
    device = _prepare(net, data, settings)
    meta = Description(
        arch=name,
        genotype=genotype,
        cells=settings.cells,
        channels=settings.channels,
        stem_stride=settings.stem_stride,
        mean=mean,
        std=std,
        **_facts(net, data),
    )
    settings = replace(settings, arch=name)

    def begin() -> None:
        if announce is not None:
            announce(build, data)

    _loop(net, data, settings, device, console, facts, begin, lambda: save_model(settings.out, net, meta))
    return net


def _facts(net: nn.Module, data: Dataset) -> dict[str, Any]:
    """What model.json says of every network."""
    return {
        "classes": tuple(data.classes),
        "image_size": data.image_size,
        "dataset": data.name,
        "parameters": sum(p.numel() for p in net.parameters()),
    }


@dataclass
class State:
    """All that changes while a training runs; exactly what a checkpoint holds."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0

    def save(self, run: Run) -> None:
        state = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": self.epoch}
        checkpoint.save(run, state)

    def restore(self, saved: dict[str, Any]) -> None:
        """RnasError if `saved` is of another network."""
        try:
            self.net.load_state_dict(saved["net"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as e:  # other layers; other ones that are trained
            raise RnasError(f"the checkpoint is of another network: {' '.join(str(e).split())[:200]}") from e
        self.epoch = saved["epoch"]


def fit(
    net: nn.Module,
    data: Dataset,
    settings: Train,
    console: Console | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Train any module (images in [0,1] to logits), in place, with log and checkpoints in `settings.out`. Parameters
    that take no gradient stay as they are.

    `facts`, JSON values, are what else makes the run what it is: a resumed run must bring the same.

    Ends with the network in eval mode and, as `train` does, with model.json and the weights, for `rnas.load` and the
    command line, if the network can be built anew: `settings.arch` is its name in the zoo, or names a function that
    returns such a network, `package.module:function`; or its class, in a module that can be imported, needs no
    arguments. Otherwise there is a note instead (decision 018).
    RnasError for bad input, before anything is written.
    """
    console = console or Console(quiet=True)
    device = _prepare(net, data, settings)
    meta = _description(net, data, settings)

    def finish() -> None:
        if meta is not None:
            save_model(settings.out, net, meta)
            return
        console.say(
            f"note: {settings.out} gets no model.json, for nothing says how to build the network: "
            "give package.module:function as its arch"
        )

    _loop(net, data, settings, device, console, facts, lambda: None, finish)


def _description(net: nn.Module, data: Dataset, settings: Train) -> Description | None:
    """model.json of `net`; None if nothing is known that builds it anew. RnasError if what `settings` name does not."""
    named = is_own(settings.arch)
    mean, std = data.statistics()
    options = {"cells": settings.cells, "channels": settings.channels, "stem_stride": settings.stem_stride}
    of_the_zoo = {"arch": settings.arch, **options, "mean": mean, "std": std}
    candidates: list[dict[str, Any]] = [{"arch": settings.arch}] if named else [of_the_zoo, {"arch": name_of(net)}]
    for how in candidates:
        meta = Description(**how, **_facts(net, data))
        try:
            _check_equal(build_from_meta(meta, "arch"), net, data.train)
        except RnasError:
            if named:
                raise
        else:
            return meta
    return None


def _check_equal(twin: nn.Module, net: nn.Module, images: Split) -> None:
    """RnasError unless `twin`, with the weights of `net`, gives its answers: with other strides, for instance, it would
    have the same weights."""
    parameter = next(net.parameters())
    x = images.images[:2].to(parameter.device)
    not_equal = "what arch names does not build the network that is to be trained"
    state = net.state_dict()
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise RnasError("the network's state_dict holds more than tensors, which are all that is saved")
    try:
        twin.load_state_dict(state)
        with own_random_numbers(x.device), torch.no_grad():
            ours, others = (_drawing_the_same(each, x / white(x.device)) for each in (net, twin.to(x.device)))
    except Exception as e:  # foreign modules raise anything
        raise RnasError(f"{not_equal}: {' '.join(str(e).split())[:200]}") from e
    if not torch.allclose(ours, others, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise RnasError(f"{not_equal}: with the same weights it gives other answers")


def _drawing_the_same(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    with unfolded(net) as plain:
        return plain(x)


def _prepare(net: nn.Module, data: Dataset, settings: Train) -> torch.device:
    """Move `net` to where it will be trained. RnasError if it cannot be trained so."""
    device = choose_device(settings.device)
    if len(data.train) < settings.batch_size:
        raise RnasError(
            f"{data.name} has {len(data.train)} training images: fewer than one batch of "
            f"{settings.batch_size}; use a smaller --batch-size"
        )
    if isinstance(net, DerivedNetwork):
        net.save_memory(settings.save_memory)
    elif settings.save_memory:
        raise RnasError(f"save-memory is for cell networks, and {settings.arch} is none: use a smaller --batch-size")
    check_complete(net)
    _check_network(net.to(device), data, device, settings)
    return device


@full_precision()
def _loop(
    net: nn.Module,
    data: Dataset,
    settings: Train,
    device: torch.device,
    console: Console | None,
    facts: dict[str, Any] | None,
    begin: Callable[[], None],
    finish: Callable[[], None],
) -> None:
    """Train `net`, which lies on `device`, and leave it in eval mode. `begin` is called before the first epoch,
    `finish` at the end, both while no other process may write to the folder."""
    console = console or Console(quiet=True)
    images = data.train.to(device)
    attack = None if settings.standard else training_attack(settings.perturbation, data)
    optimizer = torch.optim.SGD(_trained(net), settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    state = State(net, optimizer)
    precision = choose_precision(settings.precision)
    facts = {**fingerprint(data), "precision": precision.name, **(facts or {})}
    with Run.open(settings.out, settings, resume=settings.resume, device=hardware(device), facts=facts) as run:
        saved = checkpoint.load(run)
        if saved is None:
            begin()
        else:
            state.restore(saved)
        run.rewind(state.epoch)
        if state.epoch == settings.epochs:
            console.say(f"the training in {run.folder} is finished: nothing is left to do")
        elif saved is not None:
            console.say(f"train: going on after epoch {state.epoch} of {settings.epochs}")
        started, first = time.perf_counter(), state.epoch
        with console.stages(lines=False) as show:
            while state.epoch < settings.epochs:
                state.epoch += 1
                event = _epoch(state, images, settings, attack, device, precision, show)
                run.log(**event)
                state.save(run)
                each = (time.perf_counter() - started) / (state.epoch - first)
                left = settings.epochs - state.epoch
                console.say(_line(event, settings.epochs) + (f"; {roughly(each * left)} left" if left else ""))
        forget(net)
        net.eval()
        finish()


def _trained(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes: not those that someone froze."""
    return [p for p in net.parameters() if p.requires_grad]


@full_precision()
def _check_network(net: nn.Module, data: Dataset, device: torch.device, settings: Train) -> None:
    """RnasError unless `net` can be trained: it has parameters, and answers in either mode with float32 logits, from
    which gradients lead back."""
    if not _trained(net):
        raise RnasError("the network has no parameters to train")
    x, classes = data.train.images[:2].to(device) / white(device), len(data.classes)
    with unfolded(net) as plain:
        _check_logits(answer(plain, x), len(x), classes)
        missing = None if settings.standard else missing_gradient(plain, x)
    if missing:
        raise RnasError(f"adversarial training needs gradients of images, but {missing}")
    few = x[: settings.batch_size]
    with _undone(net, device), torch.enable_grad():
        logits = _answer_in_train_mode(net, few)
    _check_logits(logits, len(few), classes)
    if not logits.requires_grad:
        raise RnasError("the network's answer in train mode does not depend on a parameter that is trained")


def _check_logits(logits: object, n: int, classes: int) -> None:
    expected = f"expected float32 logits {[n, classes]} alone, one for each class"
    if not isinstance(logits, Tensor):
        raise RnasError(f"the network answers {n} images with a {type(logits).__name__}: {expected}")
    if logits.shape != (n, classes) or logits.dtype != torch.float32:
        found = f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
        raise RnasError(f"the network answers {n} images with {found}: {expected}")


def _answer_in_train_mode(net: nn.Module, x: Tensor) -> Tensor:
    try:
        return net.train()(x)  # type: ignore[no-any-return]
    except torch.OutOfMemoryError:
        raise  # says itself what to do
    except Exception as e:  # foreign modules raise anything
        several = "; batch normalisation needs more than one value of a channel: use a larger --batch-size"
        raise RnasError(
            f"the network fails in train mode on a batch of {len(x)} ({' '.join(str(e).split())[:200]})"
            f"{several if len(x) == 1 else ''}"
        ) from e


@contextmanager
def _undone(net: nn.Module, device: torch.device) -> Iterator[None]:
    """What happens within to the modes and buffers of `net`, and to torch's random numbers, is undone."""
    modes = [(module, module.training) for module in net.modules()]
    buffers = [(m, name, b, b.clone()) for m in net.modules() for name, b in m._buffers.items() if b is not None]
    try:
        with own_random_numbers(device):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer.copy_(before)


def _epoch(
    state: State,
    images: Split,
    settings: Train,
    attack: PGD | None,
    device: torch.device,
    precision: Precision,
    show: Stage,
) -> dict[str, Any]:
    """One pass over the training images. Returns the log's event."""
    started = time.perf_counter()
    net, epoch = state.net, state.epoch
    lr = cosine(settings.lr, epoch, settings.epochs)
    set_lr(state.optimizer, lr)
    reseed(settings.seed, _LOOP, epoch)
    drop_path = 0.0
    if isinstance(net, DerivedNetwork):
        drop_path = settings.drop_path * (epoch - 1) / settings.epochs
        net.set_drop_path(drop_path)
    beta = settings.trades_beta if settings.loss == "trades" and attack else None
    parameters = _trained(net)
    running = Running(device)
    steps = len(images) // settings.batch_size
    drawn = batches(
        images,
        settings.batch_size,
        seed=settings.seed,
        epoch=epoch,
        augment=settings.augment,
        device=device,
        drop_last=True,
    )
    for step, (x, y) in enumerate(drawn, 1):
        loss, logits = weight_step(net, parameters, state.optimizer, attack, x, y, settings.clip, beta, precision)
        check_finite(loss, "training", epoch, step)
        running.add(loss, logits, y)
        what = f"train: epoch {epoch} of {settings.epochs}, step {step} of {steps}"
        show(what, (epoch - 1) * steps + step, settings.epochs * steps)
    with torch.no_grad():  # what the last step made of the network, before it is saved
        check_finite(F.cross_entropy(net.eval()(x), y), "final", epoch, steps)
    seconds = time.perf_counter() - started
    accuracies = {"clean_accuracy": None, "adversarial_accuracy": None}
    return {
        "event": "epoch",
        "epoch": epoch,
        "loss": running.loss,
        "train": {**accuracies, "adversarial_accuracy" if attack else "clean_accuracy": running.accuracy},
        "lr": lr,
        "drop_path": drop_path,
        "seconds": seconds,
        "images_per_second": steps * settings.batch_size / seconds,
    }


def _line(event: dict[str, Any], epochs: int) -> str:
    kind, accuracy = next((k, v) for k, v in event["train"].items() if v is not None)
    return (
        f"train {event['epoch']}/{epochs}: loss {event['loss']:.3f}, {kind.split('_')[0]} accuracy {accuracy:.1%} "
        f"on training images, {event['images_per_second']:.0f} images/s"
    )
