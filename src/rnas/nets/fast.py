"""The supernet, fast: `Supernet`'s parameters, state dict, outputs and gradients at a fraction of its cost.

What makes the difference (docs/speed.md has the figures): whatever depends on a node alone - its ReLU, its pools and
their BN - is computed once for the node and not once for every edge that leaves it; `none` is not computed. A CPU then
works through the operations one by one, each in its cache (`fast_cpu`); a GPU takes the edges that leave a node side by
side, in few and large kernels, torch's (`fast_gpu`) or our own (`fast_triton`). In eval mode BN and α are folded into
the 1x1 convolutions, and for an attack, where no weight changes, only once.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rnas.graphs import recording
from rnas.nets import fast_cpu, fast_gpu
from rnas.nets.fast_kernels import arrange
from rnas.nets.fast_nodes import CellRule, Convolving, Rule, Source, TrainRule, scale_and_shift
from rnas.nets.on_triton import triton_works
from rnas.nets.space import Weights
from rnas.nets.supernet import MixedOperation, Supernet, SupernetCell
from rnas.ops import total
from rnas.precision import pass_dtype
from rnas.settings import SearchSpace


def on_cpu(x: Tensor) -> bool:
    """Whether to compute as pays on a CPU."""
    return x.device.type == "cpu"


def form_for(x: Tensor, train: bool = False) -> ModuleType:
    """The form of the fast supernet that pays where `x` is, in train or in eval mode."""
    if on_cpu(x):
        return fast_cpu
    pays = recording() or not train  # in train mode launching Triton's many kernels costs more than they save
    if pays and x.dtype == torch.float32 and triton_works(x.device):
        from rnas.nets import fast_triton

        return fast_triton
    return fast_gpu


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
            # No random numbers are drawn in a cell, and a recording (`rnas.graphs`) could not read their state.
            out, rule = checkpoint(self._run_train, s0, s1, weights, use_reentrant=False, preserve_rng_state=False)
        else:
            out, rule = self._run_train(s0, s1, weights)
        rule.update()  # here, because a checkpoint runs the cell a second time
        return cast(Tensor, out)

    def _run_train(self, s0: Tensor, s1: Tensor, weights: Tensor) -> tuple[Tensor, TrainRule]:
        rule: TrainRule = form_for(weights, train=True).BatchStatistics(self._entrances, self._sources, weights)
        return self.run(s0, s1, rule), rule

    def fold(self, weights: Tensor) -> Rule:
        """The rule for eval mode."""
        form = form_for(weights)
        if form is not fast_cpu and torch.is_grad_enabled():
            form = fast_gpu  # which autograd differentiates, by weights and α too
        rule: Rule = form.Folded(self._entrances, self._sources, weights)
        return rule

    def run(self, s0: Tensor, s1: Tensor, rule: Rule) -> Tensor:
        """The cell's output; `rule` says how BN is done."""
        if isinstance(rule, CellRule):
            return rule.run(s0, s1)
        states = [rule.enter(s, entrance) for s, entrance in zip((s0, s1), self._entrances, strict=True)]
        incoming: list[list[Tensor]] = [[] for _ in range(self.nodes)]
        for number, source in enumerate(self._sources):
            if number >= 2:
                states.append(total(incoming[number - 2]))
            outputs = rule.leave(states[number], source)
            for end, out in zip(incoming[max(number - 1, 0) :], outputs, strict=True):
                end.append(out)
        states.append(total(incoming[-1]))
        return torch.cat(states[2:], dim=1)


class FastSupernet(Supernet):
    """`Supernet` in every respect but speed; on any device; differentiable once."""

    cell_type = FastCell

    def save_memory(self, on: bool = True) -> None:
        """From now on keep only the cells' outputs for the backward pass and compute the rest again, cell by cell:
        a fraction of the memory for about a third more time."""
        for cell in self.cells:
            cast(FastCell, cell).checkpointed = on

    def forward_cells(self, x: Tensor, weights: Weights) -> tuple[Tensor, list[Tensor]]:
        """Logits (B,classes) and the output of every cell, each (B,C_i,H_i,W_i)."""
        return super().forward_cells(arrange(x) if on_cpu(x) else x, weights)

    @torch.no_grad()
    def frozen_view(self, weights: Weights) -> Callable[[Tensor], Tensor]:
        """Images to logits as in eval mode, nothing else differentiated; BN and `weights` are folded here, once.

        Holds while parameters and buffers stay as they are now, under autocast if there is one now, or else without.
        The network itself is left alone.
        """
        cells = [cast(FastCell, cell) for cell in self.cells]
        rules = [cell.fold(weights.mix[self.row(i)]) for i, cell in enumerate(cells)]
        conv, bn = cast(nn.Conv2d, self.stem[0]), cast(nn.BatchNorm2d, self.stem[1])
        scale, shift = scale_and_shift(bn)
        dtype = pass_dtype(shift)
        stem, shift = (conv.weight * scale[:, None, None, None]).to(dtype), shift.to(dtype)
        weight, bias = (p.detach().to(dtype) for p in (self.classifier.weight, self.classifier.bias))

        def view(x: Tensor) -> Tensor:
            s0 = s1 = F.conv2d(self.normalize(arrange(x) if on_cpu(x) else x), stem, shift, conv.stride, conv.padding)
            for cell, rule in zip(cells, rules, strict=True):
                s0, s1 = s1, cell.run(s0, s1, rule)
            return F.linear(s1.mean((2, 3)), weight, bias)

        return view
