"""What adversarial training and evaluation of whole networks cost: the straightforward loop, and ours.

    python -m benchmarks.train_step [--networks RNAS-L ResNet18] [--batch-size 4] [--rounds 3] [--json FILE]

Three variants, interleaved:
  published  the network as it is; every `backward` computes the gradients of all weights
  unfolded   the network as it is; the attack differentiates its images only
  ours       `rnas.steps.weight_step` for training, `rnas.attacks` for evaluation
of a step of PGD-7 training (20 cells, C = 36, at 32x32: attack, forward, backward, SGD) and of PGD-20.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.timing import interleaved, machine, median, save
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.attacks.norms import project, random_point, steepest
from rnas.frozen import unfolded
from rnas.nets.zoo import build
from rnas.steps import weight_step

BARS = {"RNAS-L": 2.0, "ResNet18": 1.3}


def plain_pgd(net: nn.Module, attack: PGD, x: Tensor, y: Tensor, all_gradients: bool) -> Tensor:
    """The textbook loop, with the network in eval mode."""
    training = net.training
    net.eval()
    x_adv = random_point(x, attack.eps, attack.norm, None)
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(net(x_adv), y)
        if all_gradients:
            loss.backward()
            grad = x_adv.grad
            assert grad is not None
        else:
            (grad,) = torch.autograd.grad(loss, x_adv)
        with torch.no_grad():
            x_adv = project(x_adv + attack.step * steepest(grad, attack.norm), x, attack.eps, attack.norm)
    net.train(training)
    return x_adv.detach()


def variants(name: str, batch_size: int) -> dict[str, dict[str, Callable[[], object]]]:
    """The runs to be timed, of training and of evaluation."""
    torch.manual_seed(0)
    net = build(name, classes=10)
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, 1e-4)
    x, y = torch.rand(batch_size, 3, 32, 32), torch.arange(batch_size) % 10
    short, long = PGD(steps=7), PGD(steps=20)

    def train(all_gradients: bool) -> None:
        if all_gradients:
            x_adv = plain_pgd(net, short, x, y, True)
        else:
            with unfolded(net):
                x_adv = plain_pgd(net, short, x, y, False)
        net.train()
        loss = F.cross_entropy(net(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    def evaluate(all_gradients: bool) -> None:
        if all_gradients:
            plain_pgd(net, long, x, y, True)
        else:
            with unfolded(net):
                plain_pgd(net, long, x, y, False)

    return {
        "PGD-7 training": {
            "published": lambda: train(True),
            "unfolded": lambda: train(False),
            "ours": lambda: weight_step(net, parameters, optimizer, short, x, y, 5.0),
        },
        "PGD-20": {
            "published": lambda: evaluate(True),
            "unfolded": lambda: evaluate(False),
            "ours": lambda: long(net.eval(), x, y),
        },
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(BARS))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"batch_size": options.batch_size, "machine": machine("cpu")}
    print(f"{'':28}{'published/ours':>16}{'unfolded/ours':>16}{'ours ms':>10}{'images/s':>10}")
    for name in options.networks:
        for what, runs in variants(name, options.batch_size).items():
            samples = interleaved(runs, options.rounds, "cpu")
            seconds = {variant: median(values) for variant, values in samples.items()}
            ratio = {v: round(seconds[v] / seconds["ours"], 2) for v in ("published", "unfolded")}
            result.setdefault(name, {})[what] = {"ratio_to_ours": ratio, "seconds": seconds, "samples": samples}
            bar = BARS.get(name, 0)
            mark = " ok" if ratio["published"] >= bar else f" <{bar}"
            print(
                f"{name + ', ' + what:28}{ratio['published']:>12.2f}x{mark:3}{ratio['unfolded']:>15.2f}x"
                f"{1e3 * seconds['ours']:>10.0f}{options.batch_size / seconds['ours']:>10.1f}"
            )
    save(options.json, result)


if __name__ == "__main__":
    main()
