"""Memory for time: keep a cell's inputs and outputs for the backward pass, and compute what lies between again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def buffers_kept(net: nn.Module) -> Iterator[None]:
    """Within the context a forward pass may be in training mode: BN's running statistics are put back at the end."""
    kept = [(b, b.clone()) for b in net.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def recomputed(module: nn.Module, *inputs: Tensor) -> Tensor:
    """`module(*inputs)`, of which nothing is kept inside `module` until the backward pass runs it a second time.

    With the same random numbers, and without a second update of BN's running statistics.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), buffers_kept(module)  # of the first run, and of the second

    out: Tensor = checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)
    return out
