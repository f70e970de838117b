"""What the paper's runs would cost, from measured steps: a search on CIFAR-10, and the training of what it found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rnas.nas.methods.rnas import Settings as Search
from rnas.nas.projection import ROUND
from rnas.settings import Train

IMAGES = 50_000  # of CIFAR-10's training set
PAPERS_SEARCH = Search(out=Path())
PAPERS_TRAINING = Train(arch="RNAS-L", out=Path())


def search_seconds(
    step: Mapping[str, float], batch_size: int, settings: Search = PAPERS_SEARCH, images: int = IMAGES
) -> float:
    """Seconds of a whole search (Algorithm 1), from those of one `pgd`, `weight`, `alpha` and `projection` step each.

    At most: as if every projection made all its steps, and measuring on a batch cost an attack and a projection step.
    Optimisers, data and checkpoints are not counted.
    """
    settings = replace(settings, batch_size=batch_size)
    iterations = images // 2 // batch_size
    first = max(1, iterations // 2)
    projections = settings.projection_steps or max(1, iterations - first)
    warmup = settings.epochs // 4 if settings.warmup is None else settings.warmup
    attack = settings.perturbation.attack_steps * step["pgd"]
    weights, architecture = attack + step["weight"], attack + step["alpha"]
    measuring = math.ceil(settings.monitor / batch_size) * (attack + step["projection"])
    projecting = projections * step["projection"] + math.ceil(projections / ROUND) * attack
    measured = 1 + math.ceil(projections / max(2 * ROUND, projections // 6))  # before, meanwhile, at the end
    warming = iterations * weights + 2 * measuring
    searching = first * (weights + architecture) + projecting + (2 + measured) * measuring
    return warmup * warming + (settings.epochs - warmup) * searching


def training_seconds(step: float, batch_size: int, settings: Train = PAPERS_TRAINING, images: int = IMAGES) -> float:
    """Seconds of a whole training, from those of one step with its attack."""
    return settings.epochs * (images // batch_size) * step


def duration(seconds: float) -> str:
    """Hours, or days where those are many."""
    hours = seconds / 3600
    return f"{hours:.2g} hours" if hours < 100 else f"{hours / 24:,.0f} days"
