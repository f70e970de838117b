"""The form of derived and hand-made networks for attacks: a constant function of the images, cheap to differentiate.

Batch normalisation is folded into the convolution before it, equal ReLUs of one tensor are computed once, the input
gradient of a depthwise convolution is itself a convolution, and a CPU works in the `channels_last` layout. `torch.fx`
finds the structure. It knows only what these networks are made of; models of others are attacked as they are
(docs/decisions/019).
"""

from __future__ import annotations

import operator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from rnas.compute.freezing import Model, is_hooked, is_known
from rnas.compute.precision import pass_dtype
from rnas.nets.ops import Normalize

M = TypeVar("M", bound=nn.Module)
Parts = tuple[tuple[str, nn.Module], ...]

_kept: WeakKeyDictionary[nn.Module, tuple[Parts, _Folded]] = WeakKeyDictionary()


def folded(net: nn.Module) -> Model:
    """Images to logits as `net`, in eval mode, answers them, up to rounding, with the weights that it has now.

    Under autocast the folded weights have its number format, and the form must be called under it too. `net` itself, if
    a part of it is of somebody else's making. The structure is kept, so that a training loop pays only for new weights.
    """
    parts: Parts = tuple(net.named_modules(remove_duplicate=False))[1:]
    if not all(map(_ours, (net, *(module for _, module in parts)))):
        return net
    kept = _kept.get(net)
    if kept is None or kept[0] != parts:
        kept = _kept[net] = parts, _Folded(net)
    kept[1].fold()
    return kept[1]


def _ours(module: nn.Module) -> bool:
    """Whether `module` computes what the definition of its class, one of torch's or ours, says, and nobody listens."""
    return is_known(type(module)) and not is_hooked(module) and "forward" not in vars(module)


class _Tracer(fx.Tracer):
    """Leaves every module whole that has tensors of its own: `net.to(...)` may replace these."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


class _Folded:
    """The graph of a network with its convolutions replaced."""

    def __init__(self, net: nn.Module):
        self.graph = fx.GraphModule(net, _Tracer().trace(net))
        self.convolutions: list[_Convolution] = []
        _share_relus(self.graph)
        for node in list(self.graph.graph.nodes):
            self._replace(node)
        _relu_in_place(self.graph)
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()

    def _replace(self, node: fx.Node) -> None:
        """Let `node`, if it is a convolution, be computed by one of ours; or, if it is BN, by those before it."""
        if (conv := _module(self.graph, node, nn.Conv2d)) is not None:
            ours = _Convolution(conv)
            name = f"folded_convolution_{len(self.convolutions)}"
            self.convolutions.append(ours)
            self.graph.add_submodule(name, ours)
            node.target = name
        elif (bn := _module(self.graph, node, nn.BatchNorm2d)) is not None:
            (before,) = node.all_input_nodes
            sources = _joined(before)
            found = [_module(self.graph, source, _Convolution) for source in sources]
            ours_before = [conv for conv in found if conv is not None and conv.bn is None]
            alone = all(len(n.users) == 1 for n in {before, *sources})
            if len(ours_before) == len(found) and alone:
                first = 0
                for convolution in ours_before:
                    convolution.absorb(bn, first)
                    first += convolution.conv.out_channels
                node.replace_all_uses_with(before)

    def fold(self) -> None:
        """Fold the weights that the network has now."""
        for convolution in self.convolutions:
            convolution.fold()

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        return self.graph(x)  # type: ignore[no-any-return]


def _module(net: fx.GraphModule, node: fx.Node, kind: type[M]) -> M | None:
    """The module that `node` calls on one tensor, if it is exactly of this `kind`."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    module = net.get_submodule(str(node.target))
    return module if type(module) is kind else None


def _joined(node: fx.Node) -> list[fx.Node]:
    """The nodes that `node` joins along the channels; if it joins none, itself."""
    return list(node.args[0]) if node.target is torch.cat else [node]  # type: ignore[arg-type]


def _share_relus(net: fx.GraphModule) -> None:
    """One ReLU for all that take the ReLU of the same tensor."""
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
