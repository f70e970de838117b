"""Networks that are not rnas's own, found again by the name of what builds them: `package.module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rnas.errors import RnasError

SEPARATOR = ":"
"""Between module and function; no name of the zoo has one."""


def is_own(arch: str) -> bool:
    """Whether `arch` names something to call, and not a network of the zoo."""
    return SEPARATOR in arch


def name_of(net: nn.Module) -> str:
    """The name of the class of `net`, which builds it anew if it needs no arguments."""
    return f"{type(net).__module__}{SEPARATOR}{type(net).__qualname__}"


def build_own(name: str) -> nn.Module:
    """The network that `name`, `package.module:function` or a class there, returns when it is called without
    arguments. Modules are found where Python finds them, and then in the working directory.

    RnasError if there is no such function, if it fails, or if it returns something else. Python's own modules and the
    running program are refused: the first build no networks, and the second is another program next time.
    """
    module, _, function = name.partition(SEPARATOR)
    if module == "__main__":
        raise RnasError(f"'{name}' is in the running program: put it into a module of its own, which can be imported")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise RnasError(f"'{name}' is in Python's own library: expected package.module:function of a network")
    try:
        with torch.random.fork_rng(devices=[]), _working_directory():
            build: Any = reduce(getattr, function.split("."), importlib.import_module(module))
            net = build()
    except Exception as e:  # foreign code may raise anything
        raise RnasError(
            f"'{name}' cannot be called ({type(e).__name__}: {e}): expected package.module:function, which returns the "
            "untrained network without being given arguments"
        ) from e
    if not isinstance(net, nn.Module):
        raise RnasError(f"'{name}' returns a {type(net).__name__}: expected a torch.nn.Module")
    check_complete(net)
    return net


def check_complete(net: nn.Module) -> None:
    """RnasError if a layer of `net` is lazy: it has no weights before it has seen images."""
    for layer, module in net.named_modules():
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise RnasError(f"layer '{layer}' of the network is lazy and has no weights yet: call it on images first")


@contextmanager
def _working_directory() -> Iterator[None]:
    """Within, modules are also looked for in the working directory, as `python -m` does; after all other places."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
