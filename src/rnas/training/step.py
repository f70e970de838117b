"""One update of weights: craft adversarial images, differentiate, apply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.compute.layout import arranged_for
from rnas.compute.precision import FP32, Precision
from rnas.errors import RnasError
from rnas.fast.recording import WEIGHTS, Kind, replayed
from rnas.nets.space import Forms, Input, Weights, apart, together
from rnas.training.adversarial import craft, craft_trades
from rnas.training.objectives import CrossEntropy, Objective, Trades


def check_finite(loss: Tensor, what: str, epoch: int, step: int) -> None:
    """Stop the run if `loss` is NaN or infinite, naming where, and what is left."""
    if not torch.isfinite(loss):
        last = f"the checkpoint of epoch {epoch - 1} is good" if epoch > 1 else "there is no checkpoint yet"
        raise RnasError(
            f"{what} loss became {float(loss)} in epoch {epoch}, step {step}; {last}. "
            f"A smaller learning rate usually helps (--lr, with another --out)"
        )


def weight_step(
    net: nn.Module,
    thetas: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    attack: PGD | None,
    x: Tensor,
    y: Tensor,
    clip: float,
    trades_beta: float | None = None,
    precision: Precision = FP32,
    weights: Sequence[Weights] = (),
) -> tuple[Tensor, Tensor]:
    """One update of the weights `thetas` on adversarial images, or on clean ones without an `attack`.

    `x` (B,3,H,W) in [0,1], `y` (B,). With `trades_beta`: cross-entropy on clean images plus β times
    KL(clean ‖ adversarial) (Zhang et al. 2019, Eq. 5). `weights`: those of a supernet's operations. Returns the loss
    and the logits (B,classes) it was taken on.
    """
    objective: Objective
    if trades_beta is None or attack is None:
        objective = CrossEntropy(precision)
        inputs = [arranged_for(net, x if attack is None else craft(attack, net, x, y, precision, *weights)), y]
    else:
        objective = Trades(trades_beta, precision)
        inputs = [arranged_for(net, craft_trades(attack, net, x, precision)), y, arranged_for(net, x)]
    net.train()
    loss, logits = differentiated(WEIGHTS, objective, net, (*inputs, *weights), thetas)
    nn.utils.clip_grad_norm_(thetas, clip)
    optimizer.step()
    return loss, logits


def differentiated(
    kind: Kind, objective: Objective, net: nn.Module, inputs: Sequence[Input], parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """What `objective(net, *inputs)` returns; `parameters` get its gradients, recorded where that pays: theirs until
    the next step."""
    tensors, forms = apart(inputs)
    work = _Differentiating(objective, forms, parameters)
    if getattr(net, "saving_memory", False):  # a checkpoint reads the generator's state, which no recording may
        loss, aux = work(net, *tensors)
    else:
        loss, aux = replayed(kind, work, net, tensors, parameters)
    return loss, aux


@dataclass(frozen=True)
class _Differentiating:
    """An objective and its gradients for `parameters`."""

    objective: Objective
    forms: Forms
    parameters: Sequence[nn.Parameter] = field(compare=False)  # `replayed` tells them apart

    def __call__(self, net: nn.Module, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        for p in self.parameters:
            p.grad = None
        loss, aux = self.objective(net, *together(tensors, self.forms))
        torch.autograd.backward(loss, inputs=list(self.parameters))
        return loss.detach(), aux.detach()


@contextmanager
def differentiating_only(parameters: Sequence[nn.Parameter], net: nn.Module) -> Iterator[None]:
    """Within the context only `parameters` of `net` take part in differentiation: the others cost nothing."""
    wanted = {id(p) for p in parameters}
    frozen = [p for p in net.parameters() if p.requires_grad and id(p) not in wanted]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
