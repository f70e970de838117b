"""The supernet, fast: `Supernet`'s parameters, state dict, outputs and gradients at a fraction of its cost.

What makes the difference (docs/speed.md has the figures): whatever depends on a node alone - its ReLU, its pools and
their BN - is computed once for the node and not once for every edge that leaves it; `none` is not computed; all that
leaves a node is one function with a lean backward (`fast_functions`), on kernels that are fast in both directions
(`fast_kernels`). In eval mode BN and α are folded into the 1x1 convolutions, and for an attack, where no weight
changes, only once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rnas.nets.fast_functions import Convolution, Kind, Leaving, mix, mix_folded, normalize
from rnas.nets.fast_kernels import arrange, avg_pool
from rnas.nets.supernet import MixedOperation, Supernet, SupernetCell
from rnas.ops import FactorizedReduce
from rnas.precision import pass_dtype
from rnas.settings import SearchSpace

KINDS: dict[str, Kind] = {"sep_": "separable", "dil_": "dilated", "skip": "reduce"}


class Convolving:
    """A convolutional operation of an edge, or an input's preprocessing: the modules that hold its weights."""

    def __init__(self, kind: Kind, stride: int, module: nn.Module):
        self.shape = Convolution("reduce" if isinstance(module, FactorizedReduce) else kind, stride)
        self.module = module
        self.convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        self.bns = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]

    def tensors(self) -> list[Tensor]:
        """Kernels and 1x1 weights, as `Convolution` lists them."""
        if isinstance(self.module, FactorizedReduce):
            even, odd = (conv.weight.flatten(1) for conv in self.convs)
            return [torch.block_diag(even, odd)]  # type: ignore[no-untyped-call]
        return [conv.weight if conv.groups > 1 else conv.weight.flatten(1) for conv in self.convs]

    def folded(self, alpha: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """The same with BN's scales and `alpha` in the 1x1 weights and the middle BN's shift; and the last one's."""
        tensors = self.tensors()
        scale, shift = _scale_and_shift(self.bns[-1])
        if alpha is not None:
            scale, shift = scale * alpha, shift * alpha
        tensors[-1] = tensors[-1] * scale[:, None]
        if self.shape.kind == "separable":
            middle_scale, middle_shift = _scale_and_shift(self.bns[0])
            tensors[1:2] = [tensors[1] * middle_scale[:, None], middle_shift]
        # A kernel is the parameter itself: constant too, where nothing is to be differentiated.
        return (tensors if torch.is_grad_enabled() else [t.detach() for t in tensors]), shift


def _scale_and_shift(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BN with running statistics as x · scale + shift, each (C,)."""
    scale = (cast(Tensor, bn.running_var) + bn.eps).rsqrt()
    scale = scale if bn.weight is None else scale * bn.weight
    shift = -cast(Tensor, bn.running_mean) * scale
    return scale, shift if bn.bias is None else shift + bn.bias


class Source:
    """All that leaves a node of a cell: the operations on its edges, and the pools that they share."""

    def __init__(self, stride: int, names: Sequence[str], rows: Sequence[int], edges: Sequence[nn.ModuleList]):
        """`rows` of α and operations, named `names`, of each edge."""
        self.stride = stride
        self.rows = list(rows)
        columns = [k for k, name in enumerate(names) if name != "none"]
        pools = [k for k in columns if "pool" in names[k]]
        skips = [k for k in columns if isinstance(edges[0][k], nn.Identity)]
        convolving = [k for k in columns if k not in pools and k not in skips]
        self.pool_names = [names[k] for k in pools]
        self.pool_bns = [[cast(nn.BatchNorm2d, _layers(modules[k])[1]) for modules in edges] for k in pools]
        self.operations = [
            [Convolving(KINDS[names[k][:4]], stride, modules[k]) for k in convolving] for modules in edges
        ]
        self.plan = Leaving(
            edges=len(edges),
            shapes=tuple(o.shape for o in self.operations[0]),
            columns=tuple(convolving),
            passed=(*((0, k) for k in skips), *((1 + i, k) for i, k in enumerate(pools))),
        )

    def pools(self, x: Tensor) -> list[Tensor]:
        """The pools of node `x`, without their BN."""
        return [
            F.max_pool2d(x, 3, self.stride, 1) if name.startswith("max") else avg_pool(x, self.stride)
            for name in self.pool_names
        ]


def _layers(module: nn.Module) -> nn.Sequential:
    return cast(nn.Sequential, module)


class Rule(Protocol):
    """How a cell does its BN: with batch statistics, or folded into the weights."""

    def enter(self, x: Tensor, entrance: Convolving) -> Tensor:
        """A cell input after its preprocessing."""

    def leave(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        """What each edge that leaves node `x` brings to its end. # Eq. 1"""


class BatchStatistics:
    """BN as in train mode. Collects the statistics for the running averages, which `update` brings up to date."""

    def __init__(self, weights: Tensor):
        """`weights` (edges, operations)."""
        self.rows = weights.unbind()
        self._seen: list[tuple[nn.BatchNorm2d, Tensor, Tensor, float]] = []

    def _see(self, bns: Sequence[nn.BatchNorm2d], statistics: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> None:
        n = out.numel() // out.shape[1]
        self._seen += [(bn, mean, var, n / (n - 1)) for bn, (mean, var) in zip(bns, statistics, strict=True)]

    def enter(self, x: Tensor, entrance: Convolving) -> Tensor:
        plan = Leaving(1, (entrance.shape,), (0,), ())
        (out,), statistics = mix(plan, x.new_ones(1, 1), [x], entrance.tensors(), entrance.bns[0].eps)
        self._see(entrance.bns, statistics, out)
        return out

    def leave(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        nodes = [x]
        for pool, bns in zip(source.pools(x), source.pool_bns, strict=True):
            out, mean, var = normalize(pool, bns[0].eps)
            self._see(bns, [(mean, var)] * len(bns), out)
            nodes.append(out)
        operations = [o for edge in source.operations for o in edge]
        tensors = [t for o in operations for t in o.tensors()]
        bns = [bn for o in operations for bn in o.bns]
        eps = bns[0].eps if bns else 0.0
        weights = torch.stack([self.rows[row] for row in source.rows])  # an index would have to go to the device
        outputs, statistics = mix(source.plan, weights, nodes, tensors, eps)
        self._see(bns, statistics, outputs[0])
        return outputs

    @torch.no_grad()
    def update(self) -> None:
        """Let the running statistics of every BN that was seen follow, as `nn.BatchNorm2d` does."""
        bns, means, variances, unbiased = zip(*self._seen, strict=True)
        momentum = cast(float, bns[0].momentum)
        variances = torch._foreach_mul(variances, unbiased)
        torch._foreach_lerp_([cast(Tensor, bn.running_mean) for bn in bns], means, momentum)
        torch._foreach_lerp_([cast(Tensor, bn.running_var) for bn in bns], variances, momentum)
        torch._foreach_add_([cast(Tensor, bn.num_batches_tracked) for bn in bns], 1)


class Folded:
    """BN as in eval mode, folded with α into the 1x1 convolutions. Holds while weights, α and buffers stay."""

    def __init__(self, entrances: Sequence[Convolving], sources: Sequence[Source], weights: Tensor):
        """`weights` (edges, operations)."""
        alpha = [row.unbind() for row in weights.unbind()]
        dtype = pass_dtype(weights)  # once for all the passes of an attack
        self._entrances = {id(e): _converted(*e.folded(), dtype) for e in entrances}
        self._sources = {id(s): _folded_source(s, [alpha[row] for row in s.rows], dtype) for s in sources}

    def enter(self, x: Tensor, entrance: Convolving) -> Tensor:
        tensors, bias = self._entrances[id(entrance)]
        return mix_folded(Leaving(1, (entrance.shape,), (0,), ()), [x], [bias], tensors)[0]

    def leave(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        return mix_folded(source.plan, [x, *source.pools(x)], *self._sources[id(source)])


def _converted(tensors: list[Tensor], bias: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    return [t.to(dtype) for t in tensors], bias.to(dtype)


def _folded_source(
    source: Source, alpha: Sequence[Sequence[Tensor]], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """The affine constants and the tensors of `mix_folded`; `alpha`: the row of each edge."""
    affine: list[Tensor] = []
    tensors: list[Tensor] = []
    for edge, row in enumerate(alpha):
        bias = row[0].new_zeros(1)
        scales = []
        for operation, column in zip(source.operations[edge], source.plan.columns, strict=True):
            own, shift = operation.folded(row[column])
            tensors += own
            bias = bias + shift
        for which, column in source.plan.passed:
            if which == 0:
                scales.append(row[column].view(1, 1, 1))
            else:
                scale, shift = _scale_and_shift(source.pool_bns[which - 1][edge])
                scales.append((scale * row[column]).view(-1, 1, 1))
                bias = bias + shift * row[column]
        affine += [bias.to(dtype), *scales]
    return affine, [t.to(dtype) for t in tensors]


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
        self._sources = [self._source(space, number) for number in range(self.nodes + 1)]

    def _source(self, space: SearchSpace, number: int) -> Source:
        # Node i + 2 has i + 2 incoming edges, which follow those of the nodes before it.
        rows = [i * (i + 3) // 2 + number for i in range(self.nodes) if number < i + 2]
        edges = [cast(MixedOperation, self.edges[row]).operations for row in rows]
        return Source(2 if self.reduction and number < 2 else 1, space.operations, rows, edges)

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """`s0`, `s1`: outputs of the cell before last and the last; `weights` (edges, operations)."""
        if not self.training:
            return self.run(s0, s1, self.fold(weights))
        if self.checkpointed and torch.is_grad_enabled():
            out, rule = checkpoint(self._run_train, s0, s1, weights, use_reentrant=False)
        else:
            out, rule = self._run_train(s0, s1, weights)
        rule.update()  # here, because a checkpoint runs the cell a second time
        return cast(Tensor, out)

    def _run_train(self, s0: Tensor, s1: Tensor, weights: Tensor) -> tuple[Tensor, BatchStatistics]:
        rule = BatchStatistics(weights)
        return self.run(s0, s1, rule), rule

    def fold(self, weights: Tensor) -> Folded:
        """The rule for eval mode."""
        return Folded(self._entrances, self._sources, weights)

    def run(self, s0: Tensor, s1: Tensor, rule: Rule) -> Tensor:
        """The cell's output; `rule` says how BN is done."""
        states = [rule.enter(s, entrance) for s, entrance in zip((s0, s1), self._entrances, strict=True)]
        incoming: list[list[Tensor]] = [[] for _ in range(self.nodes)]
        for number, source in enumerate(self._sources):
            if number >= 2:
                states.append(_sum(incoming[number - 2]))
            outputs = rule.leave(states[number], source)
            for end, out in zip(incoming[max(number - 1, 0) :], outputs, strict=True):
                end.append(out)
        states.append(_sum(incoming[-1]))
        return torch.cat(states[2:], dim=1)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


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

        Holds while weights, α and buffers stay as they are now, under autocast if there is one now, or else without.
        The network itself is left alone.
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
