"""Several runs of an attack in one batch: when few images are left, a forward pass costs little more with more rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Job = TypeVar("Job")
Run = Callable[[Tensor, Sequence[Job]], tuple[Tensor, Tensor]]
"""Indices of images (n,) and k jobs to adversarial images (k·n,...) and whether these rows still stand (k·n,).

The first n rows are the first job's. A run may leave an image's other rows where they are once one of them has fallen.
"""


def row_limit(x: Tensor, most: int | None) -> int:
    """The rows to fill a batch up to, for an attack on the images `x`: no more than `most`, if the caller says so.

    On a CPU a row gets no cheaper beyond it; on a GPU it is what the caller's own batch takes, or little.
    """
    limit = 64 if x.device.type == "cpu" else max(len(x), 256)
    return limit if most is None else min(limit, most)


def survivors_only(x: Tensor, alive: Tensor, jobs: Sequence[Job], run: Run[Job], most: int | None = None) -> Tensor:
    """Each of `jobs` on each of the images `x[alive]` until one breaks it; the adversarial images (B,...).

    As many jobs go together as fill a batch of `row_limit(x, most)` rows. An image that holds becomes what
    its last job made of it.
    """
    result, limit = x.clone(), row_limit(x, most)
    jobs = list(jobs)
    while jobs and len(alive):
        batches = -(-len(jobs) // max(limit // len(alive), 1))
        size = -(-len(jobs) // batches)
        found, standing = run(alive, jobs[:size])
        broken = ~standing.view(size, -1)
        chosen = torch.where(broken.any(0), broken.int().argmax(0), size - 1)
        result[alive] = found[chosen * len(alive) + torch.arange(len(alive), device=x.device)]
        alive, jobs = alive[~broken.any(0)], jobs[size:]
    return result


def without_fallen(standing: Tensor, together: int) -> Tensor:
    """Which rows (R,) to keep: those of images none of whose `together` rows has fallen."""
    return standing.view(together, -1).all(0).repeat(together)
