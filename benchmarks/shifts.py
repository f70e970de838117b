"""How far images should be shifted for the terms of AdvRush and DSRNA (docs/decisions/024).

    python -m benchmarks.shifts [--paper]

A small supernet, or the paper's, after 60 steps on crops of scikit-learn's two photographs, 16x16, ten parts of them as
classes. Along each gradient of a term (of 32 images, of the paper's supernet of 16) α moves by 0.3; printed is what
that does to the term on 64 others, and the cosine to the gradient in float64 with a shift that meets no kink, which is
double backward's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor

from benchmarks.timing import program
from rnas.fast.supernet import FastSupernet
from rnas.nas.engine import Engine, Halves, Slope
from rnas.nas.methods import load
from rnas.nas.methods.advrush import curvature
from rnas.nas.methods.dsrna import jacobian_norm
from rnas.nas.objectives import ImageCrossEntropy
from rnas.settings import SearchSpace

SHIFTS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
NO_KINK = 1e-8
STEP = 0.3
Term = Callable[[Engine, Tensor, Tensor, float], Slope]


def _curvature(engine: Engine, x: Tensor, y: Tensor, eps: float) -> Slope:
    return curvature(engine, ImageCrossEntropy(), x, y, list(engine.method.parameters()), 1.5, eps=eps)


def _jacobian(q: int) -> Term:
    def term(engine: Engine, x: Tensor, y: Tensor, eps: float) -> Slope:
        return jacobian_norm(engine, x, (y[:, None] + 1) % 10, list(engine.method.parameters()), q, eps)

    return term


TERMS: dict[str, tuple[str, Term]] = {
    "advrush": ("advrush", _curvature),
    "dsrna, q 2": ("dsrna", _jacobian(2)),
    "dsrna, q 1": ("dsrna", _jacobian(1)),
}


def crops(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` crops (n,3,16,16) in [0,1] and the part of the photographs that each is of."""
    photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    draws, y = np.random.default_rng(seed), np.arange(n) % 10
    x = []
    for part in y:
        row, column = draws.integers(0, 427 - 32), 128 * (part % 5) + draws.integers(0, 128 - 32)
        x.append(photographs[part // 5][row : row + 32 : 2, column : column + 32 : 2])
    return torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(y)


def engine_of(name: str, space: SearchSpace) -> Engine:
    torch.manual_seed(0)
    found = load(name)
    settings = found.settings(out=Path(), space=space, lr=0.025)
    engine = Engine(found.method(settings), None, Halves(None, None, 1, settings, torch.device("cpu")))  # type: ignore[arg-type]
    net = FastSupernet(engine.method.shape(1), 10)
    engine.method.begin(net.shape)
    net.architecture = engine.method
    engine.use(net)
    engine.begin(1)
    return engine


def trained(name: str, space: SearchSpace) -> tuple[Engine, Engine]:
    """After 60 steps; and the same in float64."""
    engine, exact = engine_of(name, space), engine_of(name, space)
    for step in range(60):
        engine.descend_weights(*crops(20, 10 + step))
    exact.net.load_state_dict(engine.net.state_dict())
    exact.net.double()
    return engine, exact


@torch.no_grad()
def moved(engine: Engine, grads: tuple[Tensor, ...]) -> None:
    length = STEP / torch.cat([g.flatten() for g in grads]).norm()
    for p, g in zip(engine.method.parameters(), grads, strict=True):
        p -= length * g


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="the paper's supernet")
    paper = parser.parse_args(arguments).paper
    space = SearchSpace() if paper else SearchSpace(cells=3, channels=8, nodes=2)
    for title, (name, term) in TERMS.items():
        engine, exact = trained(name, space)
        (x, y), others = crops(16 if paper else 32, 0), crops(64, 1)
        before = term(engine, *others, 1.0).loss
        wanted = tuple(g.float() for g in term(exact, x.double(), y, NO_KINK).grads)
        kept = [p.detach().clone() for p in engine.method.parameters()]
        for eps in (NO_KINK, *SHIFTS):
            grads = wanted if eps == NO_KINK else term(engine, x, y, eps).grads
            cosine = F.cosine_similarity(*(torch.cat([g.flatten() for g in of]) for of in (grads, wanted)), dim=0)
            moved(engine, grads)
            change = term(engine, *others, 1.0).loss / before - 1
            with torch.no_grad():
                for p, k in zip(engine.method.parameters(), kept, strict=True):
                    p.copy_(k)
            print(f"{title:11} shift {eps:<6g} term {change:+.1%}  cosine {cosine:.2f}", flush=True)


if __name__ == "__main__":
    program(main)
