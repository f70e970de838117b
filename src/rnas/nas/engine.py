"""What a search method may ask for: images, attacks, gradients, steps, measurements.

    train(n), validation, monitored      batches: a pass of the first half, the second half without end, fixed images
    logits(x, w), features(x, w)         passes in the network's mode
    adversarial(x, y, w)                 the images of the search's attack
    slope(objective, inputs, parameters) a loss and its gradients, recorded on a GPU where that pays
    descend(slope, parameters, optimiser, clip)         a step with them
    descend_weights(x, y, w)             both, for the network's weights and cross-entropy
    input_term(terms, parameters)        the gradient of an input gradient's norm, by first-order passes
    shifted(parameters, direction, t)    within: the parameters moved; put back bit for bit
    calibrated(images, w)                within: BN's running statistics those of `w`; put back
    measure(batches, w)                  losses, accuracies, F
    candidates(sample, filter, score, n) a phase without gradients that can be resumed
    saw_weights, saw_architecture        what the log tells of losses

`w` is the weights of operations, a method's `weights()` where it is left out. The network is in train mode outside of
measurements and attacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.console import Console
from rnas.data import Split, batches
from rnas.data.dataset import stratified
from rnas.graphs import ALPHAS, WEIGHTS, Kind
from rnas.nas.methods.base import Method
from rnas.nets.fast_kernels import arranged_for
from rnas.nets.recompute import buffers_kept
from rnas.nets.space import Input, Weights
from rnas.nets.supernet import Supernet
from rnas.objectives import FP32, CrossEntropy, Objective
from rnas.settings import Search
from rnas.steps import Running, check_finite, choose_precision, craft, differentiated, only, reseed

Batch = tuple[Tensor, Tensor]  # x (B,3,H,W) in [0,1], y (B,)
TRAIN, VALIDATION, WEIGHTS_DRAWN, LOOP, PROJECTION, NOISE = range(6)  # streams of random numbers


@dataclass(frozen=True)
class Measured:
    """One half of the data as the supernet sees it: losses and accuracies in eval mode, F on batch statistics."""

    clean_loss: float
    clean_accuracy: float
    adversarial_loss: float
    adversarial_accuracy: float
    vulnerability: float


class Slope(NamedTuple):
    """What a step goes by."""

    loss: Tensor
    told: Tensor
    """What the objective tells besides: logits (B,classes), or a number."""
    grads: tuple[Tensor, ...]
    """As the parameters; theirs until the next slope."""


@dataclass(frozen=True)
class Halves:
    """The images of a search, on its device."""

    train: Split
    validation: Split
    iterations: int
    """T: batches of an epoch."""
    settings: Search
    device: torch.device

    def batches(self, split: Split, stream: int, epoch: int) -> Iterator[Batch]:
        """The shuffled, augmented batches of one epoch."""
        seed, size = self.settings.seed * 2 + stream, self.settings.batch_size
        return batches(split, size, seed=seed, epoch=epoch, augment=True, device=self.device, drop_last=True)

    def validation_forever(self, epoch: int) -> Iterator[Batch]:
        """The validation batches of one epoch, over and over: a method may need more than one pass."""
        while True:
            yield from self.batches(self.validation, VALIDATION, epoch)

    def monitored(self, split: Split) -> list[Batch]:
        """`monitor` images of a half, of every class its share, as they are."""
        chosen = stratified(split.labels, min(self.settings.monitor, len(split)), self.settings.seed)
        images = split[chosen.nonzero()[:, 0].to(split.labels.device)]
        return list(batches(images, self.settings.batch_size, device=self.device))


class Engine:
    """The services of one search; `net` and the optimisers change where a method changes its supernet's shape."""

    net: Supernet
    optimizer: torch.optim.Optimizer
    """Of the network's weights."""
    optimiser: torch.optim.Optimizer | None
    """Of the method's parameters, as the method made it."""
    validation: Iterator[Batch]
    """The second half, shuffled and augmented, without end; anew in every epoch."""

    def __init__(self, method: Method, attack: PGD, images: Halves, console: Console | None = None):
        self.method, self.attack, self.images = method, attack, images
        self.settings = images.settings
        self.console = console or Console(quiet=True)
        self.precision = choose_precision(self.settings.precision)
        self.generator = torch.Generator()
        """For a method's noise: on the CPU, seeded for every epoch."""
        self.epoch = 0

    def use(self, net: Supernet) -> None:
        """Work on `net` from now on, with new optimisers."""
        s = self.settings
        self.net = net
        self.optimizer = torch.optim.SGD(net.thetas, s.lr, s.momentum, weight_decay=s.weight_decay)
        self.optimiser = self.method.optimiser()

    def begin(self, epoch: int) -> None:
        """Begin an epoch (from 1): random numbers, meters, batches."""
        self.epoch = epoch
        self.reseed(LOOP)
        self.generator.manual_seed((self.settings.seed * 1_000_003 + epoch) * 8 + NOISE)
        self.validation = self.images.validation_forever(epoch)
        self.weights_seen, self.architecture_seen = Running(self.device), Running(self.device)
        self.steps = 0  # batches differentiated, for the images of a second

    # --- images

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def iterations(self) -> int:
        """T: batches of the images to train on."""
        return self.images.iterations

    def train(self, n: int | None = None) -> Iterator[Batch]:
        """The first `n` of an epoch's training batches, by default all; with a progress bar."""
        n = self.iterations if n is None else n
        drawn = self.images.batches(self.images.train, TRAIN, self.epoch)
        with self.console.bar(f"search, epoch {self.epoch} of {self.settings.epochs}", n) as advance:
            for _ in range(n):
                yield next(drawn)
                advance(1)

    @property
    def monitored(self) -> list[Batch]:
        """The images of the second half that measurements are made on."""
        return self.images.monitored(self.images.validation)

    @property
    def monitored_train(self) -> list[Batch]:
        """Those of the images to train on."""
        return self.images.monitored(self.images.train)

    def reseed(self, stream: int) -> None:
        """Seed torch's generators for a part of this epoch."""
        reseed(self.settings.seed, stream, self.epoch)

    # --- passes, gradients, steps

    def logits(self, x: Tensor, w: Weights | None = None) -> Tensor:
        """(B,classes)"""
        return self.precision.of(self.net)(x, self._weights(w))

    def features(self, x: Tensor, w: Weights | None = None) -> list[Tensor]:
        """The output of every cell, each (B,C_i,H_i,W_i)."""
        with self.precision.autocast(x.device):
            return self.net.forward_cells(x, self._weights(w))[1]

    def _weights(self, w: Weights | None) -> Weights:
        return self.method.weights() if w is None else w

    def adversarial(self, x: Tensor, y: Tensor, w: Weights | None = None) -> Tensor:
        """Adversarial images against the network in eval mode; a sampled one is attacked as it is then trained."""
        return craft(self.attack, self.net, x, y, self.precision, self._weights(w).detach())

    def slope(
        self,
        objective: Objective,
        inputs: Sequence[Input],
        parameters: Iterable[nn.Parameter],
        kind: Kind = ALPHAS,
        train: bool = True,
    ) -> Slope:
        """`objective` of the network and `inputs`, and its gradients for `parameters`; zeros for one it does not
        depend on. In train mode, or else in eval mode. `kind` says how much memory may be recorded."""
        parameters = list(parameters)
        self.net.train(train)
        self.steps += 1
        with only(parameters, self.net):
            loss, told = differentiated(kind, objective, self.net, inputs, parameters)
        self.net.train()
        grads = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        return Slope(loss, told, grads)

    def descend(
        self,
        slope: Slope,
        parameters: Iterable[nn.Parameter],
        optimiser: torch.optim.Optimizer | None,
        clip: float | None = None,
    ) -> None:
        """One step of `optimiser` with the gradients of `slope`, cut to the norm `clip`."""
        assert optimiser is not None, "the method has no optimiser"
        parameters = list(parameters)
        for p, grad in zip(parameters, slope.grads, strict=True):
            p.grad = grad
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()

    def descend_weights(self, x: Tensor, y: Tensor, w: Weights | None = None) -> Slope:
        """One step of the network's weights down the cross-entropy of images as they are."""
        thetas = self.net.thetas
        inputs = arranged_for(self.net, x), y, self._weights(w).detach()
        slope = self.slope(CrossEntropy(self.precision), inputs, thetas, WEIGHTS)
        self.descend(slope, thetas, self.optimizer, self.settings.clip)
        self.saw_weights(slope, y)
        return slope

    def saw_weights(self, slope: Slope, y: Tensor) -> None:
        """Let the log know of a step of the weights, whose slope tells logits. RnasError if the loss is not finite."""
        self._saw(self.weights_seen, "training", slope, y)

    def saw_architecture(self, slope: Slope, y: Tensor) -> None:
        """The same of a step of the method's parameters."""
        self._saw(self.architecture_seen, "architecture", slope, y)

    def _saw(self, running: Running, what: str, slope: Slope, y: Tensor) -> None:
        running.add(slope.loss, slope.told, y)
        check_finite(slope.loss, what, self.epoch, running.batches)

    @contextmanager
    def shifted(self, parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], t: float) -> Iterator[None]:
        """Within, each parameter is `t` times its direction from where it is; then it is put back bit for bit, and so
        are the buffers of the network, BN's running statistics among them."""
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_add_(list(parameters), list(direction), alpha=t)
        try:
            with buffers_kept(self.net):
                yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(parameters), kept)

    # --- measurements

    def measure(self, images: Iterable[Batch], w: Weights | None = None) -> Measured:
        """Losses, accuracies and F over `images`: the same for the same network, which is left as it was.

        In float32 whatever the search's precision: F ≤ H is a promise, and bfloat16 is too coarse to make it.
        """
        attack = replace(self.attack, seed=self.settings.seed)
        w = self._weights(w).detach()
        vulnerability = self.method.vulnerability()
        clean, adversarial = Running(self.device), Running(self.device)
        total, count = torch.zeros((), device=self.device), 0
        for x, y in images:
            x_adv = craft(attack, self.net, x, y, FP32, w)
            with torch.no_grad(), buffers_kept(self.net):
                self.net.eval()
                for running, seen in ((clean, x), (adversarial, x_adv)):
                    logits = self.net(seen, w)
                    running.add(F.cross_entropy(logits, y), logits, y)
                self.net.train()
                total += vulnerability(self.net, x, x_adv, w)[0] * len(y)
            count += len(y)
        return Measured(clean.loss, clean.accuracy, adversarial.loss, adversarial.accuracy, float(total) / count)
