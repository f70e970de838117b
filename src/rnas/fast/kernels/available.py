"""Whether kernels in Triton can be used: it comes with torch for GPUs on Linux, and wants a C compiler."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch


def triton_works(device: torch.device) -> bool:
    """Whether kernels in Triton compute on `device`. `RNAS_TRITON=0` in the environment says no."""
    real = device.type == "cuda" and (torch.version.cuda or torch.version.hip)
    return bool(real) and os.environ.get("RNAS_TRITON") != "0" and _tried(device)


@cache
def _tried(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return False  # not in bfloat16
    try:
        from rnas.fast.kernels import stencils as triton_stencils

        x = torch.ones(1, 1, 2, 2, device=device)
        stencil = triton_stencils.Stencil(torch.ones(1, 1, 3, 3, device=device))
        with torch.cuda.device(device):
            return bool((triton_stencils.convolve(x, stencil, x[:, None].clone()) == 4).all())
    except Exception as error:  # noqa: BLE001  (a missing compiler, a driver too old: of many types)
        why = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"Triton does not work here ({why}): the supernet goes on without", RuntimeWarning, stacklevel=2)
        return False
