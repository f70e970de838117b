"""What each step of a search costs at the paper's supernet: the plain one, the fast one, and the machine's floor.

    python -m benchmarks.search_step [--batch-size 16] [--threads 1] [--rounds 5] [--json FILE]
    python -m benchmarks.search_step --device cuda              # batches of 128 and 512, float32 and bfloat16

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
On a GPU the fast steps are timed as a search takes them, recorded where that pays (`rnas.fast.recording`), and
launched as well; the pgd step is a seventh of a whole attack.
The floor of a step is its multiply-adds at the rate of a large matrix product, beside the bytes that its convolutions
must read and write at the rate of a copy; what its calls cost is the time of the same step on one 8x8 image. On a CPU
peak memory is measured at --memory-batch-size in processes of their own, on a GPU at every batch size. From the steps
follows what the paper's whole search would cost.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.projected import duration, search_seconds
from benchmarks.timing import (
    add_options,
    fits,
    gpu_peak_mib,
    in_ms,
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
from rnas.attacks.norms import project, steepest
from rnas.compute.device import choose_precision
from rnas.compute.freezing import unfolded
from rnas.compute.precision import Precision, full_precision
from rnas.fast import supernet as fast
from rnas.fast.recording import ALPHAS, WEIGHTS, forget
from rnas.fast.supernet import FastSupernet
from rnas.nas.engine import Engine, Halves
from rnas.nas.methods.rnas import Rnas, Settings, ValidationLoss
from rnas.nets.count import macs
from rnas.nets.space import uniform
from rnas.nets.supernet import Supernet
from rnas.settings import SearchSpace
from rnas.training.adversarial import craft
from rnas.training.objectives import CrossEntropy
from rnas.training.step import differentiated
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

    def __init__(self, variant: str, batch_size: int, device: str, precision: Precision, image_size: int = 32):
        torch.manual_seed(0)
        self.precision = precision
        kind = FastSupernet if variant == "fast" else Supernet
        self.net = kind(SearchSpace(), 10)
        self.method = Rnas(Settings(out=Path(), precision=precision.name))
        self.method.begin(self.net.shape)
        self.net.architecture = self.method
        self.net.to(device)
        self.thetas, self.alphas = self.net.thetas, list(self.method.parameters())
        self.published = variant == "published"
        self.x = torch.rand(batch_size, 3, image_size, image_size, device=device)
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
        if step == "pgd":
            return partial(self.pgd, self.fold() if isinstance(self.net, FastSupernet) else self.with_weights)
        run: Callable[[], object] = getattr(self, step)
        return run

    def fold(self) -> Callable[[Tensor], Tensor]:
        """What an attack of the fast supernet runs on."""
        assert isinstance(self.net, FastSupernet)
        with self.precision.autocast(self.x.device):
            return self.net.frozen_view(self.method.weights())

    def with_weights(self, x: Tensor) -> Tensor:
        """Logits of a pass."""
        return self.net(x, self.method.weights())

    def as_chosen(self, step: str) -> Callable[[], object]:
        """The step as a search takes it on a GPU: launched, or recorded where that is quicker."""
        self.prepare(step)
        if step == "pgd":
            attack = PGD(steps=ATTACK_STEPS)
            return partial(craft, attack, self.net, self.x, self.y, self.precision, self.method.weights().detach())
        if step == "projection":
            engine = Engine(self.method, PGD(), Halves(None, None, 0, self.method.settings, self.x.device))  # type: ignore[arg-type]
            engine.net = self.net
            return partial(self.method.slope_of_f, engine, self.x, self.x_adv)
        if step == "alpha":
            inputs = self.x, self.x_adv, self.y
            return partial(differentiated, ALPHAS, ValidationLoss(True, self.precision), self.net, inputs, self.alphas)
        weights = self.method.weights().detach()
        inputs = self.x_adv, self.y, weights
        return partial(differentiated, WEIGHTS, CrossEntropy(self.precision), self.net, inputs, self.thetas)

    def loss_on_adversarial(self, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What a weight step descends on, and logits."""
        logits = self.logits(x_adv)
        return F.cross_entropy(logits, y), logits

    def losses_on_both(self, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What an α step descends on (Eq. 8), and logits."""
        logits = self.logits(x_adv)
        return F.cross_entropy(self.logits(x), y) + F.cross_entropy(logits, y), logits

    def logits(self, x: Tensor) -> Tensor:
        return self.precision.of(self.net)(x, self.method.weights())

    def pgd(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        x_adv = self.x_adv.clone().requires_grad_()
        (grad,) = self._differentiate(F.cross_entropy(self.precision.of(model)(x_adv), self.y), [x_adv])
        with torch.no_grad():
            return project(x_adv + 2 / 255 * steepest(grad, "linf"), self.x, 8 / 255, "linf")

    def weight(self) -> None:
        self._differentiate(self.loss_on_adversarial(self.x, self.x_adv, self.y)[0], self.thetas)

    def alpha(self) -> None:
        self._differentiate(self.losses_on_both(self.x, self.x_adv, self.y)[0], self.alphas)

    def projection(self) -> None:
        with self.precision.autocast(self.x.device):
            clean, adversarial = (self.net.forward_cells(x, self.method.weights())[1] for x in (self.x, self.x_adv))
        self._differentiate(network_vulnerability(clean, adversarial), self.alphas)


def measure(batch_size: int, rounds: int, device: str, precision: Precision) -> dict[str, Any]:
    """Seconds of each step of each variant, and their ratios; and of the paper's search."""
    steps = {variant: Steps(variant, batch_size, device, precision) for variant in VARIANTS}
    seconds: dict[str, dict[str, float | None]] = {}
    launched: dict[str, float | None] = {}
    samples: dict[str, dict[str, list[float]]] = {}
    for step in PASSES:
        samples[step] = interleaved(runs_of(steps, step, device), rounds, device)
        forget(steps["fast"].net)
        medians = {variant: median(values) for variant, values in samples[step].items()}
        seconds[step] = {variant: medians[variant] for variant in VARIANTS}
        if device == "cuda":
            launched[step] = medians[LAUNCHED]
    folding = median(interleaved({"": steps["fast"].fold}, rounds, device)[""]) or 0.0
    if device == "cuda":
        seconds["pgd"]["fast"] = scaled(seconds["pgd"]["fast"], 1 / ATTACK_STEPS)  # a whole attack was timed
        launched["pgd"] = scaled(launched["pgd"], plus=folding / ATTACK_STEPS)
    else:
        seconds["pgd"]["fast"] = scaled(seconds["pgd"]["fast"], plus=folding / ATTACK_STEPS)
    of_variant = {v: {step: values[v] for step, values in seconds.items()} for v in VARIANTS}
    whole = {v: {step: t for step, t in of.items() if t is not None} for v, of in of_variant.items()}
    whole = {v: of for v, of in whole.items() if len(of) == len(PASSES)}
    seconds["iteration"] = {v: iteration(whole[v]) if v in whole else None for v in VARIANTS}
    return {
        "ratio_to_fast": {
            step: {v: ratio(values[v], values["fast"]) for v in ("published", "frozen")}
            for step, values in seconds.items()
        },
        "seconds": seconds,
        "papers_search_seconds": {v: search_seconds(of, batch_size) for v, of in whole.items()},
        "calls_seconds": calls(rounds, device, precision),
        "folding_seconds": folding,
        "launched_seconds": launched,
        "samples": samples,
    }


def calls(rounds: int, device: str, precision: Precision) -> dict[str, float | None]:
    """Seconds of each step of the fast supernet with next to nothing to compute: on one 8x8 image."""
    steps = Steps("fast", 1, device, precision, image_size=8)
    return {step: median(interleaved({"": steps.prepare(step)}, rounds, device)[""]) for step in PASSES}


def scaled(seconds: float | None, by: float = 1.0, plus: float = 0.0) -> float | None:
    """`seconds · by + plus`, of what fitted."""
    return None if seconds is None else seconds * by + plus


LAUNCHED = "fast, launched"


def runs_of(steps: dict[str, Steps], step: str, device: str) -> dict[str, Callable[[], object]]:
    """A step of every variant; on a GPU that of the fast supernet as a search takes it, and launched as well."""
    runs = {variant: of.prepare(step) for variant, of in steps.items()}
    if device == "cuda":
        runs |= {
            LAUNCHED: partial(with_recordings, "0", runs["fast"]),
            "fast": partial(with_recordings, "1", steps["fast"].as_chosen(step)),
        }
        for _ in range(2):  # the second call chooses
            fits(runs["fast"])
    return runs


def with_recordings(wish: str, run: Callable[[], object]) -> None:
    """Run it with recordings switched on or off."""
    with mock.patch.dict(os.environ, RNAS_CUDA_GRAPHS=wish):
        run()


def iteration(seconds: Mapping[str, float]) -> float:
    """An iteration of Phase II's first step: both attacks, weights, α."""
    return 2 * ATTACK_STEPS * seconds["pgd"] + seconds["weight"] + seconds["alpha"]


def floor(batch_size: int, device: str, precision: Precision) -> dict[str, Any]:
    """The least that each step can cost on this machine."""
    net = Supernet(SearchSpace(), 10).to(device)
    touched = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal touched
        touched += (2 if precision.bf16 else 4) * (inputs[0].numel() + output.numel())

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad(), unfolded(net) as model:
        model(torch.zeros(1, 3, 32, 32, device=device), uniform(net.shape, device))
    for hook in hooks:
        hook.remove()
    rate = rates(device, torch.bfloat16 if precision.bf16 else torch.float32)
    flop, byte = 2 * macs(net, 32, uniform(net.shape, device)) * batch_size, touched * batch_size
    out: dict[str, Any] = {"rates": rate, "multiply_adds_per_image": macs(net, 32, uniform(net.shape, device))}
    for step, passes in PASSES.items():
        out[step] = {
            "gflop": passes * flop / 1e9,
            "seconds_of_arithmetic": passes * flop / 1e9 / rate["gemm_gflops"],
            "seconds_of_memory": passes * byte / 1e9 / rate["copy_gb_per_s"],
        }
    return out


SAVING = ("fast, save_memory",)
AS_ON_A_GPU = ("fast, as on a GPU", "fast, as on a GPU, save_memory")
MOST_IMAGES = 32  # of steps that keep two passes: at 64 the plain supernet would take 19 GiB


def memory(batch_size: int, device: str, precision: Precision) -> dict[str, dict[str, float | None]]:
    """Peak MiB of each step above what the built network takes; on a CPU each in a process of its own."""
    out: dict[str, dict[str, float | None]] = {}
    for step in PASSES:
        if device == "cpu" and step in ("alpha", "projection") and batch_size > MOST_IMAGES:
            continue
        out[step] = {}
        for variant in (*VARIANTS, *(SAVING if device == "cuda" else (*SAVING, *AS_ON_A_GPU))):
            if "save_memory" in variant and step == "pgd":
                continue  # an attack keeps little as it is
            if device == "cuda":
                steps = saving(variant, batch_size, device, precision)
                out[step][variant] = gpu_peak_mib(steps.prepare(step))
                continue
            of = ["--peak", variant, step, "--batch-size", str(batch_size), "--precision", precision.name]
            out[step][variant] = printed_by("benchmarks.search_step", of)
    return out


def saving(variant: str, batch_size: int, device: str, precision: Precision) -> Steps:
    """The steps of a variant, whose name may go on with "save_memory"."""
    steps = Steps(variant.split(",")[0], batch_size, device, precision)
    if "save_memory" in variant and isinstance(steps.net, FastSupernet):
        steps.net.save_memory()
    return steps


def cpu_peak(variant: str, step: str, batch_size: int, precision: Precision) -> float:
    if "as on a GPU" in variant:
        fast.on_cpu = lambda x: False
    steps = saving(variant, batch_size, "cpu", precision)
    before = peak_mib()
    steps.prepare(step)()
    return peak_mib() - before


def report(run: dict[str, Any]) -> str:
    """The tables of one batch size and precision for the terminal: ratios first, then ms and images/s."""
    size = run["batch_size"]
    columns = (*VARIANTS, "floor")
    lines = [
        f"batch size {size}, {run['precision']}; ms (images/s)",
        f"{'step':12}{'published/fast':>16}{'frozen/fast':>13}"
        + "".join(f"{c:>15}" for c in columns)
        + f"{'calls':>8}",
    ]
    for step, of in run["ratio_to_fast"].items():
        marks = [times(of[v], BARS[v].get(step)) for v in ("published", "frozen")]
        seconds = dict(run["seconds"][step])
        called = ""
        if step in PASSES:
            seconds["floor"] = run["floor"][step]["seconds_of_arithmetic"]
            called = in_ms(run["calls_seconds"][step])
        shown = "".join(f"{with_rate(seconds.get(c), size):>15}" for c in columns)
        lines.append(f"{step:12}{marks[0]:>16}{marks[1]:>13}{shown}{called:>8}")
    if run["launched_seconds"]:
        shown = ", ".join(f"{step} {in_ms(seconds)} ms" for step, seconds in run["launched_seconds"].items())
        lines.append(f"fast, launched kernel by kernel: {shown}")
    for step, peaks in run.get("peak_mib", {}).items():
        shown = ", ".join(f"{v} {'no room' if mib is None else f'{mib:.0f}'}" for v, mib in peaks.items())
        lines.append(f"peak MiB at batch size {run['memory_batch_size']}, {step}: {shown}")
    for variant, seconds in run["papers_search_seconds"].items():
        lines.append(f"the paper's search, 60 epochs of CIFAR-10, {variant}: {duration(seconds)} at most")
    return "\n".join(lines)


def between_precisions(runs: list[dict[str, Any]]) -> list[str]:
    """How many times as fast as float32 bfloat16 is, of the fast supernet at the same batch size."""
    found = {(run["batch_size"], run["precision"]): run["seconds"] for run in runs}
    lines = []
    for (size, precision), seconds in found.items():
        if precision == "bf16" and (size, "fp32") in found:
            base = found[size, "fp32"]
            of = ", ".join(f"{step} {times(ratio(base[step]['fast'], t['fast']))}" for step, t in seconds.items())
            lines.append(f"fp32/bf16, fast, batch size {size}: {of}")
    return lines


@full_precision()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch_size=16, rounds=5)
    parser.add_argument("--memory-batch-size", type=int, default=64, help="on a CPU; 0: do not measure memory")
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "STEP"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    settle(options)
    device = options.device
    if options.peak:
        print(cpu_peak(*options.peak, options.batch_size[0], choose_precision(options.precision[0])))
        return
    start = time.perf_counter()
    result: dict[str, Any] = {"machine": machine(device), "runs": []}
    for precision in map(choose_precision, options.precision):
        for size in options.batch_size:
            run: dict[str, Any] = {"batch_size": size, "precision": precision.name}
            if options.memory_batch_size:
                run["memory_batch_size"] = size if device == "cuda" else options.memory_batch_size
                print(f"memory at batch size {run['memory_batch_size']} ...", flush=True)
                run["peak_mib"] = memory(run["memory_batch_size"], device, precision)
            run |= measure(size, options.rounds, device, precision)
            run["floor"] = floor(size, device, precision)
            result["runs"].append(run)
            print(report(run), flush=True)
            save(options.json, result)  # what there is, if the rest is cut off
    print("\n".join(between_precisions(result["runs"])))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    program(main)
