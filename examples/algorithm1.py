"""Algorithm 1 of the RNAS paper (Qian et al., ECCV 2022) in one file: the search, and nothing that makes it fast.

    python examples/algorithm1.py                # a small search on real digits

Numbers of lines and equations are the paper's. What a search needs besides comes from the library as it is there: the
plain supernet (Eq. 1), PGD, the vulnerability F (Eq. 3-6), the projection (Eq. 9) and the digits. `rnas search` runs
the same algorithm on a faster form of the supernet, resumes, logs and measures more; a test holds both to one trace.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rnas.attacks import PGD
from rnas.data import batches, halves, load
from rnas.genotype import Genotype
from rnas.nas.derive import discretise
from rnas.nas.methods.base import Alphas
from rnas.nas.projection import project
from rnas.nets.supernet import Supernet
from rnas.settings import SearchSpace
from rnas.vulnerability import network_vulnerability

Batch = tuple[Tensor, Tensor]
"""Images (B,3,H,W) in [0,1] and labels (B,)."""
Batches = Callable[[int], Iterable[Batch]]
"""The batches of an epoch, counted from 1."""


@dataclass(frozen=True)
class Settings:
    """The paper's choices (§5.1), but for the number of epochs and the learning rates: digits need fewer and larger."""

    epochs: int = 12
    warmup: int = 3  # the paper: 15 of 60
    lr: float = 0.05  # the paper: 0.01, with batches of 128; it falls along a cosine
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0  # largest norm of the weights' gradient, as in DARTS
    alpha_lr: float = 0.01  # the paper: 0.0006
    alpha_weight_decay: float = 1e-3
    projection_lr: float = 0.1  # no α moves by more in one step of the projection


class Network(nn.Module):
    """The supernet together with the α that weigh its operations: images (B,3,H,W) in [0,1] to logits (B,classes)."""

    def __init__(
        self,
        space: SearchSpace,
        classes: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.25, 0.25, 0.25),
    ):
        """`mean` and `std` of the images' channels normalise within."""
        super().__init__()
        self.supernet = Supernet(space, classes, mean, std)  # θ at random
        self.alpha = Alphas(space)  # α near 0, at random

    @property
    def thetas(self) -> list[nn.Parameter]:
        return self.supernet.thetas

    @property
    def alphas(self) -> list[nn.Parameter]:
        return list(self.alpha.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_cells(x)[0]

    def forward_cells(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B,classes) and the output of every cell."""
        return self.supernet.forward_cells(x, self.alpha.softmax())  # Eq. 1: softmax(α) of the operations

    def genotype(self) -> Genotype:
        """§3: of each edge the operation with the largest α, of each node the two strongest edges."""
        return discretise(self.supernet.space, *(strength.tolist() for strength in self.alpha.strengths()))


def attacked(net: Network, attack: PGD, x: Tensor, y: Tensor) -> Tensor:
    """Adversarial images x̃ (B,3,H,W) against the network as it is used: with the running statistics of its BN."""
    net.eval()
    return attack(net, x, y)


def weight_step(
    net: Network, optimizer: torch.optim.Optimizer, attack: PGD, clip: float, x: Tensor, y: Tensor
) -> float:
    """θ descends on L_train^adv(θ, α), α fixed. Returns that loss."""
    x_adv = attacked(net, attack, x, y)
    net.train()
    loss = cross_entropy(net(x_adv), y)  # L_train^adv of Eq. 7
    optimizer.zero_grad()
    loss.backward(inputs=net.thetas)  # ∇_θ
    nn.utils.clip_grad_norm_(net.thetas, clip)
    optimizer.step()
    return loss.item()


def alpha_step(net: Network, optimizer: torch.optim.Optimizer, attack: PGD, x: Tensor, y: Tensor) -> float:
    """α descends on L_val + L_val^adv, θ fixed. Returns that loss.

    That is Eq. 8; line 5 of the algorithm has L_val^adv alone (`rnas search --arch-loss adv`).
    """
    x_adv = attacked(net, attack, x, y)
    net.train()
    loss = cross_entropy(net(x_adv), y) + cross_entropy(net(x), y)  # Eq. 8, first line
    optimizer.zero_grad()
    loss.backward(inputs=net.alphas)  # ∇_α, first order: θ* is taken to be θ
    optimizer.step()
    return loss.item()


def vulnerability(net: Network, x: Tensor, x_adv: Tensor) -> Tensor:
    """F(α): how far the attack distorts what the cells put out, a scalar."""
    net.train()
    clean, adversarial = net.forward_cells(x)[1], net.forward_cells(x_adv)[1]  # z and z̃ of every cell
    return network_vulnerability(clean, adversarial)  # Eq. 3 a channel, Eq. 5 a cell, Eq. 6 the network


def measured(net: Network, attack: PGD, images: list[Batch]) -> float:
    """F(α) on all of `images`. The running statistics of BN, which the attacks go by, stay as they were."""
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    total, count = 0.0, 0
    for x, y in images:
        x_adv = attacked(net, attack, x, y)
        with torch.no_grad():
            total += vulnerability(net, x, x_adv).item() * len(y)
        net.load_state_dict(before, strict=False)
        count += len(y)
    return total / count


def constrain(
    net: Network, attack: PGD, validation: Iterator[Batch], judges: list[Batch], bound: float, steps: int, lr: float
) -> float:
    """α to the nearest α_p with F(α_p) ≤ H = `bound`, θ fixed. Returns F(α_p) on `judges`, which decide.

    Eq. 9, min ½‖α − α_p‖² s.t. F(α_p) ≤ H, is solved by the method of multipliers, which asks for F with its gradient,
    on a sample, and for F as a verdict.
    """

    def slope(scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, y = next(validation)
        f = vulnerability(net, x, attacked(net, attack, x, y))
        return f.detach(), torch.autograd.grad(f / scale, net.alphas)

    found = project(net.alphas, slope, lambda: measured(net, attack, judges), bound, steps=steps, lr=lr, margin=0.1)
    return found.after


def algorithm1(
    net: Network,
    attack: PGD,
    train: Batches,
    validation: Batches,
    judges: list[Batch],
    bound: float,
    settings: Settings,
) -> tuple[Genotype, list[dict[str, float]]]:
    """The genotype that the search finds, and what it saw in every epoch: mean losses, and F.

    `train` and `validation` are halves of the training set (§5.1), `judges` some images of the latter.
    """
    theta_optimizer = torch.optim.SGD(net.thetas, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(theta_optimizer, settings.epochs)
    alpha_optimizer = torch.optim.Adam(
        net.alphas, settings.alpha_lr, betas=(0.5, 0.999), weight_decay=settings.alpha_weight_decay
    )
    history = []
    for e in range(1, settings.epochs + 1):
        images = list(train(e))
        T = len(images)
        if e <= settings.warmup:  # Phase I: θ-warm up, line 2
            losses = [weight_step(net, theta_optimizer, attack, settings.clip, *batch) for batch in images]  # lines 3-5
            seen = {"theta_loss": mean(losses), "F": measured(net, attack, judges)}
        else:  # Phase II: robust architecture search, line 1
            drawn = forever(validation, e)
            theta_losses, alpha_losses = [], []
            for batch in images[: T // 2]:  # Step 1: unconstrained, lines 3-6
                theta_losses.append(weight_step(net, theta_optimizer, attack, settings.clip, *batch))  # line 4
                alpha_losses.append(alpha_step(net, alpha_optimizer, attack, *next(drawn)))  # line 5
            before = measured(net, attack, judges)
            steps = T - T // 2  # Step 2: the constraint, lines 8-12
            after = constrain(net, attack, drawn, judges, bound, steps, settings.projection_lr)
            seen = {"theta_loss": mean(theta_losses), "alpha_loss": mean(alpha_losses), "F_before": before, "F": after}
        decay.step()
        history.append(seen)
        print(f"epoch {e:2}: " + ", ".join(f"{name} {value:.4g}" for name, value in seen.items()))
    return net.genotype(), history


def forever(of: Batches, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch, over and over."""
    while True:
        yield from of(epoch)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """A search on the digits, with a network and images that are smaller than the paper's."""
    parser = argparse.ArgumentParser(description="Algorithm 1 on real digits")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--bound", type=float, default=1e-4, help="H; the paper: 1e-4 (RNAS-H) and 1e-5 (RNAS-L)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    data = load("digits", limit_per_class=32, image_size=16)
    first, second = halves(data.train, options.seed)
    net = Network(SearchSpace(cells=3, channels=4, nodes=2), len(data.classes), *data.statistics())
    eps = data.eps_default
    genotype, _ = algorithm1(
        net,
        PGD(eps=eps, step=eps / 4, steps=7),
        lambda epoch: batches(first, 16, seed=2 * options.seed, epoch=epoch, augment=True, drop_last=True),
        lambda epoch: batches(second, 16, seed=2 * options.seed + 1, epoch=epoch, augment=True, drop_last=True),
        list(batches(second[torch.arange(64)], 32)),
        options.bound,
        Settings(epochs=options.epochs, warmup=options.epochs // 4),
    )
    print(genotype.to_json())


if __name__ == "__main__":
    main()
