"""The supernet, fast: `Supernet`'s parameters, state dict, outputs and gradients at a fraction of its cost.

What makes the difference (docs/speed.md has the figures): whatever depends on a node alone - its ReLU, its pools and
their BN - is computed once for the node and not once for every edge that leaves it; `none` is not computed; an edge is
one function with a lean backward (`fast_functions`), on kernels that are fast in both directions (`fast_kernels`). In
eval mode BN and α are folded into the 1x1 convolutions, and for an attack, where no weight changes, only once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rnas.nets.fast_functions import (
    Convolution,
    Kind,
    convolve,
    convolve_folded,
    normalize,
)
from rnas.nets.fast_kernels import arrange, avg_pool, per_channel
from rnas.nets.supernet import MixedOperation, Supernet, SupernetCell
from rnas.ops import FactorizedReduce
from rnas.settings import SearchSpace


class Convolving:
    """A convolutional operation of an edge, or an input's preprocessing: the modules that hold its weights."""

    def __init__(self, kind: Kind, stride: int, module: nn.Module, column: int = 0):
        self.shape = Convolution("reduce" if isinstance(module, FactorizedReduce) else kind, stride)
        self.module = module
        self.column = column
        """of α"""
        self.convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        self.bns = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]

    @property
    def tensors(self) -> list[Tensor]:
        """As `Convolution` lists them."""
        if isinstance(self.module, FactorizedReduce):
            return [_side_by_side(self.module)]
        return [_kernel_or_matrix(conv) for conv in self.convs]


def _kernel_or_matrix(conv: nn.Conv2d) -> Tensor:
    return conv.weight if conv.groups > 1 else conv.weight.flatten(1)


def _side_by_side(module: FactorizedReduce) -> Tensor:
    """The two 1x1 convolutions of a factorized reduce as one, of even and odd pixels side by side: (D,2C)."""
    even, odd = module.even.weight.flatten(1), module.odd.weight.flatten(1)
    return torch.block_diag(even, odd)  # type: ignore[no-untyped-call,no-any-return]


@dataclass(frozen=True)
class Passing:
    """An operation of an edge that passes on what its source node has: a pool, or the node itself."""

    column: int
    what: str  # "max", "avg" or "skip"
    bn: nn.BatchNorm2d | None


@dataclass(frozen=True)
class Edge:
    """One edge of a cell: its row of α, where it starts, and its operations but `none`."""

    row: int
    source: int
    convolving: list[Convolving]
    passing: list[Passing]


KINDS: dict[str, Kind] = {"sep_": "separable", "dil_": "dilated", "skip": "reduce"}


def _edge(row: int, source: int, stride: int, names: Sequence[str], modules: nn.ModuleList) -> Edge:
    convolving, passing = [], []
    for column, (name, module) in enumerate(zip(names, modules, strict=True)):
        if "pool" in name:
            passing.append(Passing(column, name[:3], cast(nn.BatchNorm2d, cast(nn.Sequential, module)[1])))
        elif isinstance(module, nn.Identity):
            passing.append(Passing(column, "skip", None))
        elif name != "none":
            convolving.append(Convolving(KINDS[name[:4]], stride, module, column))
    return Edge(row, source, convolving, passing)


class Rule(Protocol):
    """How a cell does its BN: with batch statistics, or folded into the weights."""

    def enter(self, x: Tensor, entrance: Convolving) -> Tensor:
        """A cell input after its preprocessing."""

    def pooled(self, x: Tensor, bns: Sequence[nn.BatchNorm2d]) -> Tensor:
        """What a node passes on of its pool `x`, whose copies on the edges have `bns`."""

    def mix(self, edge: Edge, x: Tensor, passed: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the edge's operations; `x` is the source after its ReLU. # Eq. 1"""


@dataclass
class BatchStatistics:
    """BN as in train mode. Collects the statistics for the running averages, which `update` brings up to date."""

    weights: Tensor  # (edges, operations)
    seen: list[tuple[Sequence[nn.BatchNorm2d], Tensor, Tensor, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._weights = [row.unbind() for row in self.weights.unbind()]

    def _see(self, bns: Sequence[nn.BatchNorm2d], mean: Tensor, var: Tensor, out: Tensor) -> None:
        self.seen.append((bns, mean, var, out.numel() // out.shape[1]))

    def enter(self, x: Tensor, entrance: Convolving) -> Tensor:
        return self._convolve([entrance], x.relu(), x.new_ones(1))

    def pooled(self, x: Tensor, bns: Sequence[nn.BatchNorm2d]) -> Tensor:
        out, mean, var = normalize(x, bns[0].eps)
        self._see(bns, mean.expand(len(bns), -1), var.expand(len(bns), -1), out)
        return out

    def mix(self, edge: Edge, x: Tensor, passed: dict[str, Tensor]) -> Tensor:
        alpha, operations = self._weights[edge.row], edge.convolving
        total = None
        if operations:
            total = self._convolve(operations, x, torch.stack([alpha[o.column] for o in operations]))
        return _add_scaled(total, [(passed[p.what], alpha[p.column]) for p in edge.passing])

    def _convolve(self, operations: Sequence[Convolving], x: Tensor, alpha: Tensor) -> Tensor:
        tensors = [t for o in operations for t in o.tensors]
        bns = [bn for o in operations for bn in o.bns]
        out, mean, var = convolve([o.shape for o in operations], x, alpha, tensors, bns[0].eps)
        self._see(bns, mean, var, out)
        return out

    @torch.no_grad()
    def update(self) -> None:
        """Let the running statistics of every BN that was seen follow, as `nn.BatchNorm2d` does."""
        bns = [bn for group, *_ in self.seen for bn in group]
        means = [row for _, mean, _, _ in self.seen for row in mean.unbind()]
        unbiased = [row for _, _, var, n in self.seen for row in (var * (n / (n - 1))).unbind()]
        momentum = cast(float, bns[0].momentum)
        torch._foreach_lerp_([cast(Tensor, bn.running_mean) for bn in bns], means, momentum)
        torch._foreach_lerp_([cast(Tensor, bn.running_var) for bn in bns], unbiased, momentum)
        torch._foreach_add_([cast(Tensor, bn.num_batches_tracked) for bn in bns], 1)


def _add_scaled(total: Tensor | None, terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    for x, scale in terms:
        total = x * scale if total is None else torch.addcmul(total, x, scale)
    assert total is not None, "an edge has an operation besides none"
    return total


class Folded:
    """BN as in eval mode, folded with α into the 1x1 convolutions. Holds while weights, α and buffers stay."""

    def __init__(self, entrances: Sequence[Convolving], edges: Sequence[Edge], weights: Tensor):
        """`weights` (edges, operations)."""
        self._entrances = {id(e): _folded_entrance(e) for e in entrances}
        self._edges = [FoldedEdge(edge, row.unbind()) for edge, row in zip(edges, weights.unbind(), strict=True)]

    def enter(self, x: Tensor, entrance: Convolving) -> Tensor:
        weight, bias = self._entrances[id(entrance)]
        return convolve_folded([entrance.shape], x.relu(), bias, [weight])

    def pooled(self, x: Tensor, bns: Sequence[nn.BatchNorm2d]) -> Tensor:
        del bns  # they are in the scales of the edges
        return x

    def mix(self, edge: Edge, x: Tensor, passed: dict[str, Tensor]) -> Tensor:
        folded = self._edges[edge.row]
        terms = [(passed[what], scale) for what, scale in folded.scales]
        if not folded.shapes:
            return _add_scaled(None, terms) + per_channel(folded.bias)
        return _add_scaled(convolve_folded(folded.shapes, x, folded.bias, folded.tensors), terms)


class FoldedEdge:
    """The constants of an edge in eval mode: what `convolve_folded` takes, and the scales of what is passed on."""

    def __init__(self, edge: Edge, alpha: Sequence[Tensor]):
        self.shapes = [o.shape for o in edge.convolving]
        self.tensors: list[Tensor] = []
        self.scales: list[tuple[str, Tensor]] = []
        bias = [alpha[0].new_zeros(1)]
        for o in edge.convolving:
            *head, weight = o.tensors
            if o.shape.kind == "separable":
                scale, shift = _scale_and_shift(o.bns[0])
                head = [head[0], head[1] * scale[:, None], shift, head[2]]
            scale, shift = (v * alpha[o.column] for v in _scale_and_shift(o.bns[-1]))
            self.tensors += [*head, weight * scale[:, None]]
            bias.append(shift)
        for p in edge.passing:
            if p.bn is None:
                self.scales.append((p.what, alpha[p.column]))
            else:
                scale, shift = (v * alpha[p.column] for v in _scale_and_shift(p.bn))
                self.scales.append((p.what, per_channel(scale)))
                bias.append(shift)
        self.bias = sum(bias[1:], bias[0])
        if not torch.is_grad_enabled():
            self.tensors = [t.detach() for t in self.tensors]  # the kernels are parameters as they are


def _folded_entrance(entrance: Convolving) -> tuple[Tensor, Tensor]:
    scale, shift = _scale_and_shift(entrance.bns[0])
    return entrance.tensors[0] * scale[:, None], shift


def _scale_and_shift(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BN with running statistics as x · scale + shift, each (C,)."""
    scale = (cast(Tensor, bn.running_var) + bn.eps).rsqrt()
    scale = scale if bn.weight is None else scale * bn.weight
    shift = -cast(Tensor, bn.running_mean) * scale
    return scale, shift if bn.bias is None else shift + bn.bias


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
        self._entrances = [Convolving("direct", 1, self.pre0), Convolving("direct", 1, self.pre1)]
        self._edges: list[Edge] = []
        for node in range(self.nodes):
            for source in range(node + 2):
                row = len(self._edges)
                modules = cast(MixedOperation, self.edges[row]).operations
                self._edges.append(_edge(row, source, self._stride(source), space.operations, modules))

    def _stride(self, source: int) -> int:
        return 2 if self.reduction and source < 2 else 1

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """`s0`, `s1`: outputs of the cell before last and the last; `weights` (edges, operations)."""
        if not self.training:
            return self.run(s0, s1, self.fold(weights))
        if self.checkpointed and torch.is_grad_enabled():
            out, rule = checkpoint(self._run_train, s0, s1, weights, use_reentrant=False)
        else:
            out, rule = self._run_train(s0, s1, weights)
        rule.update()  # out here, because a checkpoint runs the cell a second time
        return cast(Tensor, out)

    def _run_train(self, s0: Tensor, s1: Tensor, weights: Tensor) -> tuple[Tensor, BatchStatistics]:
        rule = BatchStatistics(weights)
        return self.run(s0, s1, rule), rule

    def fold(self, weights: Tensor) -> Folded:
        """The rule for eval mode."""
        return Folded(self._entrances, self._edges, weights)

    def run(self, s0: Tensor, s1: Tensor, rule: Rule) -> Tensor:
        """The cell's output; `rule` says how BN is done."""
        states = [rule.enter(s, entrance) for s, entrance in zip((s0, s1), self._entrances, strict=True)]
        left = [self._leave(0, states[0], rule), self._leave(1, states[1], rule)]
        edges = iter(self._edges)
        for node in range(2, self.nodes + 2):
            incoming = [rule.mix(next(edges), *left[source]) for source in range(node)]
            states.append(sum(incoming[1:], incoming[0]))
            if node <= self.nodes:
                left.append(self._leave(node, states[node], rule))
        return torch.cat(states[2:], dim=1)

    def _leave(self, source: int, x: Tensor, rule: Rule) -> tuple[Tensor, dict[str, Tensor]]:
        """What the edges that leave a node share: its ReLU, and what they pass on."""
        pools = [p for e in self._edges if e.source == source for p in e.passing]
        bns = {what: [cast(nn.BatchNorm2d, p.bn) for p in pools if p.what == what] for what in ("max", "avg")}
        stride = self._stride(source)
        passed = {"skip": x}
        if bns["max"]:
            passed["max"] = rule.pooled(F.max_pool2d(x, 3, stride, 1), bns["max"])
        if bns["avg"]:
            passed["avg"] = rule.pooled(avg_pool(x, stride), bns["avg"])
        return x.relu(), passed


class FastSupernet(Supernet):
    """`Supernet` in every respect but speed; on any device; differentiable once."""

    cell_type = FastCell

    def save_memory(self, on: bool = True) -> None:
        """From now on keep only the cells' outputs for the backward pass and compute the rest again, cell by cell:
        a fraction of the memory for about a third more time."""
        for cell in self.cells:
            cast(FastCell, cell).checkpointed = on

    def forward_cells(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B,classes) and the output of every cell, each (B,C_i,H_i,W_i)."""
        return super().forward_cells(arrange(x))

    @torch.no_grad()
    def frozen_view(self) -> Callable[[Tensor], Tensor]:
        """Images to logits as in eval mode, without gradients of weights; BN and α are folded here, once.

        Holds while weights, α and buffers stay as they are now. The network itself is left alone.
        """
        normal, reduce = (alpha.softmax(-1) for alpha in self.alphas)
        cells = [cast(FastCell, cell) for cell in self.cells]
        rules = [cell.fold(reduce if cell.reduction else normal) for cell in cells]
        conv, bn = cast(nn.Conv2d, self.stem[0]), cast(nn.BatchNorm2d, self.stem[1])
        scale, shift = _scale_and_shift(bn)
        stem = conv.weight * scale[:, None, None, None]
        weight, bias = self.classifier.weight.detach(), self.classifier.bias.detach()

        def view(x: Tensor) -> Tensor:
            s0 = s1 = F.conv2d(self.normalize(arrange(x)), stem, shift, conv.stride, conv.padding)
            for cell, rule in zip(cells, rules, strict=True):
                s0, s1 = s1, cell.run(s0, s1, rule)
            return F.linear(s1.mean((2, 3)), weight, bias)

        return view
