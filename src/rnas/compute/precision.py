"""The number format of a network's passes: float32 that is float32 (no TF32), or bfloat16 by autocast.

Weights, optimisers, losses, BN's statistics and F are float32 in both (float64, if the network is).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


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

    def of(self, model: Callable[P, Tensor]) -> Callable[P, Tensor]:
        """`model` (images, and what else it takes, to logits), computed in this format; its logits are float32."""
        if not self.bf16:
            return model

        def passed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            with self.autocast(args[0].device):  # type: ignore[attr-defined]
                return model(*args, **kwargs).float()

        return passed


def pass_dtype(x: Tensor) -> torch.dtype:
    """The number format of activations that follow from `x`: autocast's where it is on, or else that of `x`."""
    kind = x.device.type
    casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casting else x.dtype


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Within the context new tensors are float32, whatever `torch.set_default_dtype` made of them. For rnas's own
    networks: what a foreign model makes follows its host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Where torch keeps precisions, parents before children: a child that says "none" does as its parent does. The public
# attributes (`torch.backends.cudnn.conv.fp32_precision`, …) read the same table, but they answer for the parent too,
# and assigning to the one of mkldnn changes that of all backends.
PLACES = (
    ("generic", "all"),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
)


@contextmanager
def full_precision() -> Iterator[None]:
    """Within, float32 is computed in float32 on every device; what was set through either of torch's APIs comes back.

    torch has two (its "Numerical accuracy" notes): `fp32_precision`, and the older `allow_tf32` and
    `set_float32_matmul_precision`. It keeps what was set through the older one beside the table of the newer one, and
    raises where somebody asks the older one and the two disagree: compiled models ask. So both are set, and agree.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        table = {place: _take(*place) for place in PLACES}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the older API is deprecated is no news for the caller
            matmul, cudnn = torch.get_float32_matmul_precision(), _older_cudnn_flag()
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.set_float32_matmul_precision(matmul)
                torch.backends.cudnn.allow_tf32 = cudnn
            for place, precision in table.items():
                torch._C._set_fp32_precision_setter(*place, precision)


def _take(backend: str, op: str) -> str:
    """What is set at a place whose parents say nothing; nothing from now on."""
    precision = torch._C._get_fp32_precision_getter(backend, op)
    torch._C._set_fp32_precision_setter(backend, op, "none")
    return precision


def _older_cudnn_flag() -> bool:
    """What was last set by `torch.backends.cudnn.allow_tf32`, once the table is empty: then torch raises if True."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return True


FP32 = Precision()
