"""What each step of a search costs at the paper's supernet: the plain one, the fast one, and the machine's floor.

    python -m benchmarks.search_step [--batch-size 16] [--threads 1] [--rounds 5] [--json FILE]

Three variants, interleaved:
  published  the plain supernet as published code drives it: every `backward` computes the gradients of all weights
  frozen     the plain supernet, differentiated only for what the step wants
  fast       `FastSupernet`, likewise; its attack runs on `frozen_view`, whose folding is spread over the 7 steps
and the steps of an iteration:
  pgd         one step of the attack (eval mode)
  weight      forward and backward for the weights (train mode)
  alpha       α's gradient on clean and adversarial images (train mode, Eq. 8)
  projection  α's gradient of the network vulnerability (train mode, Eq. 9)
  iteration   14 pgd + weight + alpha, from the medians
The floor of a step is its multiply-adds at the rate of a large matrix product, beside the bytes that its convolutions
must read and write at the rate of a copy. Peak memory is measured at --memory-batch-size in processes of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.timing import clock, interleaved, machine, median, peak_mib, rates, save
from torch import Tensor, nn

from rnas.attacks.norms import project, steepest
from rnas.frozen import unfolded
from rnas.nets.count import macs
from rnas.nets.fast import FastSupernet
from rnas.nets.supernet import Supernet
from rnas.settings import SearchSpace
from rnas.vulnerability import network_vulnerability

VARIANTS = ("published", "frozen", "fast")
ATTACK_STEPS = 7
PASSES = {"pgd": 2, "weight": 3, "alpha": 4, "projection": 4}  # forward, backward for inputs, backward for weights
BARS = {
    "published": {"iteration": 4, "pgd": 5, "weight": 3, "alpha": 4, "projection": 4},
    "frozen": {"iteration": 3},
}


class Steps:
    """The steps of a search on one supernet, without its optimisers."""

    def __init__(self, variant: str, batch_size: int, device: str):
        torch.manual_seed(0)
        kind = FastSupernet if variant == "fast" else Supernet
        self.net = kind(SearchSpace(), 10).to(device)
        self.thetas, self.alphas = self.net.thetas, self.net.alphas
        self.published = variant == "published"
        self.x = torch.rand(batch_size, 3, 32, 32, device=device)
        self.x_adv = (self.x + 8 / 255 * torch.randn_like(self.x).sign()).clamp(0, 1)
        self.y = torch.arange(batch_size, device=device) % 10

    def _differentiate(self, loss: Tensor, wanted: list[Any]) -> tuple[Tensor, ...]:
        if not self.published:
            return torch.autograd.grad(loss, wanted)
        loss.backward()
        grads = tuple(t.grad for t in wanted)
        for p in self.net.parameters():
            p.grad = None
        return grads

    def prepare(self, step: str) -> Callable[[], object]:
        """Bring the network into the state that `step` needs; the step itself, to be timed."""
        self.net.train(step != "pgd")
        for p in self.net.parameters():
            p.requires_grad_(self.published or step == "weight")
        for p in self.alphas:
            p.requires_grad_(self.published or step != "pgd")
        if step == "pgd" and isinstance(self.net, FastSupernet):
            return partial(self.pgd, self.net.frozen_view())
        return partial(self.pgd, self.net) if step == "pgd" else getattr(self, step)

    def pgd(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        x_adv = self.x_adv.clone().requires_grad_()
        (grad,) = self._differentiate(F.cross_entropy(model(x_adv), self.y), [x_adv])
        with torch.no_grad():
            return project(x_adv + 2 / 255 * steepest(grad, "linf"), self.x, 8 / 255, "linf")

    def weight(self) -> None:
        self._differentiate(F.cross_entropy(self.net(self.x_adv), self.y), self.thetas)

    def alpha(self) -> None:
        loss = F.cross_entropy(self.net(self.x), self.y) + F.cross_entropy(self.net(self.x_adv), self.y)
        self._differentiate(loss, self.alphas)

    def projection(self) -> None:
        clean, adversarial = (self.net.forward_cells(x)[1] for x in (self.x, self.x_adv))
        self._differentiate(network_vulnerability(clean, adversarial), self.alphas)


def measure(batch_size: int, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of each step of each variant, and their ratios."""
    steps = {variant: Steps(variant, batch_size, device) for variant in VARIANTS}
    seconds: dict[str, dict[str, float]] = {}
    samples: dict[str, dict[str, list[float]]] = {}
    for step in PASSES:
        samples[step] = interleaved({v: s.prepare(step) for v, s in steps.items()}, rounds, device)
        seconds[step] = {variant: median(values) for variant, values in samples[step].items()}
    fast = steps["fast"].net
    assert isinstance(fast, FastSupernet)
    folding = median(interleaved({"": fast.frozen_view}, rounds, device)[""])
    seconds["pgd"]["fast"] += folding / ATTACK_STEPS
    seconds["iteration"] = {
        v: 2 * ATTACK_STEPS * seconds["pgd"][v] + seconds["weight"][v] + seconds["alpha"][v] for v in VARIANTS
    }
    ratios = {
        step: {v: round(values[v] / values["fast"], 2) for v in ("published", "frozen")}
        for step, values in seconds.items()
    }
    return {"ratio_to_fast": ratios, "seconds": seconds, "folding_seconds": folding, "samples": samples}


def floor(batch_size: int, device: str) -> dict[str, Any]:
    """The least that each step can cost on this machine."""
    net = Supernet(SearchSpace(), 10).to(device)
    touched = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal touched
        touched += 4 * (inputs[0].numel() + output.numel())

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad(), unfolded(net) as model:
        model(torch.zeros(1, 3, 32, 32, device=device))
    for hook in hooks:
        hook.remove()
    rate = rates(device)
    flop, byte = 2 * macs(net) * batch_size, touched * batch_size
    out: dict[str, Any] = {"rates": rate, "multiply_adds_per_image": macs(net)}
    for step, passes in PASSES.items():
        out[step] = {
            "gflop": passes * flop / 1e9,
            "seconds_of_arithmetic": passes * flop / 1e9 / rate["gemm_gflops"],
            "seconds_of_memory": passes * byte / 1e9 / rate["copy_gb_per_s"],
        }
    return out


MEMORY_STEPS = ("pgd", "weight")  # the others keep two passes: 19 GiB at batch 64 in the plain supernet


def memory(batch_size: int, device: str) -> dict[str, dict[str, float]]:
    """Peak MiB of each step above what the built network takes, each in a process of its own."""
    out: dict[str, dict[str, float]] = {}
    for step in MEMORY_STEPS:
        out[step] = {}
        for variant in (*VARIANTS, "fast, save_memory"):
            if variant == "fast, save_memory" and step == "pgd":
                continue  # an attack keeps little as it is
            command = [sys.executable, "-m", "benchmarks.search_step", "--peak", variant, step]
            command += ["--batch-size", str(batch_size), "--device", device, "--threads", "1"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            out[step][variant] = float(done.stdout)
    return out


def peak(variant: str, step: str, batch_size: int, device: str) -> float:
    steps = Steps(variant.split(",")[0], batch_size, device)
    if "save_memory" in variant and isinstance(steps.net, FastSupernet):
        steps.net.save_memory()
    before = peak_mib(device)
    steps.prepare(step)()
    return peak_mib(device) - before


def report(result: dict[str, Any]) -> str:
    """The tables for the terminal: ratios first."""
    lines = [f"{'step':12}{'published/fast':>16}{'frozen/fast':>14}{'fast ms':>10}{'images/s':>10}{'floor ms':>10}"]
    size = result["batch_size"]
    for step, ratio in result["ratio_to_fast"].items():
        seconds = result["seconds"][step]["fast"]
        least = f"{1e3 * result['floor'][step]['seconds_of_arithmetic']:10.0f}" if step in PASSES else ""
        marks = [
            "" if step not in BARS[v] else " ok" if ratio[v] >= BARS[v][step] else f" <{BARS[v][step]}"
            for v in ("published", "frozen")
        ]
        lines.append(
            f"{step:12}{ratio['published']:>12.2f}x{marks[0]:3}{ratio['frozen']:>10.2f}x{marks[1]:3}"
            f"{1e3 * seconds:>10.0f}{size / seconds:>10.1f}{least}"
        )
    for step, peaks in result.get("peak_mib", {}).items():
        lines.append(f"peak MiB, {step}: " + ", ".join(f"{v} {m:.0f}" for v, m in peaks.items()))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--memory-batch-size", type=int, default=64, help="0: do not measure memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "STEP"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(*options.peak, options.batch_size, options.device))
        return
    start = clock(options.device)
    result = {"batch_size": options.batch_size, "machine": machine(options.device)}
    if options.memory_batch_size:
        result["memory_batch_size"] = options.memory_batch_size
        result["peak_mib"] = memory(options.memory_batch_size, options.device)
    result |= measure(options.batch_size, options.rounds, options.device)
    result["floor"] = floor(options.batch_size, options.device)
    print(report(result))
    print(f"{clock(options.device) - start:.0f} s")
    save(options.json, result)


if __name__ == "__main__":
    main()
