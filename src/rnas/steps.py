"""One step of training on adversarial images, and what search and training share around it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.attacks.gradient import ascent_direction
from rnas.attacks.norms import project, steepest
from rnas.console import Console
from rnas.data import Dataset, check_apart, load
from rnas.data.decoding import Size
from rnas.errors import RnasError
from rnas.frozen import Model, frozen
from rnas.graphs import ATTACK, WEIGHTS, Kind, replayed
from rnas.nets.fast_kernels import arranged_for
from rnas.nets.space import Forms, Input, Weights, apart, together
from rnas.objectives import FP32, CrossEntropy, Objective, Trades, divergence
from rnas.precision import Precision
from rnas.runs import SETTINGS, training_of
from rnas.settings import Perturbation, Source


def load_data(source: Source, seed: int, console: Console | None = None, out: Path | None = None) -> Dataset:
    """The images that the settings name; a download and the decoding show on `console` how far they are.

    RnasError if they cannot be read, or if `out`, where the run is to be written, lies among them.
    """
    if out is not None:
        check_apart(source.data, out)
    with (console or Console(quiet=True)).stages() as progress:
        return load(
            source.data,
            root=source.data_root,
            image_size=source.image_size,
            test_fraction=source.test_fraction,
            limit_per_class=source.limit_per_class,
            seed=seed,
            progress=progress,
        )


def load_own_data(folder: Path, meta: dict[str, Any]) -> Dataset:
    """The data set that the network in `folder` was trained on. RnasError if its settings.json names another one: `fit`
    trains on images that were made elsewhere, too."""
    source, seed, _ = training_of(folder)
    data = load_data(source, seed)
    if data.name != meta.get("dataset", data.name):
        raise RnasError(
            f"the network in {folder} was trained on {meta['dataset']}, and its {SETTINGS} names {source.data}: "
            "name the images with --data"
        )
    return data


def load_test_data(
    spec: str, folder: Path, meta: dict[str, Any], root: Path | None = None, image_size: int | None = None
) -> Dataset:
    """The data set `spec` to test the network in `folder` on, in the network's size (or `image_size`); divided, where
    it has no split of its own, as the images that the network was trained on were, for these may be among them."""
    source = training_of(folder).source if (folder / SETTINGS).exists() else Source()
    return load(
        spec,
        root=root or source.data_root,
        image_size=image_size or _size(*meta["image_size"]),
        test_fraction=source.test_fraction,
        to_test=True,
    )


def _size(height: int, width: int) -> Size:
    return height if height == width else (height, width)


def fingerprint(data: Dataset) -> dict[str, Any]:
    """What tells these training images from others under the same name, for the identity of a run."""
    labels = hashlib.sha256(data.train.labels.cpu().numpy().tobytes()).hexdigest()[:16]
    return {"images": {"train": len(data.train), "labels": labels, "statistics": [list(s) for s in data.statistics()]}}


def training_attack(perturbation: Perturbation, data: Dataset) -> PGD:
    """The PGD of search and training: ε from the settings, or else the data set's own."""
    eps = perturbation.eps or data.eps_default
    return PGD(eps=eps, step=perturbation.step or eps / 4, steps=perturbation.attack_steps)


def craft(attack: PGD, net: nn.Module, x: Tensor, y: Tensor, precision: Precision = FP32, *weights: Weights) -> Tensor:
    """Adversarial images against `net` in eval mode; the network is left as it was. `weights` of a supernet's
    operations."""
    tensors, forms = apart(weights)
    work = _Crafting(attack, precision, forms)
    if attack.seed is not None or attack.any_iterate:  # the host draws, or decides
        return work(net, x, y, *tensors)[0]
    return replayed(ATTACK, work, net, (x, y, *tensors))[0]


@dataclass(frozen=True)
class _Crafting:
    """Adversarial images, by `attack`."""

    attack: PGD
    precision: Precision
    forms: Forms

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        with frozen_for(net, x.device, self.precision, *together(tensors, self.forms)) as fixed:
            return (self.attack.perturb(fixed, x, y),)


@contextmanager
def frozen_for(net: nn.Module, device: torch.device, precision: Precision, *given: Input) -> Iterator[Model]:
    """`frozen`, folded for passes on `device` in `precision`, and computing them."""
    with ExitStack() as until_the_end:
        with precision.autocast(device):
            fixed = until_the_end.enter_context(frozen(net, *given))
        yield precision.of(fixed)


def craft_away(attack: PGD, net: nn.Module, x: Tensor, precision: Precision = FP32) -> Tensor:
    """TRADES's adversarial images: PGD that drives the prediction away from the clean one, whatever the label."""

    return replayed(ATTACK, _Driving(attack, precision), net, (x,))[0]


@dataclass(frozen=True)
class _Driving:
    """Adversarial images of TRADES."""

    attack: PGD
    precision: Precision

    def __call__(self, net: nn.Module, x: Tensor) -> tuple[Tensor]:
        attack = self.attack
        with frozen_for(net, x.device, self.precision) as fixed:
            with torch.no_grad():
                clean = fixed(x).log_softmax(1)
            x_adv = (x + 1e-3 * torch.randn_like(x)).clamp_(0, 1)  # KL has no slope at x itself
            for _ in range(attack.steps):
                gradient, _ = ascent_direction(fixed, x_adv, clean, divergence)
                x_adv = project(x_adv + attack.step * steepest(gradient, attack.norm), x, attack.eps, attack.norm)
        return (x_adv,)


def choose_device(name: str) -> torch.device:
    """The device called `auto`, `cpu` or `cuda`. RnasError for `cuda` where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RnasError("device is cuda, but torch finds no GPU: use --device cpu or auto")
    return torch.device(name)


def hardware(device: torch.device) -> str:
    """What a run's environment.json calls it: `cpu`, or for instance `cuda (NVIDIA H200, CUDA 13.0)`."""
    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda})"


def forked(device: torch.device) -> AbstractContextManager[None]:
    """Within, random numbers are nobody else's: torch's generators, that of `device` too, are put back."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def choose_precision(name: str) -> Precision:
    """The precision called `auto`, `fp32` or `bf16`. `auto` is fp32 on every device (docs/decisions/009)."""
    return Precision(bf16=name == "bf16")


def reseed(seed: int, *stream: int) -> None:
    """Seed torch's generators for one part of a run, so that a resumed run draws what an uninterrupted one draws."""
    mixed = seed
    for part in stream:
        mixed = (mixed * 1_000_003 + part + 1) % 2**63
    torch.manual_seed(mixed)


def cosine(start: float, epoch: int, epochs: int, end: float = 0.0) -> float:
    """The learning rate of `epoch` (from 1) on a cosine from `start` to `end`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Running:
    """Mean loss and accuracy of an epoch, summed on the device; a host reads them at the end only."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)  # loss, correct, images
        self.batches = 0

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Count one batch: its mean loss, its logits (B,classes) and labels (B,)."""
        correct = (logits.detach().argmax(1) == y).sum()
        images = torch.full_like(self.sums[0], len(y))
        self.batches += 1
        self.sums += torch.stack([loss.detach() * images, correct.double(), images])

    @property
    def loss(self) -> float:
        return float(self.sums[0] / self.sums[2])

    @property
    def accuracy(self) -> float:
        return float(self.sums[1] / self.sums[2])


def check_finite(loss: Tensor, what: str, epoch: int, step: int) -> None:
    """Stop the run if `loss` is NaN or infinite, naming where, and what is left."""
    if not torch.isfinite(loss):
        last = f"the checkpoint of epoch {epoch - 1} is good" if epoch > 1 else "there is no checkpoint yet"
        raise RnasError(
            f"{what} loss became {float(loss)} in epoch {epoch}, step {step}; {last}. "
            f"A smaller learning rate usually helps (--lr, with another --out)"
        )


def weight_step(
    net: nn.Module,
    thetas: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    attack: PGD | None,
    x: Tensor,
    y: Tensor,
    clip: float,
    trades_beta: float | None = None,
    precision: Precision = FP32,
    weights: Sequence[Weights] = (),
) -> tuple[Tensor, Tensor]:
    """One update of the weights `thetas` on adversarial images, or on clean ones without an `attack`.

    `x` (B,3,H,W) in [0,1], `y` (B,). With `trades_beta`: cross-entropy on clean images plus β times
    KL(clean ‖ adversarial) (Zhang et al. 2019, Eq. 5). `weights`: those of a supernet's operations. Returns the loss
    and the logits (B,classes) it was taken on.
    """
    objective: Objective
    if trades_beta is None or attack is None:
        objective = CrossEntropy(precision)
        inputs = [arranged_for(net, x if attack is None else craft(attack, net, x, y, precision, *weights)), y]
    else:
        objective = Trades(trades_beta, precision)
        inputs = [arranged_for(net, craft_away(attack, net, x, precision)), y, arranged_for(net, x)]
    net.train()
    loss, logits = differentiated(WEIGHTS, objective, net, (*inputs, *weights), thetas)
    nn.utils.clip_grad_norm_(thetas, clip)
    optimizer.step()
    return loss, logits


def differentiated(
    kind: Kind, objective: Objective, net: nn.Module, inputs: Sequence[Input], parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """What `objective(net, *inputs)` returns; `parameters` get its gradients, recorded where that pays: theirs until
    the next step."""
    tensors, forms = apart(inputs)
    work = _Differentiating(objective, forms, parameters)
    if getattr(net, "saving_memory", False):  # a checkpoint reads the generator's state, which no recording may
        loss, told = work(net, *tensors)
    else:
        loss, told = replayed(kind, work, net, tensors, parameters)
    return loss, told


@dataclass(frozen=True)
class _Differentiating:
    """An objective and its gradients for `parameters`."""

    objective: Objective
    forms: Forms
    parameters: Sequence[nn.Parameter] = field(compare=False)  # `replayed` tells them apart

    def __call__(self, net: nn.Module, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        for p in self.parameters:
            p.grad = None
        loss, told = self.objective(net, *together(tensors, self.forms))
        torch.autograd.backward(loss, inputs=list(self.parameters))
        return loss.detach(), told.detach()


@contextmanager
def only(parameters: Sequence[nn.Parameter], net: nn.Module) -> Iterator[None]:
    """Within the context only `parameters` of `net` take part in differentiation: the others cost nothing."""
    wanted = {id(p) for p in parameters}
    frozen = [p for p in net.parameters() if p.requires_grad and id(p) not in wanted]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
