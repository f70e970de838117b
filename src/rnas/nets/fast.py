"""The supernet, fast: `Supernet`'s parameters, state dict, outputs and gradients at a fraction of its cost.

What makes the difference (docs/speed.md has the figures): whatever depends on a node alone - its ReLU, its pools and
their BN - is computed once for the node and not once for every edge that leaves it; `none` is not computed; BN, α and
the sum over edges are one step; every piece has a lean backward of its own (`fast_functions`) on kernels that are fast
in both directions (`fast_kernels`). In eval mode BN and α are folded into the 1x1 convolutions, for a whole attack at
once where the weights are frozen (`FastSupernet.frozen_view`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rnas.nets.fast_functions import (
    depthwise_bank,
    middle,
    middle_normalized,
    normalize,
    pointwise_normalize,
    pointwise_sum,
    weighted_sum,
)
from rnas.nets.fast_kernels import arrange, avg_pool, per_channel
from rnas.nets.supernet import MixedOperation, Supernet, SupernetCell
from rnas.ops import FactorizedReduce
from rnas.settings import SearchSpace

Kind = Literal["separable", "dilated", "reduce", "max", "avg", "identity"]


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation on one edge: which, and the modules that hold its weights."""

    kind: Kind
    edge: int
    column: int
    module: nn.Module

    @property
    def convolves(self) -> bool:
        """Whether it ends in a 1x1 convolution and BN; the others merely pass on what their source shares."""
        return self.kind in ("separable", "dilated", "reduce")

    @property
    def kernel(self) -> Tensor:
        """The first depthwise kernel (C,1,k,k)."""
        return _conv(self.module, 1).weight

    @property
    def middle(self) -> tuple[Tensor, nn.BatchNorm2d, Tensor]:
        """Of a separable convolution: the first 1x1 weight (C,C), its BN, the second depthwise kernel."""
        return _conv(self.module, 2).weight.flatten(1), _bn(self.module, 3), _conv(self.module, 5).weight

    @property
    def last(self) -> Tensor:
        """The last 1x1 weight."""
        if isinstance(self.module, FactorizedReduce):
            return _side_by_side(self.module)
        return _conv(self.module, -2).weight.flatten(1)

    @property
    def bn(self) -> nn.BatchNorm2d:
        """The last BN."""
        return self.module.bn if isinstance(self.module, FactorizedReduce) else _bn(self.module, -1)


def _conv(module: nn.Module, i: int) -> nn.Conv2d:
    return cast(nn.Conv2d, cast(nn.Sequential, module)[i])


def _bn(module: nn.Module, i: int) -> nn.BatchNorm2d:
    return cast(nn.BatchNorm2d, cast(nn.Sequential, module)[i])


def _side_by_side(module: FactorizedReduce) -> Tensor:
    """The two 1x1 convolutions of a factorized reduce as one, of `_even_and_odd`: (D,2C)."""
    return torch.block_diag(module.even.weight.flatten(1), module.odd.weight.flatten(1))  # type: ignore[no-untyped-call,no-any-return]


def _even_and_odd(x: Tensor) -> Tensor:
    """ReLU, then the even and the odd pixels side by side: (B,C,H,W) to (B,2C,H/2,W/2)."""
    x = x.relu()
    return torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], dim=1)


def _kind(name: str, module: nn.Module) -> Kind:
    if name == "skip_connect":
        return "identity" if isinstance(module, nn.Identity) else "reduce"
    kinds: dict[str, Kind] = {"sep": "separable", "dil": "dilated", "max": "max", "avg": "avg"}
    return kinds[name[:3]]


class Rule(Protocol):
    """How a cell's BN is done: with batch statistics, or folded into the weights."""

    def enter(self, x: Tensor, pre: nn.Module) -> Tensor: ...
    def middle(self, x: Tensor, operation: Operation) -> Tensor: ...
    def pooled(self, x: Tensor, operations: Sequence[Operation]) -> Tensor: ...
    def join(self, node: int, terms: Sequence[tuple[Operation, Tensor]]) -> Tensor: ...


def _entrance(x: Tensor, pre: nn.Module) -> tuple[Tensor, Tensor, nn.BatchNorm2d]:
    """A cell's preprocessing of an input as (what the 1x1 convolution sees, its weight, its BN)."""
    if isinstance(pre, FactorizedReduce):
        return _even_and_odd(x), _side_by_side(pre), pre.bn
    return x.relu(), _conv(pre, 1).weight.flatten(1), _bn(pre, 2)


@dataclass
class BatchStatistics:
    """BN as in train mode. Collects the statistics for the running averages, which `update` brings up to date."""

    weights: Tensor  # (edges, operations)
    seen: list[tuple[nn.BatchNorm2d, Tensor, Tensor, int]] = field(default_factory=list)

    def _see(self, bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, like: Tensor) -> None:
        self.seen.append((bn, mean, var, like.numel() // like.shape[1]))

    def enter(self, x: Tensor, pre: nn.Module) -> Tensor:
        x, weight, bn = _entrance(x, pre)
        out, mean, var = pointwise_normalize(x, weight, bn.eps)
        self._see(bn, mean, var, out)
        return out

    def middle(self, x: Tensor, operation: Operation) -> Tensor:
        weight, bn, kernel = operation.middle
        out, mean, var = middle_normalized(x, weight, kernel, bn.eps)
        self._see(bn, mean, var, out)
        return out

    def pooled(self, x: Tensor, operations: Sequence[Operation]) -> Tensor:
        out, mean, var = normalize(x, operations[0].bn.eps)
        for operation in operations:
            self._see(operation.bn, mean, var, out)
        return out

    def join(self, node: int, terms: Sequence[tuple[Operation, Tensor]]) -> Tensor:
        del node
        convolved = [(o, x) for o, x in terms if o.convolves]
        ready = [(o, x) for o, x in terms if not o.convolves]
        total = None
        if convolved:
            operations, xs = zip(*convolved, strict=True)
            alpha = self.weights[[o.edge for o in operations], [o.column for o in operations]]
            total, means, variances = weighted_sum(alpha, xs, [o.last for o in operations], operations[0].bn.eps)
            for operation, mean, var in zip(operations, means.unbind(), variances.unbind(), strict=True):
                self._see(operation.bn, mean, var, total)
        alphas = self.weights[[o.edge for o, _ in ready], [o.column for o, _ in ready]].unbind() if ready else ()
        return _add_scaled(total, [x for _, x in ready], alphas)

    @torch.no_grad()
    def update(self) -> None:
        """Let the running statistics of every BN that was seen follow, as `nn.BatchNorm2d` does."""
        bns, means, variances, counts = zip(*self.seen, strict=True)
        momentum = bns[0].momentum
        unbiased = torch._foreach_mul(variances, [n / (n - 1) for n in counts])
        torch._foreach_lerp_([bn.running_mean for bn in bns], means, momentum)
        torch._foreach_lerp_([bn.running_var for bn in bns], unbiased, momentum)
        torch._foreach_add_([bn.num_batches_tracked for bn in bns], 1)


def _add_scaled(total: Tensor | None, xs: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    for x, scale in zip(xs, scales, strict=True):
        total = x * scale if total is None else torch.addcmul(total, x, scale)
    assert total is not None, "a search space has an operation besides none"
    return total


class Folded:
    """BN as in eval mode, folded with α into the 1x1 convolutions. Holds as long as weights and α do not change."""

    def __init__(self, pre: Sequence[nn.Module], operations: Sequence[Sequence[Operation]], weights: Tensor):
        """`operations`: those that enter each node; `weights` (edges, operations)."""
        entrances = [_weight_and_bn(p) for p in pre]
        self._enter = {id(p): _fold([w], [bn])[0] for p, (w, bn) in zip(pre, entrances, strict=True)}
        self._middle: dict[Operation, tuple[Tensor, Tensor]] = {}
        self._last: dict[Operation, Tensor] = {}
        self._scale: dict[Operation, Tensor] = {}
        self._bias: list[Tensor] = []
        for entering in operations:
            self._fold_node(entering, weights)

    def _fold_node(self, entering: Sequence[Operation], weights: Tensor) -> None:
        separable = [o for o in entering if o.kind == "separable"]
        if separable:
            first = _fold([o.middle[0] for o in separable], [o.middle[1] for o in separable])
            self._middle |= dict(zip(separable, first, strict=True))
        bias = []
        for kinds in (("separable", "dilated"), ("reduce",)):
            group = [o for o in entering if o.kind in kinds]
            if group:
                alpha = weights[[o.edge for o in group], [o.column for o in group]]
                folded = _fold([o.last for o in group], [o.bn for o in group], alpha)
                self._last |= {o: w for o, (w, _) in zip(group, folded, strict=True)}
                bias += [b for _, b in folded]
        for o in entering:
            if o.kind in ("max", "avg"):
                scale, shift = _scale_and_shift([o.bn])
                self._scale[o] = per_channel(scale[0] * weights[o.edge, o.column])
                bias.append(shift[0] * weights[o.edge, o.column])
            elif o.kind == "identity":
                self._scale[o] = weights[o.edge, o.column]
        self._bias.append(torch.stack(bias).sum(0) if bias else weights.new_zeros(1))

    def enter(self, x: Tensor, pre: nn.Module) -> Tensor:
        weight, bias = self._enter[id(pre)]
        return pointwise_sum(bias, [_entrance(x, pre)[0]], [weight])

    def middle(self, x: Tensor, operation: Operation) -> Tensor:
        return middle(x, *self._middle[operation], operation.middle[2])

    def pooled(self, x: Tensor, operations: Sequence[Operation]) -> Tensor:
        del operations
        return x

    def join(self, node: int, terms: Sequence[tuple[Operation, Tensor]]) -> Tensor:
        convolved = [(o, x) for o, x in terms if o.convolves]
        ready = [(o, x) for o, x in terms if not o.convolves]
        bias = self._bias[node]
        total = None
        if convolved:
            total = pointwise_sum(bias, [x for _, x in convolved], [self._last[o] for o, _ in convolved])
        total = _add_scaled(total, [x for _, x in ready], [self._scale[o] for o, _ in ready])
        return total if convolved else total + per_channel(bias)


def _weight_and_bn(pre: nn.Module) -> tuple[Tensor, nn.BatchNorm2d]:
    if isinstance(pre, FactorizedReduce):
        return _side_by_side(pre), pre.bn
    return _conv(pre, 1).weight.flatten(1), _bn(pre, 2)


def _scale_and_shift(bns: Sequence[nn.BatchNorm2d]) -> tuple[Tensor, Tensor]:
    """BN with running statistics as x · scale + shift, each (len(bns),C)."""
    mean = torch.stack([cast(Tensor, bn.running_mean) for bn in bns])
    scale = (torch.stack([cast(Tensor, bn.running_var) for bn in bns]) + bns[0].eps).rsqrt()
    return scale, -mean * scale


def _fold(
    weights: Sequence[Tensor], bns: Sequence[nn.BatchNorm2d], alpha: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """For each 1x1 weight (D,C) and its BN: the weight and bias of the two together, times its `alpha`."""
    scale, shift = _scale_and_shift(bns)
    if alpha is not None:
        scale, shift = scale * alpha[:, None], shift * alpha[:, None]
    return list(zip((torch.stack(list(weights)) * scale[:, :, None]).unbind(), shift.unbind(), strict=True))


class FastCell(SupernetCell):
    """`SupernetCell`, computed node by node."""

    checkpointed = False

    def __init__(
        self,
        space: SearchSpace,
        c_before: int,
        c_last: int,
        channels: int,
        reduction: bool,
        after_reduction: bool,
    ):
        super().__init__(space, c_before, c_last, channels, reduction, after_reduction)
        self._entering: list[list[Operation]] = []
        self._leaving: list[list[Operation]] = [[] for _ in range(self.nodes + 1)]
        edge = 0
        for node in range(self.nodes):
            self._entering.append([])
            for source in range(node + 2):
                modules = cast(MixedOperation, self.edges[edge]).operations
                for column, (name, module) in enumerate(zip(space.operations, modules, strict=True)):
                    if name != "none":
                        operation = Operation(_kind(name, module), edge, column, module)
                        self._entering[node].append(operation)
                        self._leaving[source].append(operation)
                edge += 1

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        if not self.training:
            return self.run(s0, s1, self.fold(weights))
        if self.checkpointed and torch.is_grad_enabled():
            out, rule = checkpoint(self._run_train, s0, s1, weights, use_reentrant=False)
        else:
            out, rule = self._run_train(s0, s1, weights)
        rule.update()
        return cast(Tensor, out)

    def _run_train(self, s0: Tensor, s1: Tensor, weights: Tensor) -> tuple[Tensor, BatchStatistics]:
        rule = BatchStatistics(weights)
        return self.run(s0, s1, rule), rule

    def fold(self, weights: Tensor) -> Folded:
        """The cell's weights in eval mode for `run`."""
        return Folded([self.pre0, self.pre1], self._entering, weights)

    def run(self, s0: Tensor, s1: Tensor, rule: Rule) -> Tensor:
        """The cell's output; `rule` says how BN is done."""
        states = [rule.enter(s0, self.pre0), rule.enter(s1, self.pre1)]
        terms: dict[Operation, Tensor] = {}
        for node, entering in enumerate(self._entering):
            for source in (0, 1) if node == 0 else (node + 1,):
                terms |= self._leave(states[source], source, rule)
            states.append(rule.join(node, [(o, terms.pop(o)) for o in entering]))
        return torch.cat(states[2:], dim=1)

    def _leave(self, x: Tensor, source: int, rule: Rule) -> dict[Operation, Tensor]:
        """What every operation that leaves a node makes of it, up to the last 1x1 convolution."""
        stride = 2 if self.reduction and source < 2 else 1
        leaving = self._leaving[source]
        of: dict[Kind, list[Operation]] = {}
        for operation in leaving:
            of.setdefault(operation.kind, []).append(operation)
        convolved = [o for o in leaving if o.kind in ("separable", "dilated")]
        shapes = [(stride, 1 if o.kind == "separable" else 2) for o in convolved]
        outputs = depthwise_bank(x, shapes, [o.kernel for o in convolved])
        terms = {
            o: rule.middle(out, o) if o.kind == "separable" else out for o, out in zip(convolved, outputs, strict=True)
        }
        if "max" in of:
            terms |= dict.fromkeys(of["max"], rule.pooled(F.max_pool2d(x, 3, stride, 1), of["max"]))
        if "avg" in of:
            terms |= dict.fromkeys(of["avg"], rule.pooled(avg_pool(x, stride), of["avg"]))
        if "identity" in of:
            terms |= dict.fromkeys(of["identity"], x)
        if "reduce" in of:
            terms |= dict.fromkeys(of["reduce"], _even_and_odd(x))
        return terms


class FastSupernet(Supernet):
    """`Supernet` in every respect but speed. Works on any device; differentiable once.

    `memory_saving`: keep only the outputs of cells for the backward pass and compute the rest again, cell by cell:
    a fraction of the memory for a third more time.
    """

    cell_type = FastCell

    @property
    def memory_saving(self) -> bool:
        return any(cast(FastCell, cell).checkpointed for cell in self.cells)

    @memory_saving.setter
    def memory_saving(self, on: bool) -> None:
        for cell in self.cells:
            cast(FastCell, cell).checkpointed = on

    def forward_cells(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B,classes) and the output of every cell, each (B,C_i,H_i,W_i)."""
        return super().forward_cells(arrange(x))

    def frozen_view(self) -> Callable[[Tensor], Tensor]:
        """Images to logits in eval mode, for as long as no weight, α or buffer changes: everything is folded once."""
        with torch.no_grad():
            normal, reduce = (alpha.softmax(-1) for alpha in self.alphas)
            cells = [cast(FastCell, cell) for cell in self.cells]
            rules = [cell.fold(reduce if cell.reduction else normal) for cell in cells]
            conv, bn = _conv(self.stem, 0), _bn(self.stem, 1)
            scale, shift = (v[0] for v in _scale_and_shift([bn]))
            scale, shift = scale * bn.weight, shift * bn.weight + bn.bias
            weight = conv.weight * scale[:, None, None, None]

        def view(x: Tensor) -> Tensor:
            s0 = s1 = F.conv2d(self.normalize(arrange(x)), weight, shift, conv.stride, conv.padding)
            for cell, rule in zip(cells, rules, strict=True):
                s0, s1 = s1, cell.run(s0, s1, rule)
            return cast(Tensor, self.classifier(s1.mean((2, 3))))

        return view
