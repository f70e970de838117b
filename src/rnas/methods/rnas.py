"""RNAS (Qian et al., ECCV 2022): what Phase II does with α, on a supernet whose weights are fixed meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rnas.attacks import PGD
from rnas.graphs import ALPHAS, PROJECTION, replayed
from rnas.methods.projection import ROUND, Projection, gradients, project
from rnas.nets.recompute import buffers_kept
from rnas.nets.supernet import Supernet
from rnas.precision import Precision
from rnas.settings import Search
from rnas.steps import FP32, Running, choose_precision, craft, differentiated, only
from rnas.vulnerability import network_vulnerability

Batch = tuple[Tensor, Tensor]  # x (B,3,H,W) in [0,1], y (B,)

# The projection aims this share under H: F is sampled, and the promise is F ≤ H on the monitored images.
MARGIN = 0.1


@dataclass(frozen=True)
class Measured:
    """One half of the data as the supernet sees it: losses and accuracies in eval mode, F on batch statistics."""

    clean_loss: float
    clean_accuracy: float
    adversarial_loss: float
    adversarial_accuracy: float
    vulnerability: float


class Rnas:
    """The two moves of Phase II: descend on the validation loss, project on F ≤ H."""

    def __init__(self, net: Supernet, attack: PGD, settings: Search):
        self.net = net
        self.attack = attack
        self.settings = settings
        self.precision = choose_precision(settings.precision)
        self.optimizer = torch.optim.Adam(
            net.alphas, lr=settings.alpha_lr, betas=(0.5, 0.999), weight_decay=settings.alpha_weight_decay
        )

    def arch_step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One Adam step of α on L_val + L_val^adv (Eq. 8), or on L_val^adv alone, first order.

        Returns the loss and the adversarial logits.
        """
        x_adv = craft(self.attack, self.net, x, y, self.precision)
        self.net.train()
        forward = self.precision.of(self.net)

        def loss_of(x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = forward(x_adv)
            loss = F.cross_entropy(logits, y)
            if self.settings.arch_loss == "clean+adv":
                loss = loss + F.cross_entropy(forward(x), y)
            return loss, logits

        with only(self.net.alphas, self.net):
            key = self.precision, self.settings.arch_loss
            loss, logits = differentiated(ALPHAS, loss_of, self.net, key, (x, x_adv, y), self.net.alphas)
        self.optimizer.step()
        return loss, logits

    def project(
        self,
        batches: Iterator[Batch],
        monitored: Iterable[Batch],
        bound: float,
        steps: int,
        moved: Callable[[], None] = lambda: None,
    ) -> Projection:
        """Step 2 of Phase II: α to the nearest α_p with F(α_p) ≤ `bound` (Eq. 9), θ fixed.

        A round of gradient steps shares one of `batches` and its adversarial images, crafted against the α_p of the
        round's beginning; `monitored`, always attacked afresh, decides whether F ≤ H. `moved` is called
        before every step.
        """
        monitored = list(monitored)

        def rounds() -> Iterator[Batch]:
            for x, y in batches:
                x_adv = craft(self.attack, self.net, x, y, self.precision)
                for _ in range(ROUND):
                    moved()
                    yield x, x_adv

        drawn = rounds()
        with only(self.net.alphas, self.net):
            return project(
                self.net.alphas,
                lambda scale: self.sloped(*next(drawn), scale),
                lambda: self.measure(monitored).vulnerability,
                bound,
                steps=steps,
                lr=self.settings.projection_lr,
                margin=MARGIN,
            )

    def vulnerability(self, x: Tensor, x_adv: Tensor, precision: Precision = FP32) -> Tensor:
        """F of the supernet on batch statistics, differentiable by α. # Eq. 6"""
        self.net.train()
        with precision.autocast(x.device):
            clean = self.net.forward_cells(x)[1]
            adversarial = self.net.forward_cells(x_adv)[1]
        return network_vulnerability(clean, adversarial, self.settings.reduction, self.settings.features)

    def sloped(self, x: Tensor, x_adv: Tensor, scale: float = 1.0) -> tuple[Tensor, tuple[Tensor, ...]]:
        """F as of `vulnerability`, and the gradients of F / scale for the α."""

        def passed(x: Tensor, x_adv: Tensor) -> tuple[Tensor, ...]:
            f = self.vulnerability(x, x_adv, self.precision)
            return f.detach(), *gradients(f, self.net.alphas, scale)

        self.net.train()
        key = self.precision, self.settings.reduction, self.settings.features, scale
        f, *slope = replayed(PROJECTION, passed, self.net, key, (x, x_adv))
        return f, tuple(slope)

    def measure(self, batches: Iterable[Batch], moved: Callable[[], None] = lambda: None) -> Measured:
        """Losses, accuracies and F over `batches`: the same for the same network, which is left as it was. `moved` is
        called after every batch.

        In float32 whatever the search's precision: F ≤ H is a promise, and bfloat16 is too coarse to make it.
        """
        attack = replace(self.attack, seed=self.settings.seed)
        device = self.net.alpha_normal.device
        clean, adversarial, total = Running(device), Running(device), torch.zeros((), device=device)
        images = 0
        for x, y in batches:
            x_adv = craft(attack, self.net, x, y)
            with torch.no_grad(), buffers_kept(self.net):
                self.net.eval()
                for running, images_in in ((clean, x), (adversarial, x_adv)):
                    logits = self.net(images_in)
                    running.add(F.cross_entropy(logits, y), logits, y)
                total += self.vulnerability(x, x_adv) * len(y)
            images += len(y)
            moved()
        return Measured(clean.loss, clean.accuracy, adversarial.loss, adversarial.accuracy, float(total) / images)
