"""Parameters and multiply-accumulates of a network, measured by running it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def parameters(model: nn.Module) -> int:
    """The number of the network's weights; buffers such as BN's running statistics are none."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, image_size: int | tuple[int, int] = 32, *given: Any) -> int:
    """Multiply-accumulates of the convolutions and linear layers that one image (3,H,W) runs through.

    One is a multiplication and an addition; biases, BN, activations, pooling and sums are not counted. The network is
    run once in eval mode, on a black image and what else is `given`, on its device, and left in the mode it was in.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return macs_of_pass(model, torch.zeros(1, 3, *size, device=next(model.parameters()).device), *given)


def macs_of_pass(model: nn.Module, *given: Any) -> int:
    """The same of a pass with what is `given`."""
    total = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight: Tensor = layer.get_parameter("weight")
        total += output.numel() * math.prod(weight.shape[1:])  # each output is a sum over its channel's weights

    modes = {module: module.training for module in model.modules()}
    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with torch.no_grad():
            model.eval()(*given)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return total
