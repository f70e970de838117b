"""The number format of a network's passes: float32 as it is, or bfloat16 by autocast.

Weights, optimisers, losses, BN's statistics and F are float32 in both (float64, if the network is).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """How networks compute. `Precision()` changes nothing, not even the type of a callable."""

    bf16: bool = False

    @property
    def name(self) -> str:
        """As the settings call it."""
        return "bf16" if self.bf16 else "fp32"

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Within the context, passes on `device` are computed in this format."""
        return torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def of(self, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`model` (images to logits), computed in this format; its logits are float32."""
        if not self.bf16:
            return model

        def passed(x: Tensor) -> Tensor:
            with self.autocast(x.device):
                return model(x).float()

        return passed


def pass_dtype(x: Tensor) -> torch.dtype:
    """The number format of activations that follow from `x`: autocast's where it is on, or else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within the context, also as a decorator, a GPU multiplies float32 as float32 and not with TF32's ten bits.

    PyTorch lets convolutions use TF32 by default. What the process had chosen comes back at the end.
    """
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value
