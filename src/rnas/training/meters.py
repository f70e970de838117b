"""Mean loss and accuracy of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor


class Running:
    """Mean loss and accuracy of an epoch, summed on the device; a host reads them at the end only."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)  # loss, correct, images
        self.batches = 0

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Count one batch: its mean loss, its logits (B,classes) and labels (B,)."""
        correct = (logits.detach().argmax(1) == y).sum()
        images = torch.full_like(self.sums[0], len(y))
        self.batches += 1
        self.sums += torch.stack([loss.detach() * images, correct.double(), images])

    @property
    def loss(self) -> float:
        return float(self.sums[0] / self.sums[2])

    @property
    def accuracy(self) -> float:
        return float(self.sums[1] / self.sums[2])
