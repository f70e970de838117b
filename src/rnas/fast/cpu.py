"""The fast supernet on a CPU: operation by operation, so that what one leaves behind is used while it is in the cache.

All that leaves a node is one function with a lean backward (`fast_functions`), on kernels that are fast in both
directions (`fast_kernels`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.compute.precision import pass_dtype
from rnas.fast.cpu_autograd import mix, mix_folded, normalize
from rnas.fast.cpu_kernels import avg_pool, packed, packed_weight, unpacked
from rnas.fast.plan import (
    Backend,
    CellPlan,
    ConvOperation,
    Executor,
    Source,
    TrainExecutor,
    is_pointwise,
    scale_and_shift,
    update_running_statistics,
)
from rnas.nets.ops import FactorizedReduce


def _tensors(operation: ConvOperation, pack: int = 1) -> list[Tensor]:
    """Kernels and 1x1 weights, as `Convolution` lists them."""
    if isinstance(operation.module, FactorizedReduce):
        even, odd = (conv.weight.flatten(1) for conv in operation.convs)
        tensors = [torch.block_diag(even, odd)]  # type: ignore[no-untyped-call]
    else:
        tensors = [conv.weight.flatten(1) if is_pointwise(conv) else conv.weight for conv in operation.convs]
    return _packed(operation, tensors, pack)


def _packed(operation: ConvOperation, tensors: list[Tensor], pack: int) -> list[Tensor]:
    """What they are for packed images."""
    if pack == 1:
        return tensors
    return [packed_weight(t, pack, parts=2 if operation.shape.kind == "reduce" else 1) for t in tensors]


REGISTER = 16
"""How many float32 a processor's vectors take, at most."""


def _pack(plan: CellPlan) -> int:
    """How many images to have side by side. Only where part of the channels goes through the operations: these few are
    copied anyway."""
    return 1 if plan.mixes_all() else max(1, REGISTER // plan.channels)


def _folded(operation: ConvOperation, alpha: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """The same with BN's scales and `alpha` in the 1x1 weights and the middle BN's shift; and the last one's."""
    tensors = _tensors(operation)
    scale, shift = scale_and_shift(operation.bns[-1])
    if alpha is not None:
        scale, shift = scale * alpha, shift * alpha
    tensors[-1] = tensors[-1] * scale[:, None]
    if operation.shape.kind == "separable":
        middle_scale, middle_shift = scale_and_shift(operation.bns[0])
        tensors[1:2] = [tensors[1] * middle_scale[:, None], middle_shift]
    # A kernel is the parameter itself: constant too, where nothing is to be differentiated.
    return (tensors if torch.is_grad_enabled() else [t.detach() for t in tensors]), shift


def _pools(source: Source, x: Tensor) -> list[Tensor]:
    """The pools of node `x`, without their BN."""
    return [
        F.max_pool2d(x, 3, source.stride, 1) if name.startswith("max") else avg_pool(x, source.stride)
        for name in source.pool_names
    ]


class BatchStatistics(TrainExecutor):
    """BN as in train mode."""

    def __init__(self, plan: CellPlan, weights: Tensor, kept: dict[int, Tensor]):
        self.rows, self.kept = weights.unbind(), kept
        self._channels, self._wanted = plan.channels, _pack(plan)
        self._seen: list[tuple[nn.BatchNorm2d, Tensor, Tensor, float]] = []

    def _see(self, bns: Sequence[nn.BatchNorm2d], statistics: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> None:
        for bn, (mean, var) in zip(bns, statistics, strict=True):
            c = bn.num_features  # of packed images the statistics are the same
            n = out.numel() // c
            self._seen.append((bn, mean[:c], var[:c], n / (n - 1)))

    def preprocessed(self, x: Tensor, operation: ConvOperation) -> Tensor:
        (out,), statistics = mix(operation.alone, x.new_ones(1, 1), [x], _tensors(operation), operation.bns[0].eps)
        self._see(operation.bns, statistics, out)
        return out

    def mixed(self, x: Tensor) -> Tensor:
        return packed(x[:, : self._channels], math.gcd(self._wanted, len(x)))  # BN must not see images of zeros

    def brought(self, x: Tensor, images: int) -> Tensor:
        return unpacked(x, x.shape[1] // self._channels, images)

    def outgoing(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        pack = x.shape[1] // self._channels
        nodes = [x]
        for pool, bns in zip(_pools(source, x), source.pool_bns, strict=True):
            out, mean, var = normalize(pool, bns[0].eps, pack)
            self._see(bns, [(mean, var)] * len(bns), out)
            nodes.append(out)
        plan = source.plan
        if self.kept:
            plan = source.dropping_plan
            nodes += [x * packed(self.kept[row], pack) for row in source.skipping]
        operations = [o for edge in source.operations for o in edge]
        tensors = [t for o in operations for t in _tensors(o, pack)]
        bns = [bn for o in operations for bn in o.bns]
        eps = bns[0].eps if bns else 0.0
        weights = torch.stack([self.rows[row] for row in source.rows])
        outputs, statistics = mix(plan, weights, nodes, tensors, eps, pack)
        self._see(bns, statistics, outputs[0])
        return outputs

    def update(self) -> None:
        update_running_statistics(self._seen)


class Folded(Executor):
    """BN as in eval mode, folded with α into the 1x1 convolutions. Holds while weights, α and buffers stay."""

    def __init__(self, plan: CellPlan, weights: Tensor):
        alpha = [row.unbind() for row in weights.unbind()]
        dtype = pass_dtype(weights)  # once for all the passes of an attack
        self._channels, self._pack = plan.channels, _pack(plan)
        self._inputs = {id(o): _converted(*_folded(o), dtype) for o in plan.inputs}
        self._sources = {
            id(s): _folded_source(s, [alpha[row] for row in s.rows], dtype, plan.channels, self._pack)
            for s in plan.sources
        }

    def preprocessed(self, x: Tensor, operation: ConvOperation) -> Tensor:
        tensors, bias = self._inputs[id(operation)]
        return mix_folded(operation.alone, [x], [bias], tensors)[0]

    def mixed(self, x: Tensor) -> Tensor:
        return packed(x[:, : self._channels], self._pack)

    def brought(self, x: Tensor, images: int) -> Tensor:
        return unpacked(x, self._pack, images)

    def outgoing(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        return mix_folded(source.plan, [x, *_pools(source, x)], *self._sources[id(source)])


def _converted(tensors: list[Tensor], bias: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    return [t.to(dtype) for t in tensors], bias.to(dtype)


def _folded_source(
    source: Source, alpha: Sequence[Sequence[Tensor]], dtype: torch.dtype, channels: int, pack: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The affine constants and the tensors of `mix_folded`; `alpha`: the row of each edge."""
    affine: list[Tensor] = []
    tensors: list[Tensor] = []
    for edge, row in zip(source.edges, alpha, strict=True):
        bias = row[0].new_zeros(channels)
        scales = []
        for column, operation in edge.convolutions.items():
            own, shift = _folded(operation, row[column])
            tensors += _packed(operation, own, pack)
            bias = bias + shift
        if edge.skip is not None:
            scales.append(row[edge.skip].view(1, 1, 1))
        for column, bn in edge.pools.items():
            scale, shift = scale_and_shift(bn)
            scales.append((scale * row[column]).repeat(pack).view(-1, 1, 1))
            bias = bias + shift * row[column]
        affine += [bias.to(dtype).repeat(pack), *scales]
    return affine, [t.to(dtype) for t in tensors]


class OnCpu(Backend):
    """The fast supernet on a CPU."""

    def on_batch_statistics(self, plan: CellPlan, weights: Tensor, kept: dict[int, Tensor]) -> TrainExecutor:
        return BatchStatistics(plan, weights, kept)

    def folded(self, plan: CellPlan, weights: Tensor) -> Executor:
        return Folded(plan, weights)
