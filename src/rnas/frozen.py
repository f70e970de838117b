"""A model frozen for attacks: eval mode, no weight gradients, differentiated with respect to its input only.

A frozen network is a constant function, so it may be computed in a cheaper way: batch normalisation folded into the
convolution before it, equal ReLUs of one tensor computed once, depthwise convolutions whose input gradient is itself a
convolution, and on a CPU the `channels_last` layout. `torch.fx` finds the structure; a module that cannot be traced, or
that has hooks, runs as it is. The structure is kept for each module, so that a training loop pays only for new weights.
Frozen under autocast, the folded weights have its number format, and the model must be called under autocast too.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from rnas.precision import pass_dtype

M = TypeVar("M", bound=nn.Module)
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
    """Yield a callable equal to `model` in eval mode up to float rounding, cheap to differentiate for its input.

    The model is left exactly as `unfolded` leaves it. Weights must not change while it is frozen. A module that knows
    better offers `frozen_view`, which is called in eval mode and returns the callable. `given` is what the model takes
    beside the images: the weights of a supernet's operations.
    """
    with unfolded(model) as plain:
        if hasattr(plain, "frozen_view"):
            yield plain.frozen_view(*given)
        elif given:
            yield lambda x: plain(x, *given)
        elif not isinstance(plain, nn.Module):
            yield plain
        else:
            fast = _structure(plain)
            if fast is not None:
                fast.begin()
            yield plain if fast is None else fast.answering_for(plain)


_structures: WeakKeyDictionary[nn.Module, tuple[Any, _Fast | None]] = WeakKeyDictionary()


def _structure(model: nn.Module) -> _Fast | None:
    """The fast form of `model`, from memory unless the model was changed; None if it has none."""
    now = _fingerprint(model)
    kept = _structures.get(model)
    if kept is None or kept[0] != now:
        kept = _structures[model] = now, None if _has_hooks(model) else _traced(model)
    return kept[1]


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes when tracing could give another result: other modules, tensors, hooks or plain attributes."""
    parts: list[Any] = []
    for module in model.modules():
        plain = (item for item in vars(module).items() if is_plain(item[1]))
        tensors = itertools.chain(module._parameters.values(), module._buffers.values())
        children = ((name, id(child)) for name, child in module._modules.items())
        patched = id(vars(module).get("forward"))
        parts.append((id(module), is_hooked(module), patched, *children, *plain, *(id(t) for t in tensors)))
    return tuple(parts)


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


def _has_hooks(model: nn.Module) -> bool:
    return any(is_hooked(module) for module in model.modules())


# What tracing a forward that is no fixed sequence of tensor operations may raise.
UNTRACEABLE = (
    fx.proxy.TraceError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _traced(model: nn.Module) -> _Fast | None:
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    lists = [(value, list(value)) for _, before in attributes for value in before.values() if isinstance(value, list)]
    random_states = _random_states()
    try:
        graph = fx.Tracer().trace(model)
    except UNTRACEABLE:
        graph = None
    # A forward that draws random numbers or keeps what it computes is more than its graph: undo it and do without.
    pure = _same_states(random_states, _random_states())
    _set_random_states(random_states)
    for module, before in attributes:
        if vars(module).keys() != before.keys() or any(vars(module)[k] is not v for k, v in before.items()):
            vars(module).clear()
            vars(module).update(before)
            pure = False
    for kept, content in lists:
        if len(kept) != len(content) or any(a is not b for a, b in zip(kept, content, strict=True)):
            kept[:] = content
            pure = False
    return _Fast(model, graph) if graph is not None and pure else None


_States = tuple[list[Tensor], tuple[Any, ...], tuple[Any, ...]]


def _random_states() -> _States:
    """Of the generators that a forward may draw from without having one of its own: torch's, Python's and NumPy's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *cuda], random.getstate(), tuple(np.random.get_state())  # noqa: NPY002 (what others may use)


def _same_states(before: _States, after: _States) -> bool:
    (_, numbers, *place), (_, numbers_after, *place_after) = before[2], after[2]
    numpy_same = np.array_equal(numbers, numbers_after) and place == place_after
    return all(map(torch.equal, before[0], after[0])) and before[1] == after[1] and numpy_same


def _set_random_states(states: _States) -> None:
    (cpu, *cuda), python, numpy = states
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


class _Fast:
    """The fast form of a module: the traced graph with its convolutions replaced."""

    def __init__(self, model: nn.Module, graph: fx.Graph):
        self.net = fx.GraphModule(model, graph)
        self.convolutions: list[_Convolution] = []
        self.equal: bool | None = None  # to the model; not known before the first batch
        self._known = all(is_known(type(m)) and "forward" not in vars(m) for m in model.modules())
        _share_relus(self.net)
        _reshape_instead_of_view(self.net)
        for node in list(self.net.graph.nodes):
            self._replace(node)
        _relu_in_place(self.net)
        self.net.graph.eliminate_dead_code()
        self.net.recompile()

    def _replace(self, node: fx.Node) -> None:
        """Let `node`, if it is a convolution, be computed by one of ours; or, if it is BN, by those before it."""
        conv = _module(self.net, node, nn.Conv2d)
        if conv is not None and conv.padding_mode == "zeros" and isinstance(conv.padding, tuple):
            ours = _Convolution(conv)
            name = f"frozen_convolution_{len(self.convolutions)}"
            self.convolutions.append(ours)
            self.net.add_submodule(name, ours)
            node.target = name
            return
        bn = _module(self.net, node, nn.BatchNorm2d)
        if bn is None or bn.running_mean is None or not isinstance(node.args[0], fx.Node):
            return
        before = node.args[0]
        sources = _joined(before)
        found = [_module(self.net, source, _Convolution) for source in sources]
        ours_before = [conv for conv in found if conv is not None and conv.bn is None]
        alone = all(len(n.users) == 1 for n in {before, *sources})
        if len(ours_before) == len(found) and alone:
            first = 0
            for convolution in ours_before:
                convolution.absorb(bn, first)
                first += convolution.conv.out_channels
            node.replace_all_uses_with(before)

    def begin(self) -> None:
        """Be what the model is now. A foreign one may compute something else than when it was traced: its attributes
        can be functions, lists, anything. So the first batch tells again."""
        if not self._known:
            self.equal = None
        self.refresh()

    def refresh(self) -> None:
        """Fold the weights that the model has now."""
        for convolution in self.convolutions:
            convolution.fold()

    def answering_for(self, model: nn.Module) -> Model:
        """The fast form, or `model` if on the first batch their answers or gradients differ by more than rounding."""

        def answer(x: Tensor) -> Tensor:
            if self.equal is None:
                self.equal = self._equals(model, x)
            return self(x) if self.equal else model(x)

        return answer

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        return self.net(x)  # type: ignore[no-any-return]

    def _equals(self, model: nn.Module, x: Tensor) -> bool:
        x = x[:2]
        if torch.is_autocast_enabled(x.device.type):  # its rounding would pass for a difference
            with torch.autocast(x.device.type, enabled=False):
                self.refresh()
                equal = self._equals(model, x)
            self.refresh()
            return equal
        with torch.no_grad():
            wanted = model(x)
            try:
                got = self(x)
            except (RuntimeError, TypeError):  # the trace holds for other inputs only
                return False
        if not (isinstance(wanted, Tensor) and torch.allclose(got, wanted, 1e-3, 1e-3 * float(wanted.abs().max()))):
            return False
        # A trace sees neither the backward of a foreign autograd function nor where gradients are switched off.
        return self._known or _same_gradient(_input_gradient(self, x), _input_gradient(model, x))


def _input_gradient(model: Model, x: Tensor) -> Tensor | None:
    """The gradient for `x` of a sum of the logits in which each has a weight of its own; None if there is none."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        try:
            logits = model(x)
            weights = torch.arange(logits.numel(), device=x.device).cos().to(logits.dtype).view_as(logits)
            return torch.autograd.grad((logits * weights).sum(), x, allow_unused=True)[0]
        except RuntimeError:  # cut off from the images, or with a backward that fails
            return None


def _same_gradient(got: Tensor | None, wanted: Tensor | None) -> bool:
    """Up to rounding. A ReLU or a pool that flips by it may count as a difference: that costs time and no more."""
    if got is None or wanted is None:
        return got is wanted
    return bool((got - wanted).norm() <= 1e-3 * wanted.norm())


def _module(net: fx.GraphModule, node: fx.Node, kind: type[M]) -> M | None:
    """The module that `node` calls on one tensor, if it is exactly of this `kind`."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    module = net.get_submodule(str(node.target))
    return module if type(module) is kind else None


def _joined(node: fx.Node) -> list[fx.Node]:
    """The nodes that `node` joins along the channels; if it joins none, itself."""
    if node.op == "call_function" and node.target is torch.cat:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        parts = node.args[0] if node.args else ()
        if dim == 1 and isinstance(parts, list | tuple) and all(isinstance(part, fx.Node) for part in parts):
            return [part for part in parts if isinstance(part, fx.Node)]
    return [node]


def _share_relus(net: fx.GraphModule) -> None:
    """One ReLU for all that take the ReLU of the same tensor, which nothing changes in place."""
    if any(getattr(module, "inplace", False) for module in net.modules()):
        return
    if any(str(node.target).endswith("_") or node.kwargs.get("inplace") for node in net.graph.nodes):
        return
    shared: dict[fx.Node, fx.Node] = {}
    for node in list(net.graph.nodes):
        if _is_relu(net, node):
            first = shared.setdefault(node.args[0], node)
            if first is not node:
                node.replace_all_uses_with(first)
                net.graph.erase_node(node)


def _is_relu(net: fx.GraphModule, node: fx.Node) -> bool:
    plain = len(node.args) == 1 and not node.kwargs
    return plain and (node.target in (F.relu, torch.relu, "relu") or _module(net, node, nn.ReLU) is not None)


def _relu_in_place(net: fx.GraphModule) -> None:
    """A ReLU overwrites what nobody else reads: not even the backward of a convolution, a sum or a concatenation."""
    for node in net.graph.nodes:
        if not _is_relu(net, node):
            continue
        before = node.args[0]
        fresh = before.target in (operator.add, torch.add, torch.cat) or _module(net, before, _Convolution) is not None
        if fresh and len(before.users) == 1:
            node.op, node.target = "call_method", "relu_"


def _reshape_instead_of_view(net: fx.GraphModule) -> None:
    """The same values whatever the layout, where `view` refuses `channels_last`."""
    for node in net.graph.nodes:
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"


class _Convolution(nn.Module):
    """A convolution, with the channels `first`... of a BN in eval mode folded in."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        # In a tuple: the modules stay the model's, and are not ours to move or to list.
        self._origin = (conv,)
        self._bn: tuple[nn.BatchNorm2d, ...] = ()
        self.first = 0
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding = tuple(int(p) for p in conv.padding)
        # Every second pixel of a grid that is spread by two: a plain convolution of every second pixel.
        self.every_second = conv.stride == conv.dilation == (2, 2) and all(p % 2 == 0 for p in self.padding)
        if self.every_second:
            self.padding = tuple(p // 2 for p in self.padding)
            self.stride = self.dilation = (1, 1)
        reach = [d * (k - 1) - p for d, k, p in zip(self.dilation, conv.kernel_size, self.padding, strict=True)]
        self.depthwise = conv.groups == conv.in_channels == conv.out_channels > 1 and min(reach) >= 0

    @property
    def conv(self) -> nn.Conv2d:
        return self._origin[0]

    @property
    def bn(self) -> nn.BatchNorm2d | None:
        return self._bn[0] if self._bn else None

    def absorb(self, bn: nn.BatchNorm2d, first: int) -> None:
        """From now on compute the channels `first`... of `bn` too, which comes next."""
        self._bn, self.first = (bn,), first

    @torch.no_grad()
    def fold(self) -> None:
        weight, bias = self.conv.weight.detach(), self.conv.bias
        if self.bn is not None:
            channels = slice(self.first, self.first + len(weight))
            mean, var = self.bn.running_mean, self.bn.running_var
            assert mean is not None and var is not None  # noqa: PT018 (checked when it was folded)
            scale = (var[channels] + self.bn.eps).rsqrt()
            if self.bn.weight is not None:
                scale = scale * self.bn.weight[channels]
            shift = -mean[channels] if bias is None else bias - mean[channels]
            bias = shift * scale
            if self.bn.bias is not None:
                bias = bias + self.bn.bias[channels]
            weight = weight * scale.view(-1, 1, 1, 1)
        dtype = pass_dtype(weight)
        weight = weight.to(dtype)
        if weight.device.type == "cpu":
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.weight, self.bias = weight, None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.every_second:
            x = x[:, :, ::2, ::2]
        arguments = self.stride, self.padding, self.dilation
        if self.depthwise and x.device.type == "cpu":
            return _Depthwise.apply(x, self.weight, self.bias, *arguments)  # type: ignore[no-any-return,no-untyped-call]
        return F.conv2d(x, self.weight, self.bias, *arguments, groups=self.groups)


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution differentiated for its input only, by convolving with the mirrored kernel.

    PyTorch's own backward is up to twenty times slower on a CPU. Once differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = x.shape[2:], stride, padding, dilation
        return F.conv2d(x, weight, bias, stride, padding, dilation, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        size, stride, padding, dilation = ctx.geometry
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if stride != (1, 1):
            # Zeros between the pixels, and as many at the end as the strides left over of the image.
            spread = [n + 2 * p - r for n, p, r in zip(size, padding, reach, strict=True)]
            dense = torch.zeros((*grad.shape[:2], *spread), dtype=grad.dtype, device=grad.device).contiguous(
                memory_format=torch.channels_last
            )
            dense[:, :, :: stride[0], :: stride[1]] = grad
            grad = dense
        mirrored = weight.flip(2, 3).to(grad.dtype).contiguous(memory_format=torch.channels_last)
        margin = [r - p for r, p in zip(reach, padding, strict=True)]
        grad = grad.contiguous(memory_format=torch.channels_last)
        return F.conv2d(grad, mirrored, None, 1, margin, dilation, len(weight)), None, None, None, None, None
