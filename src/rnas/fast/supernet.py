"""The supernet, fast: `Supernet`'s parameters, state dict, outputs and gradients at a fraction of its cost.

What makes the difference (docs/speed.md has the figures): whatever depends on a node alone - its ReLU, its pools and
their BN - is computed once for the node and not once for every edge that leaves it; `none` is not computed. A CPU then
works through the operations one by one, each in its cache (`fast_cpu`); a GPU takes the edges that leave a node side by
side, in few and large kernels, torch's (`fast_gpu`) or our own (`fast_triton`). In eval mode BN and α are folded into
the 1x1 convolutions, and for an attack, where no weight changes, only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rnas.compute.layout import arrange
from rnas.compute.precision import pass_dtype
from rnas.fast.cpu import OnCpu
from rnas.fast.cpu_kernels import shuffled_together
from rnas.fast.cuda import OnGpu
from rnas.fast.kernels.available import triton_works
from rnas.fast.plan import (
    Backend,
    CellExecutor,
    CellPlan,
    ConvOperation,
    Edge,
    Executor,
    Source,
    TrainExecutor,
    scale_and_shift,
)
from rnas.nets.ops import total
from rnas.nets.space import CellWeights, Shape, Weights
from rnas.nets.supernet import MixedOperation, Supernet, SupernetCell, shuffled


def on_cpu(x: Tensor) -> bool:
    """Whether to compute as pays on a CPU."""
    return x.device.type == "cpu"


def backend_for(x: Tensor, train: bool = False, recorded: bool = False) -> Backend:
    """The one that pays where `x` is, in train or in eval mode; `recorded`: launching kernels costs nothing."""
    if on_cpu(x):
        return OnCpu()
    launch = recorded or not train  # in train mode launching Triton's many kernels costs more than they save
    if launch and x.dtype == torch.float32 and triton_works(x.device):
        from rnas.fast.triton import OnTriton

        return OnTriton()
    return OnGpu()


class FastCell(SupernetCell):
    """`SupernetCell`, computed node by node."""

    checkpointed = False

    def __init__(self, shape: Shape, c_before: int, c_last: int, channels: int, reduction: bool, after_reduction: bool):
        super().__init__(shape, c_before, c_last, channels, reduction, after_reduction)
        inputs = ConvOperation("direct", 1, self.pre0), ConvOperation("direct", 1, self.pre1)
        sources = tuple(self._source(shape, number) for number in range(self.nodes + 1))
        self._plan = CellPlan(inputs, sources, self.mixed)
        self.recorded = False
        """Whether its passes are being recorded as a CUDA graph."""

    def _source(self, shape: Shape, number: int) -> Source:
        names, stride = shape.space.operations, 2 if self.reduction and number < 2 else 1
        rows = [_first_row(i) + number for i in range(self.nodes) if number < i + 2]
        return Source(
            stride, names, [Edge.of(row, stride, names, cast(MixedOperation, self.edges[row])) for row in rows]
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: CellWeights) -> Tensor:
        """`s0`, `s1`: outputs of the cell before last and the last."""
        plan = self.plan_for(weights)
        if not self.training:
            return self.run(s0, s1, plan, self.fold(plan, weights), weights)
        if self.checkpointed and torch.is_grad_enabled():
            # A cell draws no random numbers, and a recording (`rnas.fast.recording`) could not read their state.
            out, executor = checkpoint(
                self._run_train, s0, s1, plan, weights, self.recorded, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out, executor = self._run_train(s0, s1, plan, weights, self.recorded)
        executor.update()  # here, because a checkpoint runs the cell a second time
        return cast(Tensor, out)

    def _run_train(
        self, s0: Tensor, s1: Tensor, plan: CellPlan, weights: CellWeights, recorded: bool
    ) -> tuple[Tensor, TrainExecutor]:
        backend = backend_for(weights.mix, True, recorded)
        executor = backend.on_batch_statistics(plan, weights.mix, self.kept_by_edge(weights.kept))
        return self.run(s0, s1, plan, executor, weights), executor

    def plan_for(self, weights: CellWeights) -> CellPlan:
        """Without what is off."""
        return self._plan if weights.live is None else self._plan.restricted_to(weights.live)

    def fold(self, plan: CellPlan, weights: CellWeights) -> Executor:
        """The executor for eval mode."""
        return backend_for(weights.mix).folded(plan, weights.mix)

    def run(self, s0: Tensor, s1: Tensor, plan: CellPlan, executor: Executor, weights: CellWeights) -> Tensor:
        """The cell's output; `executor` says how BN is done."""
        if isinstance(executor, CellExecutor):
            return executor.run(s0, s1)
        states = [executor.preprocessed(s, o) for s, o in zip((s0, s1), plan.inputs, strict=True)]
        others: list[Tensor] = []
        incoming: dict[int, Tensor] = {}
        for number, source in enumerate(plan.sources):
            if number >= 2:
                states.append(self._node(number - 2, states, others, incoming, executor, weights))
            x = states[number]
            if self.part > 1:
                others.append(self.passing_by(number, x).contiguous(memory_format=torch.channels_last))
                x = executor.mixed(x)
            if source.edges:
                incoming.update(zip(source.rows, executor.outgoing(x, source), strict=True))
        states.append(self._node(self.nodes - 1, states, others, incoming, executor, weights))
        return torch.cat(states[2:], dim=1)

    def _node(
        self,
        number: int,
        states: Sequence[Tensor],
        others: Sequence[Tensor],
        incoming: dict[int, Tensor],
        executor: Executor,
        weights: CellWeights,
    ) -> Tensor:
        """Node `number`, from what its edges brought, by row, and what passed by them; zeros where there is nothing."""
        rows = range(_first_row(number), _first_row(number + 1))
        terms = [incoming[row] for row in rows if row in incoming]
        if terms:
            brought = total(terms) if self.part == 1 else executor.brought(total(terms), len(states[0]))
        else:
            stride = 2 if self.reduction else 1
            brought = torch.zeros_like(states[0][:, : self.mixed, ::stride, ::stride])
        if self.part == 1:
            return brought
        assert weights.bypass is not None, "part channels want the weights of the others"
        passed = total(w * x for w, x in zip(weights.bypass[rows.start : rows.stop], others, strict=True))
        if on_cpu(passed):
            return shuffled_together(brought, passed)
        return shuffled(torch.cat([brought, passed], dim=1), self.part)


def _first_row(node: int) -> int:
    """Of the weights: node i has i + 2 incoming edges, which follow those of the nodes before it."""
    return node * (node + 3) // 2


class FastSupernet(Supernet):
    """`Supernet` in every respect but speed; on any device; differentiable once."""

    cell_type = FastCell

    def save_memory(self, on: bool = True) -> None:
        """From now on keep only the cells' outputs for the backward pass and compute the rest again, cell by cell:
        a fraction of the memory for about a third more time."""
        for cell in self.cells:
            cast(FastCell, cell).checkpointed = on

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within, its passes are being recorded as a CUDA graph, or prepared for that."""
        cells = cast("list[FastCell]", self.cells)
        try:
            for cell in cells:
                cell.recorded = True
            yield
        finally:
            for cell in cells:
                cell.recorded = False

    def forward_cells(self, x: Tensor, weights: Weights) -> tuple[Tensor, list[Tensor]]:
        """Logits (B,classes) and the output of every cell, each (B,C_i,H_i,W_i)."""
        return super().forward_cells(arrange(x) if on_cpu(x) else x, weights)

    @torch.no_grad()
    def frozen_view(self, weights: Weights) -> Callable[[Tensor], Tensor]:
        """Images to logits as in eval mode, nothing else differentiated; BN and `weights` are folded here, once.

        Holds while parameters and buffers stay as they are now, under autocast if there is one now, or else without.
        The network itself is left alone.
        """
        weights = weights.detach()
        folded = []
        for i, cell in enumerate(cast("list[FastCell]", self.cells)):
            of_cell = weights.of(self.row(i))
            plan = cell.plan_for(of_cell)
            folded.append((cell, plan, cell.fold(plan, of_cell), of_cell))
        conv, bn = cast(nn.Conv2d, self.stem[0]), cast(nn.BatchNorm2d, self.stem[1])
        scale, shift = scale_and_shift(bn)
        dtype = pass_dtype(shift)
        stem, shift = (conv.weight * scale[:, None, None, None]).to(dtype), shift.to(dtype)
        weight, bias = (p.detach().to(dtype) for p in (self.classifier.weight, self.classifier.bias))

        def view(x: Tensor) -> Tensor:
            s0 = s1 = F.conv2d(self.normalize(arrange(x) if on_cpu(x) else x), stem, shift, conv.stride, conv.padding)
            for cell, plan, executor, of_cell in folded:
                s0, s1 = s1, cell.run(s0, s1, plan, executor, of_cell)
            return F.linear(s1.mean((2, 3)), weight, bias)

        return view
