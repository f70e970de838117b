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
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.projected import search_seconds
from benchmarks.search_step import ATTACK_STEPS, PASSES, VARIANTS, Steps
from benchmarks.timing import save
from rnas.precision import Precision

NONE = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view")


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not returns_view and not str(func).startswith(NONE):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def kernels(run: Callable[[], object]) -> int:
    """How many `run` launches."""
    with Kernels() as counted:
        run()
    return counted.counts.total()


def count(names: Sequence[str] = tuple(PASSES)) -> dict[str, dict[str, int]]:
    """Kernels of each of the steps `names` of each variant; the number of images does not matter."""
    steps = {variant: Steps(variant, 2, "meta", Precision()) for variant in VARIANTS}
    counts = {step: {v: kernels(s.prepare(step)) for v, s in steps.items()} for step in names}
    counts["pgd"]["fast"] += round(kernels(steps["fast"].fold) / ATTACK_STEPS)
    return counts


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
    save(options.json, {"device": "meta", "torch": torch.__version__, "kernels": counts, "papers_search": search})


if __name__ == "__main__":
    main()
