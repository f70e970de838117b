"""How many kernels each step of a search launches on a GPU, about, counted without one.

    python -m benchmarks.kernels [--json FILE]

Torch's `meta` device takes the same way through the code as a GPU and computes nothing: what is counted are the
operations that a GPU would have to launch, those of views and allocations left out, at the paper's supernet. A
convolution's backward pass counts as one; folding is spread over the 7 steps of an attack. Variants and steps are those
of `benchmarks.search_step`.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.projected import search_seconds
from benchmarks.search_step import ATTACK_STEPS, PASSES, VARIANTS, Steps
from benchmarks.timing import EPOCH, program, save
from rnas.compute.precision import Precision
from rnas.data import Split, batches
from rnas.nets.zoo import build
from rnas.training.step import weight_step

NONE = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view")


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something, by name, and the bytes that they must read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not returns_view and not str(func).startswith(NONE):
            self.counts[str(func)] += 1
            self.bytes += sum(map(in_memory, tree_leaves((args, kwargs, out))))
        return out


def in_memory(value: object) -> int:
    """The bytes of a tensor; of one whose elements lie on each other, those that there are."""
    if not isinstance(value, torch.Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def kernels(run: Callable[[], object]) -> int:
    """How many `run` launches."""
    return launched(run)[0]


def launched(run: Callable[[], object]) -> tuple[int, int]:
    """How many kernels `run` launches, and the bytes that they read and write."""
    with Kernels() as counted:
        run()
    return counted.counts.total(), counted.bytes


def count(names: Sequence[str] = tuple(PASSES)) -> dict[str, dict[str, int]]:
    """Kernels of each of the steps `names` of each variant; the number of images does not matter."""
    steps = {variant: Steps(variant, 2, "meta", Precision()) for variant in VARIANTS}
    counts = {step: {v: kernels(s.prepare(step)) for v, s in steps.items()} for step in names}
    counts["pgd"]["fast"] += round(kernels(steps["fast"].fold) / ATTACK_STEPS)
    return counts


def batch_shares(size: int, batch_size: int = 128) -> dict[str, float]:
    """What loading and augmenting a batch is of a step of the cheapest training there is, ResNet18 on clean images: of
    its kernels, and of the bytes that they move. A batch is the mean of an epoch as long as CIFAR-10's.

    A batch takes at most its launches and its bytes, one after the other, and a step at least either. So its share of
    the time is at most the sum of both, where launches cost the same, and bytes; whoever picks images is taken to read
    all there are.
    """
    meta = torch.device("meta")
    with meta:
        pixels = torch.empty(EPOCH * batch_size, 3, size, size, dtype=torch.uint8)
        x, y = torch.empty(batch_size, 3, size, size), torch.empty(batch_size, dtype=torch.long)
        split = Split(pixels, torch.empty(len(pixels), dtype=torch.long))
        net = build("ResNet18", classes=10, image_size=size)
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=3e-4)
    step = partial(weight_step, net, parameters, optimizer, None, x, y, clip=5.0)
    step()  # the optimiser's state
    of_epoch = launched(lambda: list(batches(split, batch_size, seed=0, augment=True, device=meta)))
    of_step = launched(step)
    return {what: a / EPOCH / b for what, a, b in zip(("kernels", "bytes"), of_epoch, of_step, strict=True)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    counts = count()
    print(f"{'kernels':12}" + "".join(f"{variant:>12}" for variant in VARIANTS) + f"{'fast/published':>16}")
    for step, of in counts.items():
        share = of["fast"] / of["published"]
        print(f"{step:12}" + "".join(f"{of[variant]:12,}" for variant in VARIANTS) + f"{share:16.2f}")
    search = {v: round(search_seconds({step: of[v] for step, of in counts.items()}, 128)) for v in VARIANTS}
    print("the paper's search at batch 128: " + ", ".join(f"{v} {n / 1e9:.2f} billion" for v, n in search.items()))
    shares = {size: batch_shares(size) for size in (32, 64)}
    for size, of in shares.items():
        parts = " and ".join(f"{share:.2%} of the {what}" for what, share in of.items())
        print(f"a batch of {size}x{size}, augmented: {parts} of a clean step of ResNet18")
    save(
        options.json,
        {
            "batch_shares": shares,
            "device": "meta",
            "torch": torch.__version__,
            "kernels": counts,
            "papers_search": search,
        },
    )


if __name__ == "__main__":
    program(main)
