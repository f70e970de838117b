"""A model frozen for attacks: eval mode, no weight gradients, differentiated with respect to its input only.

A frozen network is a constant function, so our own networks offer a cheaper form of themselves (`frozen_view`:
`rnas.nets.folding`, `rnas.fast.supernet`). Models of others are attacked as they are (docs/decisions/019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
def frozen(model: Model, *given: Any) -> Iterator[Model]:
    """Yield a callable equal to `model` in eval mode up to float rounding, to be differentiated for its input.

    It is `model` itself, left exactly as `unfolded` leaves it, unless it offers a cheaper form, `frozen_view`, which is
    called in eval mode and returns the callable. Weights must not change while it is frozen. `given` is what the model
    takes beside the images: the weights of a supernet's operations.
    """
    with unfolded(model) as plain:
        if hasattr(plain, "frozen_view"):
            yield plain.frozen_view(*given)
        elif given:
            yield lambda x: plain(x, *given)
        else:
            yield plain


def is_plain(value: object) -> bool:
    """Whether a module's attribute is a number, a string, None or a tuple of such: part of what the module computes."""
    return all(map(is_plain, value)) if isinstance(value, tuple) else isinstance(value, int | float | str | None)


def is_known(kind: type) -> bool:
    """Whether a module of this class is torch's or rnas's own: what it computes hangs on its tensors and plain
    attributes alone."""
    return kind.__module__.startswith(("rnas.", "torch.nn."))


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody listens to `module` itself, or changes what it computes."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
