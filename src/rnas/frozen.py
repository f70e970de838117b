"""A model frozen for attacks: eval mode, no weight gradients, differentiated with respect to its input only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]
"""Images (B,3,H,W) in [0,1] to logits (B,classes)."""


@contextmanager
def unfolded(model: Model) -> Iterator[Model]:
    """Yield `model` itself, in eval mode, its weights taking no gradient: the definition that `frozen` equals.

    The model is left exactly as it was found, after exceptions too: the training flag of every module, `requires_grad`
    and `.grad` of every parameter, the buffers. A plain callable is yielded as it is.
    """
    if not isinstance(model, nn.Module):
        yield model
        return
    training = [module for module in model.modules() if module.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for module in training:
            module.training = False
        for p in trainable:
            p.requires_grad_(False)
        yield model
    finally:
        for module in training:
            module.training = True
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def frozen(model: Model) -> Iterator[Model]:
    """Yield a callable equal to `model` in eval mode, whose weights take no gradient."""
    with unfolded(model) as plain:
        yield plain
