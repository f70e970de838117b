"""What adversarial training and evaluation of whole networks cost: the straightforward loop, and ours.

    python -m benchmarks.train_step [--networks RNAS-L ResNet18] [--batch-size 4] [--rounds 3] [--json FILE]
    python -m benchmarks.train_step --device cuda               # batches of 128 and 512, float32 and bfloat16

Variants, interleaved:
  published          the network as it is; every `backward` computes the gradients of all weights
  unfolded           the network as it is; the attack differentiates its images only
  ours               `rnas.steps.weight_step` for training, `rnas.attacks` for evaluation
  ours, save_memory  the same training with every cell computed again for the backward pass (cell networks)
of a step of PGD-7 training (20 cells, C = 36, at 32x32: attack, forward, backward, SGD) and of PGD-20, which is float32
always. From the step follows what 600 epochs of CIFAR-10 would cost. On a GPU also the peak memory of each variant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.projected import duration, training_seconds
from benchmarks.timing import (
    add_options,
    gpu_peak_mib,
    in_ms,
    interleaved,
    machine,
    median,
    ratio,
    save,
    settle,
    times,
)
from rnas.attacks import PGD
from rnas.attacks.norms import project, random_point, steepest
from rnas.frozen import Model, unfolded
from rnas.nets.derived import DerivedNetwork
from rnas.nets.zoo import build
from rnas.precision import Precision, full_precision
from rnas.steps import choose_precision, weight_step

BARS = {"RNAS-L": 2.0, "ResNet18": 1.3}


def plain_pgd(net: nn.Module, forward: Model, attack: PGD, x: Tensor, y: Tensor, all_gradients: bool) -> Tensor:
    """The textbook loop, with the network in eval mode; `forward` is its pass."""
    training = net.training
    net.eval()
    x_adv = random_point(x, attack.eps, attack.norm, None)
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(forward(x_adv), y)
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


def variants(
    name: str, batch_size: int, device: str, precision: Precision
) -> dict[str, dict[str, Callable[[], object]]]:
    """The runs to be timed, of training and of evaluation."""
    torch.manual_seed(0)
    net = build(name, classes=10).to(device)
    forward = precision.of(net)
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, 1e-4)
    x, y = torch.rand(batch_size, 3, 32, 32, device=device), torch.arange(batch_size, device=device) % 10
    short, long = PGD(steps=7), PGD(steps=20)

    def train(all_gradients: bool) -> None:
        if all_gradients:
            x_adv = plain_pgd(net, forward, short, x, y, True)
        else:
            with unfolded(net):
                x_adv = plain_pgd(net, forward, short, x, y, False)
        net.train()
        loss = F.cross_entropy(forward(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    def ours(save_memory: bool = False) -> None:
        if isinstance(net, DerivedNetwork):
            net.save_memory(save_memory)
        weight_step(net, parameters, optimizer, short, x, y, 5.0, precision=precision)

    def evaluate(all_gradients: bool) -> None:
        if all_gradients:
            plain_pgd(net, net, long, x, y, True)
        else:
            with unfolded(net):
                plain_pgd(net, net, long, x, y, False)

    training: dict[str, Callable[[], object]] = {
        "published": lambda: train(True),
        "unfolded": lambda: train(False),
        "ours": ours,
    }
    if isinstance(net, DerivedNetwork):
        training["ours, save_memory"] = lambda: ours(save_memory=True)
    if precision.bf16:
        return {"PGD-7 training": training}
    return {
        "PGD-7 training": training,
        "PGD-20": {
            "published": lambda: evaluate(True),
            "unfolded": lambda: evaluate(False),
            "ours": lambda: long(net.eval(), x, y),
        },
    }


def measure(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, Any]:
    """Seconds of each variant, ratios, and on a GPU peak MiB."""
    samples = interleaved(runs, rounds, device)
    seconds = {variant: median(values) for variant, values in samples.items()}
    result: dict[str, Any] = {
        "ratio_to_ours": {v: ratio(t, seconds["ours"]) for v, t in seconds.items() if v != "ours"},
        "seconds": seconds,
        "samples": samples,
    }
    if device == "cuda":
        result["peak_mib"] = {variant: gpu_peak_mib(run) for variant, run in runs.items()}
    return result


def report(name: str, what: str, run: dict[str, Any], batch_size: int) -> str:
    """One line of the table, and what follows from it."""
    seconds, ratios = run["seconds"]["ours"], run["ratio_to_ours"]
    rate = "-" if seconds is None else f"{batch_size / seconds:.1f}"
    marks = times(ratios["published"], BARS.get(name)), times(ratios["unfolded"])
    lines = [f"{name + ', ' + what:28}{marks[0]:>16}{marks[1]:>16}{in_ms(seconds):>10}{rate:>10}"]
    if "ours, save_memory" in ratios:
        lines.append(f"  with save_memory {times(ratios['ours, save_memory'])} the time of ours")
    for variant, mib in run.get("peak_mib", {}).items():
        lines.append(f"  peak MiB, {variant}: {'no room' if mib is None else f'{mib:.0f}'}")
    for variant, total in run.get("papers_training_seconds", {}).items():
        lines.append(f"  600 epochs of CIFAR-10, {variant}: {duration(total)}")
    return "\n".join(lines)


@full_precision()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch_size=4, rounds=3)
    parser.add_argument("--networks", nargs="+", default=list(BARS))
    options = parser.parse_args(arguments)
    settle(options)
    result: dict[str, Any] = {"machine": machine(options.device), "runs": []}
    for precision in map(choose_precision, options.precision):
        for size in options.batch_size:
            print(f"batch size {size}, {precision.name}")
            print(f"{'':28}{'published/ours':>16}{'unfolded/ours':>16}{'ours ms':>10}{'images/s':>10}")
            done: dict[str, Any] = {"batch_size": size, "precision": precision.name}
            result["runs"].append(done)
            for name in options.networks:
                for what, runs in variants(name, size, options.device, precision).items():
                    run = measure(runs, options.rounds, options.device)
                    if what == "PGD-7 training":
                        known = {v: t for v, t in run["seconds"].items() if t is not None}
                        run["papers_training_seconds"] = {v: training_seconds(t, size) for v, t in known.items()}
                    done.setdefault(name, {})[what] = run
                    print(report(name, what, run, size), flush=True)
            save(options.json, result)  # what there is, if the rest is cut off


if __name__ == "__main__":
    main()
