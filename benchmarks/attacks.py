"""How much faster AutoAttack is here than a plain transcription of the published algorithms, with the same masks.

    python -m benchmarks.attacks [--data SPEC] [--networks residual RNAS-L] [--images 128] [--json FILE]

The transcriptions below do what the papers say, on the module as it is given: APGD and FAB keep all images that they
start with in their inner loops until they end. Both sides draw the same random numbers and run at the same time, each
in a process with one thread; CPU seconds are compared. As in the original code, FAB's plain backward pass computes the
weights' gradients too. The networks are trained adversarially, but lightly: enough that some images hold. Writes
its JSON after each attack, so that what a run that is cut short has measured is kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import machine, positive, program, save
from rnas import data
from rnas.attacks import APGD, FAB, PGD, Square
from rnas.attacks.autoattack import member, standard
from rnas.attacks.losses import cross_entropy, margin, ranked, targeted_dlr
from rnas.compute.freezing import frozen, unfolded
from rnas.nets.handmade import Residual, Stages
from rnas.nets.zoo import build

RESULTS = Path(__file__).parent / "results"
Mask = Tensor
Loss = Callable[[Tensor], Tensor]
Side = Callable[[nn.Module, Tensor, Tensor, Any], Mask]


# --- the plain side -------------------------------------------------------------------------------------------------


def plain_apgd_run(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, start: Tensor, eps: float, steps: int) -> Mask:
    """One run of APGD in l_inf (Croce & Hein 2020, Algorithm 1) from `start`; which images hold."""

    def evaluate(x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_adv = x_adv.clone().requires_grad_()
        logits = model(x_adv)
        value = loss(logits)
        (gradient,) = torch.autograd.grad(value.sum(), x_adv)
        return value.detach(), gradient, logits.argmax(1) == y

    def inside(z: Tensor) -> Tensor:
        return torch.min(torch.max(z, x - eps), x + eps).clamp(0, 1)

    x_adv = x_old = start
    value, gradient, holds = evaluate(x_adv)
    best, x_best, gradient_best = value.clone(), x_adv.clone(), gradient.clone()
    step = torch.full((len(x), 1, 1, 1), 2 * eps)
    history = [torch.zeros_like(value)]
    interval, since, best_before, halved_before = max(int(0.22 * steps), 1), 0, best.clone(), torch.ones(len(x))
    for i in range(steps):
        momentum = x_adv - x_old
        x_old = x_adv
        z = inside(x_adv + step * gradient.sign())
        a = 0.75 if i else 1.0
        x_adv = inside(x_adv + a * (z - x_adv) + (1 - a) * momentum)
        value, gradient, right = evaluate(x_adv)
        holds &= right
        history.append(value)
        up = value > best
        best[up], x_best[up], gradient_best[up] = value[up], x_adv[up], gradient[up]
        since += 1
        if since == interval:
            rises = sum((history[-j] > history[-j - 1]).float() for j in range(1, interval + 1))
            halve = (rises <= 0.75 * interval) | ((halved_before == 0) & (best_before >= best))
            halved_before, best_before = halve.float(), best.clone()
            step[halve] /= 2
            x_adv = torch.where(halve.view(-1, 1, 1, 1), x_best, x_adv)
            gradient = torch.where(halve.view(-1, 1, 1, 1), gradient_best, gradient)
            interval, since = max(interval - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)), 0
    return holds


def plain_apgd(model: nn.Module, x: Tensor, y: Tensor, attack: APGD) -> Mask:
    """APGD-CE, or APGD-T: a run for each target."""
    holds = torch.ones(len(x), dtype=torch.bool)
    with torch.no_grad():
        logits = model(x)
    targets = ranked(logits, y, attack.targets) if attack.loss == "dlr-targeted" else y.unsqueeze(1)
    for rank, target in enumerate(targets.unbind(1)):

        def loss(logits: Tensor, target: Tensor = target) -> Tensor:
            return targeted_dlr(logits, y, target) if attack.loss == "dlr-targeted" else cross_entropy(logits, y)

        start = attack._start(x, f"{rank} 0")
        holds &= plain_apgd_run(model, x, y, loss, start, attack.eps, attack.steps)
    return holds


def plain_projection(t: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """FAB's l_inf projection onto ⟨w, t + d⟩ = b in the box, by sorting; rows (B,D)."""
    rise = b - (w * t).sum(1)
    direction = w.sign() * rise.sign().unsqueeze(1)
    room = torch.where(direction > 0, 1 - t, t) * (w != 0)
    ordered, order = room.sort(dim=1)
    slope = w.abs().gather(1, order)
    spent = (slope * ordered).cumsum(1)
    moving = slope.sum(1, keepdim=True) - slope.cumsum(1)
    reached = spent + moving * ordered  # what is gained when all have moved by the k-th room
    k = (reached < rise.abs().unsqueeze(1)).sum(1, keepdim=True)
    last = k.clamp(max=w.shape[1] - 1)
    before = F.pad(spent, (1, 0)).gather(1, k)
    rate = F.pad(moving, (1, 0)).gather(1, last)
    rate = torch.where(last == 0, slope.sum(1, keepdim=True), rate)
    travel = torch.where(k == w.shape[1], 1.0, (rise.abs().unsqueeze(1) - before) / rate.clamp(min=1e-12))
    return direction * torch.minimum(travel, room)


def plain_fab(model: nn.Module, x: Tensor, y: Tensor, attack: FAB) -> Mask:
    """FAB-T in l_inf (Croce & Hein 2020): 100 iterations for each target."""
    holds = torch.ones(len(x), dtype=torch.bool)
    with torch.no_grad():
        targets = ranked(model(x), y, attack.targets)
    for target in targets.unbind(1):
        x1, nearest = x.clone(), torch.full((len(x),), torch.inf)
        for _ in range(attack.steps):
            x1 = x1.clone().requires_grad_()
            logits = model(x1)
            difference = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
            difference.sum().backward()  # as the original does: gradients of the weights too
            w, x1 = x1.grad, x1.detach()
            w2 = w.flatten(1)
            b = (w2 * x1.flatten(1)).sum(1) - difference.detach()
            d = plain_projection(torch.cat([x1.flatten(1), x.flatten(1)]), torch.cat([w2, w2]), torch.cat([b, b]))
            d1, d0 = (part.view(x1.shape) for part in d.chunk(2))
            r1, r0 = (part.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-8) for part in (d1, d0))
            alpha = (r1 / (r1 + r0)).clamp(max=attack.alpha_max)
            x1 = ((1 - alpha) * (x1 + attack.eta * d1) + alpha * (x + attack.eta * d0)).clamp(0, 1)
            with torch.no_grad():
                fooled = model(x1).argmax(1) != y
            gap = (x1 - x).abs().amax((1, 2, 3))
            nearest = torch.where(fooled & (gap < nearest), gap, nearest)
            x1 = torch.where(fooled.view(-1, 1, 1, 1), x + attack.beta * (x1 - x), x1)
        holds &= nearest > attack.eps
    return holds


@torch.no_grad()
def plain_square(model: nn.Module, x: Tensor, y: Tensor, attack: Square) -> Mask:
    """Square Attack in l_inf (Andriushchenko et al. 2020); broken images are no longer queried, as in its paper."""
    height, width = x.shape[2:]
    drawn_places, drawn_signs = attack._draws(x, 0)
    places, signs = drawn_places.tolist(), drawn_signs.float()
    best = attack._start(x, "0")
    value = margin(model(best), y)
    for query in range(1, attack.queries):
        (at,) = (value <= 0).nonzero(as_tuple=True)
        if len(at) == 0:
            break
        side = attack.side(query, height, width)
        top, left = int(places[query][0] * (height - side)), int(places[query][1] * (width - side))
        change = torch.zeros_like(x[at])
        change[:, :, top : top + side, left : left + side] = 2 * attack.eps * signs[query][:-1].view(-1, 1, 1)
        z = torch.min(torch.max(best[at] + change, x[at] - attack.eps), x[at] + attack.eps).clamp(0, 1)
        proposed = margin(model(z), y[at])
        better = proposed > value[at]
        value[at[better]], best[at[better]] = proposed[better], z[better]
    return value <= 0


def plain(model: nn.Module, x: Tensor, y: Tensor, attack: Any) -> Mask:
    """Which images hold against the transcription of `attack`."""
    if isinstance(attack, APGD):
        return plain_apgd(model, x, y, attack)
    return plain_fab(model, x, y, attack) if isinstance(attack, FAB) else plain_square(model, x, y, attack)


def ours(model: nn.Module, x: Tensor, y: Tensor, attack: Any) -> Mask:
    """Which images hold against `attack`, by the verdict of the model as it is."""
    with unfolded(model), frozen(model) as net, torch.no_grad():
        return model(attack.perturb(net, x, y)).argmax(1) == y


# --- networks and measurement ---------------------------------------------------------------------------------------


def residual_network(classes: int, channels: int = 16) -> nn.Module:
    """Three residual blocks of 16, 32 and 64 channels."""

    def conv_bn(c_in: int, c_out: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)]

    def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
        body = nn.Sequential(*conv_bn(c_in, c_out, stride), nn.ReLU(), *conv_bn(c_out, c_out))
        return [Residual(body, c_in, c_out, stride), nn.ReLU()]

    c = channels
    layers = [*conv_bn(3, c), nn.ReLU(), *block(c, c, 1), *block(c, 2 * c, 2), *block(2 * c, 4 * c, 2)]
    return Stages(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * c, classes))


NETWORKS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "residual": ("3 residual blocks, C = 16", residual_network),
    "RNAS-L": ("5 cells, C = 8", lambda classes: build("RNAS-L", classes=classes, cells=5, channels=8)),
}


def train(model: nn.Module, split: data.Split, eps: float, steps: int, batch_size: int = 64) -> None:
    """Light adversarial training: `steps` batches against 2 steps of PGD."""
    attack = PGD(eps=eps, step=0.75 * eps, steps=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    done = epoch = 0
    while done < steps:
        for x, y in data.batches(split, batch_size, seed=0, epoch=epoch, augment=False, device="cpu", drop_last=True):
            if done == steps:
                break
            with frozen(model) as net:
                x_adv = attack.perturb(net, x, y)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            optimizer.step()
            schedule.step()
            done += 1
        epoch += 1
    model.eval()


def run_side(how: Side, model: nn.Module, x: Tensor, y: Tensor, attack: Any, batch: int) -> tuple[float, Mask]:
    """CPU seconds of one attack in one thread, and which images (B,) hold."""
    torch.set_num_threads(1)
    start = time.process_time()
    holds = torch.cat([how(model, *part, attack) for part in zip(x.split(batch), y.split(batch), strict=True)])
    return time.process_time() - start, holds


def measure(model: nn.Module, x: Tensor, y: Tensor, eps: float, batch_size: int) -> Iterator[dict[str, Any]]:
    """AutoAttack's four attacks, each on what the ones before left; after each, all that is known.

    Both sides run at the same time, each in a process of its own, so that they share the machine's noise.
    """
    with torch.no_grad():
        logits = model(x)
    clean = logits.argmax(1) == y
    left = {side: clean.clone() for side in (plain, ours)}
    attacks: dict[str, dict[str, float]] = {}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in standard(logits.shape[1]):
            if not all(mask.any() for mask in left.values()):
                return
            attack = member(name, eps, "linf", 0)
            started = [pool.submit(run_side, f, model, x[m], y[m], attack, batch_size) for f, m in left.items()]
            seconds: list[float] = []
            for mask, (spent, holds) in zip(left.values(), (side.result() for side in started), strict=True):
                mask[mask.clone()] = holds
                seconds.append(spent)
            attacks[name] = {
                "ratio": round(seconds[0] / seconds[1], 2),
                "plain": round(seconds[0], 2),
                "rnas": round(seconds[1], 2),
                "standing": int(left[ours].sum()),
                "different": int((left[plain] != left[ours]).sum()),
            }
            total = {side: sum(row[side] for row in attacks.values()) for side in ("plain", "rnas")}
            yield {
                "ratio": round(total["plain"] / total["rnas"], 2),
                "same_masks": torch.equal(*left.values()),
                "clean": int(clean.sum()),
                "standing": int(left[ours].sum()),
                "cpu_seconds": {side: round(spent, 1) for side, spent in total.items()},
                "attacks": attacks,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as in rnas: a name, an .npz, a folder (default: digits)")
    parser.add_argument("--data-name", help="how the results call the data")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--images", type=positive, default=128)
    parser.add_argument("--train-steps", type=positive, default=300)
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--json", type=Path, default=RESULTS / "quick-attacks.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = data.load(arguments.data)
    eps = dataset.eps_default
    x = dataset.test.images[: arguments.images].float() / 255
    y = dataset.test.labels[: arguments.images]
    file = arguments.json
    for name in arguments.networks:
        description, make = NETWORKS[name]
        torch.manual_seed(0)
        model = make(len(dataset.classes))
        train(model, dataset.train, eps / 2, arguments.train_steps)
        print(name, description, flush=True)
        about = {
            "network": description,
            "training": f"{arguments.train_steps} batches of 64 against PGD-2 at half the radius",
            "data": f"{len(x)} test images of {arguments.data_name or dataset.name}, {tuple(x.shape[1:])}",
            "eps": eps,
            "batch_size": arguments.batch_size,
            "measured_on": machine("cpu"),
        }
        for outcome in measure(model, x, y, eps, arguments.batch_size):
            results = json.loads(file.read_text()) if file.exists() else {}
            save(file, {**results, name: outcome | about})
            print(json.dumps(outcome, indent=1), flush=True)


if __name__ == "__main__":
    program(main)
