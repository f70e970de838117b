"""What adversarial training and evaluation of whole networks cost: the straightforward loop, and ours.

    python -m benchmarks.train_step [--networks RNAS-L ResNet18] [--batch-size 4] [--rounds 3] [--json FILE]
    python -m benchmarks.train_step --device cuda               # batches of 128 and 512, float32 and bfloat16

Variants, interleaved:
  published          the network as it is; every `backward` computes the gradients of all weights
  unfolded           the network as it is; the attack differentiates its images only
  ours               `rnas.training.step.weight_step` for training, `rnas.attacks` for evaluation
  ours, save_memory  the same training with every cell computed again for the backward pass (cell networks)
of a step of PGD-7 training (20 cells, C = 36, at 32x32: attack, forward, backward, SGD) and of PGD-20, which is float32
always. The floor is its multiply-adds at the rate of a large matrix product. From the step follows what 600 epochs of
CIFAR-10 would cost. Peak memory above the built network: on a CPU in processes of their own, of training only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.projected import duration, training_seconds
from benchmarks.timing import (
    add_options,
    fits,
    gpu_peak_mib,
    interleaved,
    machine,
    median,
    peak_mib,
    printed_by,
    program,
    rates,
    ratio,
    save,
    settle,
    times,
    with_rate,
)
from rnas.attacks import PGD
from rnas.attacks.norms import project, random_point, steepest
from rnas.compute.device import choose_precision
from rnas.compute.freezing import Model, unfolded
from rnas.compute.precision import Precision, full_precision
from rnas.nets.count import macs
from rnas.nets.derived import DerivedNetwork
from rnas.nets.zoo import build
from rnas.training.step import weight_step

COLUMNS = ("published", "unfolded", "ours", "floor")
BARS = {"RNAS-L": 2.0, "ResNet18": 1.3}
SHORT, LONG = 7, 20  # steps of an attack
TRAINING, EVALUATION = f"PGD-{SHORT} training", f"PGD-{LONG}"
PASSES = {TRAINING: 2 * SHORT + 3, EVALUATION: 2 * LONG}  # forward, backward for inputs; and for weights


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
    short, long = PGD(steps=SHORT), PGD(steps=LONG)

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
        return {TRAINING: training}
    return {
        TRAINING: training,
        EVALUATION: {
            "published": lambda: evaluate(True),
            "unfolded": lambda: evaluate(False),
            "ours": lambda: long(net.eval(), x, y),
        },
    }


def measure(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, Any]:
    """Seconds of each variant, ratios, and on a GPU peak MiB."""
    for _ in range(2):  # the second call of an attack tries to record it (`rnas.fast.recording`)
        fits(runs["ours"])
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


def cpu_peaks(name: str, batch_size: int, precision: Precision, of: Iterable[str]) -> dict[str, float]:
    """Peak MiB of a training step of each variant above what the built network takes."""
    options = ["--networks", name, "--batch-size", str(batch_size), "--precision", precision.name]
    return {variant: printed_by("benchmarks.train_step", ["--peak", variant, *options]) for variant in of}


def cpu_peak(name: str, variant: str, batch_size: int, precision: Precision) -> float:
    run = variants(name, batch_size, "cpu", precision)[TRAINING][variant]
    before = peak_mib()
    run()
    return peak_mib() - before


def report(name: str, what: str, run: dict[str, Any], batch_size: int) -> str:
    """One line of the table, and what follows from it."""
    seconds, ratios = {**run["seconds"], "floor": run["floor_seconds"]}, run["ratio_to_ours"]
    marks = times(ratios["published"], BARS.get(name)), times(ratios["unfolded"])
    shown = "".join(f"{with_rate(seconds[c], batch_size):>15}" for c in COLUMNS)
    lines = [f"{name + ', ' + what:26}{marks[0]:>15}{marks[1]:>14}{shown}"]
    if "ours, save_memory" in ratios:
        lines.append(f"  with save_memory {times(ratios['ours, save_memory'])} the time of ours")
    if "peak_mib" in run:
        shown = ", ".join(f"{v} {'no room' if mib is None else f'{mib:.0f}'}" for v, mib in run["peak_mib"].items())
        lines.append(f"  peak MiB: {shown}")
    for variant, total in run.get("papers_training_seconds", {}).items():
        lines.append(f"  600 epochs of CIFAR-10, {variant}: {duration(total)}")
    return "\n".join(lines)


def of_network(name: str, size: int, precision: Precision, rounds: int, device: str, gflops: float) -> dict[str, Any]:
    """All that is measured of a network; printed too."""
    out, flop = {}, 2 * macs(build(name, classes=10)) * size
    for what, runs in variants(name, size, device, precision).items():
        run = measure(runs, rounds, device)
        run["floor_seconds"] = PASSES[what] * flop / 1e9 / gflops
        if what == TRAINING:
            known = {v: t for v, t in run["seconds"].items() if t is not None}
            run["papers_training_seconds"] = {v: training_seconds(t, size) for v, t in known.items()}
            if device == "cpu":
                run["peak_mib"] = cpu_peaks(name, size, precision, runs)
        out[what] = run
        print(report(name, what, run, size), flush=True)
    return out


@full_precision()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch_size=4, rounds=3)
    parser.add_argument("--networks", nargs="+", default=list(BARS))
    parser.add_argument("--peak", metavar="VARIANT", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    settle(options)
    if options.peak:
        precision = choose_precision(options.precision[0])
        print(cpu_peak(options.networks[0], options.peak, options.batch_size[0], precision))
        return
    result: dict[str, Any] = {"machine": machine(options.device), "runs": []}
    for precision in map(choose_precision, options.precision):
        rate = rates(options.device, torch.bfloat16 if precision.bf16 else torch.float32)
        for size in options.batch_size:
            print(f"batch size {size}, {precision.name}; ms (images/s)")
            print(f"{'':26}{'published/ours':>15}{'unfolded/ours':>14}{''.join(f'{c:>15}' for c in COLUMNS)}")
            done: dict[str, Any] = {"batch_size": size, "precision": precision.name, "rates": rate}
            result["runs"].append(done)
            for name in options.networks:
                done[name] = of_network(name, size, precision, options.rounds, options.device, rate["gemm_gflops"])
            save(options.json, result)  # what there is, if the rest is cut off


if __name__ == "__main__":
    program(main)
