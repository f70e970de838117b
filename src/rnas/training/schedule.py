"""Learning rates as functions of the epoch."""

from __future__ import annotations

import math

import torch


def cosine(start: float, epoch: float, epochs: int, end: float = 0.0) -> float:
    """The learning rate of `epoch` (from 1, parts of one too) on a cosine from `start` to `end`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
