"""A model of anybody's, made safe to ask: it never gets an attack's own images, and is left as it was found."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from rnas.attacks.checks import answer, check_alone, check_logits
from rnas.compute.freezing import Model, frozen, unfolded
from rnas.compute.precision import full_precision


@contextmanager
def opened(model: Model, x: Tensor, y: Tensor) -> Iterator[tuple[Model, Model]]:
    """Yield `model` as it is (`compute.freezing.unfolded`) and its fast form (`frozen`), which may be the same.

    Both work on copies of the images that they are given, in full precision. Buffers of the modules that the model is
    or calls, such as running statistics, are put back in the end. RnasError unless it gives images `x` of labels `y`,
    and one of them alone, logits.
    """
    model = _without_modes(model)
    with torch.inference_mode(False), full_precision(), unfolded(model) as plain, frozen(model) as net:
        own = _on_copies(plain)

        def ask() -> None:
            check_logits(answer(own, x), y)
            check_alone(own, x, y)

        with _buffers_kept(model, ask):
            yield own, own if net is plain else _on_copies(net)


def _without_modes(model: Model) -> Model:
    """A frozen TorchScript module has neither modes nor weights that could be frozen: it is a callable like others."""
    if isinstance(model, nn.Module) and not all(hasattr(module, "training") for module in model.modules()):
        return lambda x: model(x)
    return model


def _on_copies(model: Model) -> Model:
    """`model`, which may work in place on what it is given."""
    return lambda x: model(x.clone())


@contextmanager
def _buffers_kept(model: Model, ask: Callable[[], None]) -> Iterator[None]:
    """Put back, in the end, the buffers of all modules in `model` and of those that it calls when it is asked.

    A callable hides its modules, and a module those that it keeps in a list; what they do not call at first is missed.
    """
    kept: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
    thread = threading.get_ident()

    def keep(module: nn.Module, _: object = None) -> None:
        if threading.get_ident() != thread:  # the hook hears all threads
            return
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                if (part, name) not in kept:
                    kept[part, name] = buffer, buffer.clone()

    if isinstance(model, nn.Module):
        keep(model)
    try:
        hook = register_module_forward_pre_hook(keep)
        try:
            with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():  # what is compiled takes no hook
                warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
                ask()
        finally:
            hook.remove()
        yield
    finally:
        for (part, name), (buffer, content) in kept.items():
            if getattr(part, name) is not buffer:
                setattr(part, name, buffer)
            if not torch.equal(buffer, content):
                with torch.no_grad():
                    buffer.copy_(content)
