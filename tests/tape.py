"""A recording of what torch computes, operation by operation, to be computed again in the same memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Tape(TorchDispatchMode):
    """Every operation of torch, in order, with the tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.entries.append(tree_map(in_place, (func, args, kwargs or {}, result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.entries:
            aliases = [r.alias_info for r in func._schema.returns]
            if any(a is not None and not a.is_write for a in aliases):
                continue  # a view of memory that is filled already
            again = func(*args, **kwargs)
            if not any(aliases):
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    old.copy_(new)


def in_place(value: Any) -> Any:
    """A tensor's memory as it lies now, wherever its owner may move it."""
    return value.detach() if isinstance(value, Tensor) else value


def tensors(result: Any) -> list[Tensor]:
    return [r for r in (result if isinstance(result, tuple | list) else [result]) if isinstance(r, Tensor)]
