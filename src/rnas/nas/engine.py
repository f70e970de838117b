"""What a search method may ask for: images, attacks, gradients, steps, measurements.

    train(n), validation, monitored      batches: a pass of the first half, the second half without end, fixed images
    held_out, some(split, n)             images as they are: the whole second half, a few of either
    logits(x, w), features(x, w)         passes in the network's mode
    adversarial(x, y, w)                 the images of the search's attack
    slope(objective, inputs, parameters) a loss and its gradients, recorded on a GPU where that pays
    descend(slope, parameters, optimiser, clip)         a step with them
    descend_weights(x, y, w)             both, for the network's weights and cross-entropy
    input_gradient(loss, x, y)           of each image's loss
    input_term(loss, terms, y, parameters)              the gradient of an input gradient's norm, by first-order passes
    shifted(parameters, direction, t)    within: the parameters moved; put back bit for bit
    calibrated(images, w)                within: BN's running statistics those of `w`; put back
    finetuned(epochs, w)                 within: the weights trained on as those of `w`; put back bit for bit
    measure(batches, w)                  losses, accuracies, F
    candidates(n, sample, rounds)        a phase at the end, candidate by candidate, that can be resumed
    saw_weights, saw_architecture        what the log tells of losses

`w` is the weights of operations, a method's `weights()` where it is left out. The network is in train mode outside of
measurements and attacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.compute.device import choose_precision, mixed, reseed
from rnas.compute.layout import arranged_for
from rnas.compute.memory import buffers_kept
from rnas.compute.precision import FP32
from rnas.console import Console
from rnas.data import Split, batches
from rnas.data.dataset import stratified
from rnas.fast.recording import ALPHAS, WEIGHTS, Kind
from rnas.genotype import Architecture
from rnas.nas.methods.base import Fields, Method
from rnas.nas.objectives import ImageLoss, Weighted
from rnas.nas.progress import Progress
from rnas.nets.space import Input, Weights
from rnas.nets.supernet import Supernet
from rnas.records.folder import Run, read_log
from rnas.settings import Search
from rnas.training.adversarial import craft
from rnas.training.meters import Running
from rnas.training.objectives import CrossEntropy, Objective
from rnas.training.schedule import cosine, set_lr
from rnas.training.step import check_finite, differentiated, differentiating_only

Batch = tuple[Tensor, Tensor]  # x (B,3,H,W) in [0,1], y (B,)
TRAIN, VALIDATION, WEIGHTS_DRAWN, LOOP, PROJECTION, NOISE, CANDIDATES = range(7)  # streams of random numbers


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
    aux: Tensor
    """What the objective returns beside its loss: logits (B,classes), or a number."""
    grads: tuple[Tensor, ...]
    """As the parameters; theirs until the next slope."""

    def plus(self, factor: float, term: Slope) -> Slope:
        """That of the loss and `factor` times a term's."""
        grads = tuple(g + factor * more for g, more in zip(self.grads, term.grads, strict=True))
        return Slope(self.loss + factor * term.loss, self.aux, grads)


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

    def some(self, split: Split, n: int) -> list[Batch]:
        """`n` images of a half, or as many as it has, of every class its share, as they are."""
        chosen = stratified(split.labels, min(n, len(split)), self.settings.seed)
        images = split[chosen.nonzero()[:, 0].to(split.labels.device)]
        return list(batches(images, self.settings.batch_size, device=self.device))


class Round(NamedTuple):
    """One way to score candidates."""

    name: str
    """In the log."""
    score: Callable[[Architecture], tuple[float, Fields]]
    """Higher is better; and what the log shall tell besides."""
    keep: int
    """How many of the best go on to the next round."""


def of_candidate(seed: int, number: int) -> torch.Generator:
    """What a candidate is drawn from: its number decides."""
    return torch.Generator().manual_seed(mixed(seed, CANDIDATES, number))


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
        self.epoch = self.steps = 0
        self.run: Run | None = None
        """Where the search is written, once it is open."""
        self.progress: Progress | None = None
        self.doing = ""
        """What the passes are made for now, for whoever watches."""

    def use(self, net: Supernet) -> None:
        """Work on `net` from now on, with new optimisers."""
        self.net = net
        self.optimizer = self._sgd()
        self.optimiser = self.method.optimiser()

    def _sgd(self) -> torch.optim.Optimizer:
        s = self.settings
        return torch.optim.SGD(self.net.thetas, s.lr, s.momentum, weight_decay=s.weight_decay)

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
        """The first `n` of an epoch's training batches, by default all."""
        n = self.iterations if n is None else n
        for step, batch in enumerate(self._drawn(self.epoch, n), 1):
            self.doing = f"step {step} of {n}"
            yield batch

    def _drawn(self, epoch: int, n: int) -> Iterator[Batch]:
        return islice(self.images.batches(self.images.train, TRAIN, epoch), n)

    @property
    def monitored(self) -> list[Batch]:
        """The images of the second half that measurements are made on."""
        return self.some(self.images.validation, self.settings.monitor)

    @property
    def monitored_train(self) -> list[Batch]:
        """Those of the images to train on."""
        return self.some(self.images.train, self.settings.monitor)

    def some(self, split: Split, n: int) -> list[Batch]:
        """`n` images of a half (`images.train`, `images.validation`), of every class its share, as they are."""
        return self.images.some(split, n)

    @property
    def held_out(self) -> Iterator[Batch]:
        """The whole second half, as it is."""
        return batches(self.images.validation, self.settings.batch_size, device=self.device)

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
        x_adv = craft(self.attack, self.net, x, y, self.precision, self._weights(w).detach())
        self.moved(self.attack.steps)
        return x_adv

    def moved(self, passes: float) -> None:
        """Let whoever watches know of so many passes of a batch."""
        if self.progress is not None:
            self.progress.moved(self.doing, passes)

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
        self.moved(1)
        with differentiating_only(parameters, self.net):
            loss, aux = differentiated(kind, objective, self.net, inputs, parameters)
        self.net.train()
        grads = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        return Slope(loss, aux, grads)

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
        running.add(slope.loss, slope.aux, y)
        check_finite(slope.loss, what, self.epoch, running.batches)

    def input_term(
        self,
        loss: ImageLoss,
        terms: Sequence[tuple[float, Tensor]],
        y: Tensor,
        parameters: Iterable[nn.Parameter],
        noise: Sequence[Tensor] = (),
        *,
        norm: Literal["l1", "l2"] = "l2",
        squared: bool = False,
        scale: float | Tensor = 1.0,
        eps: float = 0.1,
        train: bool = False,
    ) -> Slope:
        """R = mean_b ‖d_b‖ for d_b = scale · Σ_i s_i ∇_x ℓ_b(x_i), and its gradients for `parameters`: by first-order
        passes. With the network's `normalize.std` (3,1,1) as `scale` the gradients are those of normalised images.

        `terms`: (s_i, x_i (B,3,H,W)): of RACL and DSRNA one, of AdvRush two (+1 shifted, -1 as it is). With v_b the
        slope of the norm at d_b, times scale, held fixed,
            ∇R = ∇ mean_b Σ_i s_i (ℓ_b(x_i + εv_b) - ℓ_b(x_i - εv_b)) / 2ε
        as ε becomes small, up to kinks (docs/decisions/022, 024). `eps` is a length in pixel values, or in what `scale`
        makes of them (l2: of the image's whole shift, l1: of each pixel's). BN's running statistics stay as they are.
        Tells R.
        """
        parameters = list(parameters)
        d = scale * sum(s * self.input_gradient(loss, x, y, noise, train) for s, x in terms)
        assert isinstance(d, Tensor), "there are terms"
        size = d.flatten(1).norm(p=1 if norm == "l1" else 2, dim=1)
        v = scale * (d.sign() if norm == "l1" else d / size.clamp_min(1e-30).view(-1, 1, 1, 1))
        of_each = (2 * size if squared else torch.ones_like(size)) / (2 * eps * len(y))
        passes = [(t * s * of_each, x + t * eps * v) for s, x in terms for t in (1, -1)]
        if not train:  # images do not know of each other: one pass for all
            passes = [(torch.cat([c for c, _ in passes]), torch.cat([x for _, x in passes]))]
        grads = [torch.zeros_like(p) for p in parameters]
        with buffers_kept(self.net):
            for c, x in passes:
                inputs = x, y.repeat(len(x) // len(y)), c, *noise
                self.moved(len(x) // len(y) - 1)  # the slope is one more
                slope = self.slope(Weighted(loss), inputs, parameters, train=train)
                grads = [g + more for g, more in zip(grads, slope.grads, strict=True)]
        value = (size.square() if squared else size).mean()
        return Slope(value, value, tuple(grads))

    def input_gradient(
        self, loss: ImageLoss, x: Tensor, y: Tensor, noise: Sequence[Tensor] = (), train: bool = False
    ) -> Tensor:
        """(B,3,H,W), of the sum of the images' losses."""
        self.moved(1)
        x = x.detach().requires_grad_()
        self.net.train(train)
        with differentiating_only((), self.net), buffers_kept(self.net):
            (gradient,) = torch.autograd.grad(loss(self.net, x, y, *noise).sum(), x)
        self.net.train()
        return gradient

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

    @contextmanager
    def calibrated(self, images: Iterable[Tensor], w: Weights | None = None) -> Iterator[None]:
        """Within, BN's running statistics are the means over batches of `images` (B,3,H,W) with the weights `w`: those
        of a sub-network. Then they are put back."""
        w = self._weights(w).detach()
        bns = [m for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [bn.momentum for bn in bns]
        with buffers_kept(self.net):
            try:
                for k, x in enumerate(images, 1):
                    for bn in bns:
                        bn.momentum = 1 / k
                    with torch.no_grad():
                        self.net.train()(x, w)
            finally:
                for bn, momentum in zip(bns, momenta, strict=True):
                    bn.momentum = momentum
            yield

    @contextmanager
    def finetuned(self, epochs: int, w: Weights | None = None) -> Iterator[None]:
        """Within, the network's weights have been trained for some epochs more, on adversarial images, as those of the
        sub-network `w`; then they, BN's statistics and the optimiser are put back bit for bit.

        The learning rate falls as in the last third of the search. The attack needs running statistics that fit `w`:
        `calibrated` first.
        """
        s, searching, thetas = self.settings, self.optimizer, self.net.thetas
        kept = [p.detach().clone() for p in thetas]
        self.optimizer = self._sgd()
        drawn = chain.from_iterable(self._drawn(self.epoch + e, self.iterations) for e in range(epochs))
        try:
            with buffers_kept(self.net):
                for step, (x, y) in enumerate(drawn):
                    done = (2 + step / (epochs * self.iterations)) / 3
                    set_lr(self.optimizer, cosine(s.lr, 1 + done, 1, s.lr_min))
                    self.descend_weights(self.adversarial(x, y, w), y, w)
                yield
        finally:
            self.optimizer = searching
            with torch.no_grad():
                torch._foreach_copy_(list(thetas), kept)

    # --- measurements

    def measure(self, images: Iterable[Batch], w: Weights | None = None) -> Measured:
        """Losses, accuracies and F over `images`: the same for the same network, which is left as it was.

        In float32 whatever the search's precision: F ≤ H is a promise, and bfloat16 is too coarse to make it.
        """
        attack = replace(self.attack, seed=self.settings.seed)
        w = self._weights(w).detach()
        self.doing = "measuring"
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
            self.moved((attack.steps + 2) * len(y) / self.settings.batch_size)
        return Measured(clean.loss, clean.accuracy, adversarial.loss, adversarial.accuracy, float(total) / count)

    # --- candidates

    def candidates(
        self, n: int, sample: Callable[[torch.Generator], Architecture], rounds: Sequence[Round]
    ) -> list[Architecture]:
        """The best of `n` candidates after the last of the rounds, the best first.

        Its number decides what is drawn for a candidate, and that and the round what is drawn when it is scored; each
        score has its line in the log. So a search that is resumed goes on after the last one, to the same end.
        """
        self.begin(self.settings.epochs + 1)
        drawn = {number: sample(of_candidate(self.settings.seed, number)) for number in range(n)}
        logged = [] if self.run is None else read_log(self.run.folder)
        scores = {(e["round"], e["number"]): e["score"] for e in logged if e.get("event") == "candidate"}
        left = list(drawn)
        for index, (name, score, keep) in enumerate(rounds):
            with self.console.bar(f"candidates ({name})", len(left)) as advance:
                for number in left:
                    if (name, number) not in scores:
                        reseed(self.settings.seed, CANDIDATES, number, index)
                        scores[name, number], fields = score(drawn[number])
                        if self.run is not None:
                            about = {"number": number, "candidate": drawn[number].to_json()}
                            self.run.log(event="candidate", round=name, score=scores[name, number], **fields, **about)
                    advance(1)
            best = max(scores[name, number] for number in left)
            self.console.say(f"candidates ({name}): {len(left)} scored, the best {best:.4g}")
            left = sorted(left, key=lambda number: -scores[name, number])[:keep]
        return [drawn[number] for number in left]
