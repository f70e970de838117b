"""RNAS (Qian et al., ECCV 2022): Algorithm 1, a search under a bound H on the network vulnerability F.

Departures and readings: α's step is first order; it descends on the clean and the adversarial loss (Eq. 8), or, as line
5 writes it, on the adversarial one alone (`--arch-loss adv`); H may be a share of F after the warm-up, which carries
over to other data; the projection is the method of multipliers (`rnas.nas.projection`), which the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.compute.precision import FP32, Precision
from rnas.errors import RnasError
from rnas.fast.recording import PROJECTION as PROJECTION_STEP
from rnas.nas.engine import PROJECTION, Batch, Engine, Measured, Slope
from rnas.nas.methods.base import Alphas, Cost, Fields, Method, adam
from rnas.nas.objectives import Vulnerability, passed
from rnas.nas.projection import ROUND, project
from rnas.nas.readings import READINGS, Read, Reading, of_cell, without_none
from rnas.nets.space import Shape, Weights, hard
from rnas.settings import Bound, Count, Features, Reduction, Search, at_least
from rnas.training.step import differentiating_only
from rnas.wording import apart

# The projection aims this share under H: F is sampled, and the promise is F ≤ H on the monitored images.
MARGIN = 0.1
NEAR = 2 * MARGIN
"""A projection is through where F is no further under H: α is then about as near as it can be."""
CAP = 4
"""How many times its planned steps a projection may take until it is feasible."""
UNPROJECTED: Fields = dict.fromkeys(
    ("F_before", "multiplier", "distance", "projection_steps", "F_smallest", "projection_end")
)
ENDED = {
    "feasible": "the last steps took it over again; more --epochs help",
    "stalled": "the projection lowered it no further; a larger --bound, or more --epochs, can be met",
    "steps": "more --projection-steps or --epochs help",
}


@dataclass(frozen=True)
class Settings(Search):
    """Search an architecture under a bound on its network vulnerability (RNAS)."""

    method: str = "rnas"
    """Search method."""
    bound: str = "1e-4"
    """H: a number (1e-4 = RNAS-H, 1e-5 = RNAS-L), a share of F after the warm-up such as 0.5x, or none."""
    warmup: Count = None
    """Epochs that train only the weights (Phase I); by default a quarter, the paper's 15 of 60."""
    alpha_lr: float = 6e-4
    """Learning rate of the architecture weights α (Adam)."""
    alpha_weight_decay: float = 1e-3
    """Weight decay of α."""
    arch_loss: Literal["clean+adv", "adv"] = "clean+adv"
    """α descends on clean + adversarial loss (Eq. 8), or on the adversarial alone (Algorithm 1, line 5)."""
    reduction: Reduction = "mean"
    """KL over the positions of a channel: mean (divided by H·W) or sum (nats)."""
    features: Features = "raw"
    """Measure F on the cell outputs as they are, or brought to zero mean and unit variance per channel."""
    bound_on: Reading = "supernet"
    """What F ≤ H binds: the supernet as it is (the paper's words), without `none`, or the discretised cell in it."""
    projection_steps: Count = None
    """Steps of one projection; by default the second half of the epoch, as in the paper."""
    projection_cap: Count = None
    """Most steps of a projection that is not feasible by then; by default four times as many."""
    projection_lr: float = 0.2
    """Largest move of a coordinate of α_p in one step of the projection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Bound.parse(self.bound)
        at_least(self, 1, "projection_steps", "projection_cap")
        at_least(self, 0, "warmup", "alpha_lr", "alpha_weight_decay", "projection_lr")
        if self.phase_one >= self.epochs:
            raise RnasError(f"warmup is {self.phase_one} of {self.epochs} epochs: nothing is left to search in")

    @property
    def phase_one(self) -> int:
        """Epochs of the warm-up."""
        return self.epochs // 4 if self.warmup is None else self.warmup


class Rnas(Method):
    """α of both kinds of cell; H, once it is known."""

    settings: Settings
    alpha: Alphas

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.bound: float | None = None

    # --- Algorithm 1

    def epoch(self, engine: Engine) -> Fields:
        """One turn of the outer loop."""
        if engine.epoch <= self.settings.phase_one:  # Phase I
            for x, y in engine.train():
                engine.descend_weights(engine.adversarial(x, y), y)
            return {"phase": "warmup", **UNPROJECTED}
        half = max(1, engine.iterations // 2)
        for (x, y), (x_val, y_val) in zip(engine.train(half), engine.validation, strict=False):  # Step 1, lines 3-6
            engine.descend_weights(engine.adversarial(x, y), y)
            self.descend_alphas(engine, x_val, y_val)
        if self.bound is None:
            return {"phase": "search", **UNPROJECTED}
        return {"phase": "search", **self.project(engine, self.bound, engine.iterations - half)}  # Step 2, lines 8-12

    def descend_alphas(self, engine: Engine, x: Tensor, y: Tensor) -> Slope:
        """α down L_val + L_val^adv (Eq. 8), or L_val^adv alone (line 5)."""
        objective = ValidationLoss(self.settings.arch_loss == "clean+adv", engine.precision)
        slope = engine.slope(objective, (x, engine.adversarial(x, y), y), self.parameters())
        engine.descend(slope, self.parameters(), engine.optimiser)
        engine.saw_architecture(slope, y)
        return slope

    def project(self, engine: Engine, bound: float, steps: int) -> Fields:
        """α to the nearest α_p with F(α_p) ≤ H (Eq. 9), θ fixed.

        A round of gradient steps shares a validation batch and its adversarial images, crafted against the α_p of the
        round's beginning; the monitored images, always attacked afresh, decide whether F ≤ H.
        """
        engine.reseed(PROJECTION)

        def rounds() -> Iterator[Batch]:
            for x, y in engine.validation:
                with self.read(engine, self.settings.bound_on, [x]) as w:
                    x_adv = engine.adversarial(x, y, w)
                engine.doing = "projection"
                for _ in range(ROUND):
                    yield x, x_adv

        drawn, steps = rounds(), self.settings.projection_steps or max(1, steps)
        with differentiating_only(list(self.parameters()), engine.net):
            done = project(
                list(self.parameters()),
                lambda scale: self.slope_of_f(engine, *next(drawn), scale),
                lambda: self.f(engine, self.settings.bound_on),
                bound,
                steps=steps,
                most=self.settings.projection_cap or CAP * steps,
                lr=self.settings.projection_lr,
                margin=MARGIN,
                near=NEAR,
            )
        return {
            "F_before": done.before,
            "multiplier": done.multiplier,
            "distance": done.distance,
            "projection_steps": done.steps,
            "F_smallest": done.smallest,
            "projection_end": done.end,
        }

    def slope_of_f(
        self, engine: Engine, x: Tensor, x_adv: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """F on batch statistics (Eq. 6), and the gradients of F / scale for the α."""
        reading, shape = self.settings.bound_on, self.shape(engine.epoch)
        objective = Read(reading, self.vulnerability(engine.precision, scale), shape.space)
        cell = (of_cell(self.derive(), shape, self.alpha.normal),) if reading == "cell" else ()
        slope = engine.slope(objective, (x, x_adv, *cell), self.parameters(), PROJECTION_STEP)
        return slope.aux, slope.grads

    def f(self, engine: Engine, reading: Reading) -> float:
        """F of the monitored images."""
        images = engine.monitored
        with self.read(engine, reading, [x for x, _ in images]) as w:
            return engine.measure(images, w).vulnerability

    @contextmanager
    def read(self, engine: Engine, reading: Reading, images: Sequence[Tensor]) -> Iterator[Weights]:
        """Within, the weights of operations by a reading; BN's running statistics, which an attack goes by, are theirs
        on `images` (B,3,H,W)."""
        if reading == "supernet":
            yield self.weights()
            return
        shape, w = self.shape(engine.epoch), self.weights()
        w = without_none(w, shape.space) if reading == "without-none" else hard(self.derive(), shape, w.mix[0])
        with engine.calibrated(images, w):
            yield w

    # --- what the engine asks

    def begin(self, shape: Shape) -> None:
        self.alpha = Alphas(shape.space)

    def weights(self, *noise: Tensor) -> Weights:
        return self.alpha.softmax()

    def optimiser(self) -> torch.optim.Optimizer:
        return adam(self.parameters(), self.settings.alpha_lr, self.settings.alpha_weight_decay)

    def vulnerability(self, precision: Precision = FP32, scale: float = 1.0) -> Vulnerability:
        return Vulnerability(self.settings.reduction, self.settings.features, precision, scale)

    def start(self, engine: Engine) -> None:
        if self.settings.phase_one == 0:
            self.know_bound(self.f(engine, self.settings.bound_on))

    def measured(self, engine: Engine, validation: Measured) -> Fields:
        of = {r: validation.vulnerability if r == "supernet" else self.f(engine, r) for r in READINGS}
        f = of[self.settings.bound_on]
        if engine.epoch == self.settings.phase_one:
            self.know_bound(f)
        return {"F": f, "H": self.bound, **{f"F_{r.replace('-', '_')}": value for r, value in of.items()}}

    def know_bound(self, f: float) -> None:
        """H as a number: a relative bound is a share of F at the end of the warm-up."""
        bound = Bound.parse(self.settings.bound)
        if bound is not None:
            self.bound = bound.value * f if bound.relative else bound.value

    def strengths(self) -> tuple[Tensor, ...]:
        return self.alpha.strengths()

    def alphas(self) -> list[Tensor]:
        return list(self.parameters())

    def summary(self, event: Mapping[str, Any]) -> str:
        if event["F_before"] is None:
            return ""
        _, before, bound = apart(event["F"], event["F_before"], event["H"], form=lambda v, n: f"{v:.{n - 1}e}")
        return f" (before the projection {before}, H {bound})"

    def warning(self, epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        last = epochs[-1]
        if last["H"] is None or last["F"] <= last["H"]:
            return None
        smallest, epoch = min((e["F"], e["epoch"]) for e in epochs if e["H"] is not None)
        over, bound, least = apart(last["F"], last["H"], smallest)
        message = f"the search ended with F = {over} over its bound H = {bound}; the smallest F was {least}, of epoch "
        message += f"{epoch}: {ENDED[last.get('projection_end') or 'steps']}"
        return {"message": message, "F": last["F"], "H": last["H"]}

    @classmethod
    def cost(cls, settings: Search, epoch: int, iterations: float) -> Cost:
        """Phase I trains the weights; Phase II trains both on half of an epoch, then projects as long, with one attack
        for each round of steps."""
        assert isinstance(settings, Settings)
        if epoch <= settings.phase_one:
            return Cost(iterations, iterations)
        half = iterations / 2
        projected = half if settings.projection_steps is None else settings.projection_steps
        return Cost(attacks=2 * half + projected / ROUND, passes=3 * half + 2 * projected)

    def get_extra_state(self) -> dict[str, float | None]:
        return {"bound": self.bound}

    def set_extra_state(self, state: dict[str, float | None]) -> None:
        self.bound = state["bound"]


@dataclass(frozen=True)
class ValidationLoss:
    """What α descends on: L_val^adv, with L_val if `clean`. # Eq. 8"""

    clean: bool
    precision: Precision

    def __call__(self, net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tells the adversarial logits (B,classes)."""
        logits = passed(net, x_adv, self.precision)
        loss = F.cross_entropy(logits, y)
        if self.clean:
            loss = loss + F.cross_entropy(passed(net, x, self.precision), y)
        return loss, logits
