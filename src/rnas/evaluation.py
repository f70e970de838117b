"""Evaluation: attack a trained network on test images, and say how far the figures can be trusted."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnas.attacks import PGD, Progress, run_attacks, trust
from rnas.attacks.evaluation import attack_named
from rnas.attacks.norms import Norm
from rnas.attacks.state import begun
from rnas.console import Console
from rnas.data import Split
from rnas.data.dataset import stratified, white
from rnas.errors import RnasError, unknown
from rnas.files import read_json, write_json
from rnas.frozen import Model
from rnas.nets.saved import META, find_model, load_model
from rnas.precision import full_precision
from rnas.runs import SETTINGS, UNBOUNDED, check_evaluation, read_masks, training_of, union, write_arrays
from rnas.settings import Evaluate
from rnas.steps import choose_device, load_data, load_test_data

EVALUATION, MASKS, EXAMPLES, PARTIAL = "evaluation.json", "masks.npz", "examples.npz", "evaluation.partial"
PICTURED = 8  # images kept with their adversarial versions, to be looked at


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927)."""
    p, z2 = successes / n, z * z
    centre, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


Mask = np.ndarray[Any, np.dtype[np.bool_]]


def _figure(mask: Mask) -> dict[str, Any]:
    """An accuracy with its interval, from a mask of what is still right."""
    right, n = int(mask.sum()), len(mask)
    return {"accuracy": right / n, "interval": list(wilson(right, n))}


def _union(masks: dict[str, Mask]) -> dict[str, Any]:
    """The summary's entry of all bounded attacks together, if there is one of them."""
    withstood = union(masks)
    return {} if withstood is None else {"union": _figure(withstood)}


def _sha256(*tensors: Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.detach().cpu().contiguous().flatten().numpy().data)  # without another copy of all images
    return content.hexdigest()


@dataclass(frozen=True)
class Result:
    """What an evaluation found: `summary` is evaluation.json, `masks` says per image whether it is still right."""

    summary: dict[str, Any]
    masks: dict[str, Mask]

    @property
    def clean(self) -> float:
        """Accuracy without an attack."""
        return float(self.summary["clean"]["accuracy"])

    def robust(self, attack: str) -> float:
        """Accuracy under `attack`. RnasError if that was not run."""
        if attack not in self.summary["attacks"]:
            raise unknown("attack of this evaluation", attack, self.summary["attacks"])
        return float(self.summary["attacks"][attack]["accuracy"])


def evaluate(
    model: Model,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[str] = ("fgsm", "pgd20", "pgd100", "cw"),
    eps: float = 8 / 255,
    norm: Norm = "linf",
    seed: int = 0,
    batch_size: int = 256,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Attack any callable `model` on images `x` (N,3,H,W) in [0,1] with labels `y` (N,).

    `attacks` are names as in `rnas evaluate --attacks`. With `state`, a folder, an evaluation that was cut off
    continues there. Accuracies carry 95 % Wilson intervals; "chance" is the accuracy of always answering the largest
    class, and "union" that under all attacks bounded by `eps` together. RnasError for bad input, before the first
    attack.
    """
    found = run_attacks(
        model, x, y, attacks, eps=eps, norm=norm, seed=seed, batch_size=batch_size, state=state, progress=progress
    )
    attacked = {name: mask for name, mask in found.masks.items() if name != "clean"}
    summary = {
        "eps": float(eps),
        "norm": norm,
        "n": len(y),
        "seed": int(seed),
        "images_sha256": _sha256(x, y),
        "chance": trust.chance(y.cpu().numpy()),
        "warnings": list(found.warnings),
        "clean": _figure(found.masks["clean"]),
        "attacks": {name: {**_figure(mask), "seconds": found.seconds[name]} for name, mask in attacked.items()},
        **_union(found.masks),
    }
    return Result(summary, dict(found.masks))


def evaluate_run(settings: Evaluate, console: Console | None = None) -> Result:
    """Evaluate the trained network of a run folder; writes evaluation.json, masks.npz and examples.npz into it."""
    console = console or Console(quiet=True)
    check_attacks(settings.attacks)
    folder = model_folder(settings.run)
    device = choose_device(settings.device)
    model, meta = load_model(folder)
    name, test = _test_images(settings, folder, meta)
    eps = _radius(settings, name)
    x, y = test.images / white(test.images.device), test.labels
    earlier = _earlier(folder)  # what is wrong with it is better known before the attacks
    state = _partial_state(settings, folder, eps, name, meta["weights"])
    model.to(device)
    with console.stages() as move:

        def progress(attack: str, done: int, total: int, survivors: int, seconds: float) -> None:
            move(f"{attack} on {folder.name}: {survivors} of {len(y)} survive", done, total)

        result = evaluate(
            model, x, y, settings.attacks, eps, settings.norm, settings.seed, settings.batch_size, state, progress
        )
    summary = {**result.summary, **_chosen(settings), "dataset": name, "model": str(meta["arch"])}
    summary["weights"] = meta["weights"]
    masks = result.masks
    if earlier is not None and _of_one_kind(earlier[0], summary):
        summary, masks = _joined(summary, masks, *earlier)
    else:
        _put_aside(folder, console)
    write_arrays(folder / MASKS, {**masks, "labels": y.numpy()})
    spread = torch.linspace(0, len(y) - 1, min(PICTURED, len(y))).long()  # test sets are often sorted by class
    _save_examples(folder, model, x[spread].to(device), y[spread].to(device), eps, settings)
    write_json(folder / EVALUATION, summary)
    shutil.rmtree(state)
    for line in _lines(folder.name, summary):
        console.say(line)
    return Result(summary, masks)


def holds(settings: Evaluate) -> bool:
    """Whether the folder holds what an evaluation with `settings` would find, and maybe more attacks."""
    folder = find_model(settings.run)
    if folder is None or not (folder / EVALUATION).exists() or not (folder / MASKS).exists():
        return False
    found, meta = read_json(folder / EVALUATION), read_json(folder / META)
    if not isinstance(found, dict) or not isinstance(found.get("attacks"), dict) or not isinstance(meta, dict):
        return False  # not as rnas writes it
    wanted = {
        **_chosen(settings),
        "eps": _radius(settings, str(found.get("dataset"))),
        "norm": settings.norm,
        "seed": settings.seed,
        "weights": meta.get("weights"),
    }
    return all(found.get(k) == v for k, v in wanted.items()) and set(settings.attacks) <= set(found["attacks"])


def _chosen(settings: Evaluate) -> dict[str, Any]:
    """Which images were asked for, as evaluation.json says it."""
    return {"limit": settings.limit, "data": settings.data}


def _radius(settings: Evaluate, dataset: str) -> float:
    return settings.eps or (0.5 if settings.norm == "l2" else 16 / 255 if dataset == "digits" else 8 / 255)


def _earlier(folder: Path) -> tuple[dict[str, Any], dict[str, Mask]] | None:
    """The evaluation and the masks in `folder`, or None if there are none. RnasError if they are damaged."""
    if not (folder / EVALUATION).exists() or not (folder / MASKS).exists():
        return None
    summary = read_json(folder / EVALUATION)
    if not isinstance(summary, dict):
        raise RnasError(f"{folder / EVALUATION} is damaged: expected a JSON object")
    check_evaluation(summary, folder / EVALUATION)
    masks, _ = read_masks(folder / MASKS)
    if any(len(mask) != summary.get("n") for mask in masks.values()):
        raise RnasError(f"{folder / MASKS} is damaged: expected a verdict on each of {summary.get('n')} images")
    return summary, masks


def _of_one_kind(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two evaluations are of the same weights on the same images under the same threat."""
    return all(one.get(key) == other[key] for key in ("eps", "norm", "n", "seed", "images_sha256", "weights"))


def _joined(
    summary: dict[str, Any], masks: dict[str, Mask], earlier: dict[str, Any], found: dict[str, Mask]
) -> tuple[dict[str, Any], dict[str, Mask]]:
    """A result with what an earlier evaluation of the same kind found by other attacks."""
    kept = {name: found[name] for name in earlier["attacks"] if name not in masks and name in found}
    masks = {**masks, **kept}
    attacks = {name: {**earlier["attacks"][name], **_figure(mask)} for name, mask in kept.items()}
    answered = {_black_box_wins(found)} - {_black_box_wins(masks)}  # it asked for attacks that have been run since
    warnings = [*(w for w in earlier.get("warnings", []) if w not in answered), *summary["warnings"]]
    return {
        **{key: value for key, value in summary.items() if key != "union"},
        "attacks": {**attacks, **summary["attacks"]},
        **_union(masks),
        "warnings": list(dict.fromkeys(warnings)),
    }, masks


def _black_box_wins(masks: dict[str, Mask]) -> str | None:
    return trust.black_box_wins({name: (masks["clean"], mask) for name, mask in masks.items() if name != "clean"})


def _put_aside(folder: Path, console: Console) -> None:
    """Keep an evaluation of another kind (ε, images, weights) that `folder` holds, under a name that is free."""
    if not (folder / EVALUATION).exists():
        return
    taken = {path.stem.rpartition("-")[2] for path in folder.glob("*.previous-*")}
    number = next(k for k in itertools.count(1) if str(k) not in taken)
    for name in (MASKS, EVALUATION):
        if (folder / name).exists():
            stem, suffix = name.split(".")
            os.replace(folder / name, folder / f"{stem}.previous-{number}.{suffix}")
    console.say(
        f"{folder.name}: an earlier evaluation, of other settings, is kept as evaluation.previous-{number}.json"
    )


def check_attacks(names: Sequence[str]) -> None:
    """RnasError for a name that is no attack, with the nearest ones."""
    for name in names:
        if name != "aa":
            attack_named(name, 8 / 255)


def model_folder(run: Path) -> Path:
    """Where the trained network of `run` lies. RnasError if there is none."""
    folder = find_model(run)
    if folder is None:
        raise RnasError(f"{run} holds no trained network: {META} is missing (rnas train writes it)")
    return folder


def load(run: str | Path) -> torch.nn.Module:
    """The trained network of a run folder, in eval mode on the CPU: images (B,3,H,W) in [0,1] to logits (B,classes).

    RnasError if there is none, or if its files are damaged.
    """
    return load_model(model_folder(Path(run)))[0]


def _test_images(settings: Evaluate, folder: Path, meta: dict[str, Any]) -> tuple[str, Split]:
    """The test images the network was made for, or those of --data; --limit of them, every class its share."""
    if settings.data is None:
        source, seed, _ = training_of(folder)
        data = load_data(source, seed)
    else:
        data = load_test_data(settings.data, folder, meta)
    if list(data.classes) != meta["classes"]:
        raise RnasError(
            f"{data.name} has other classes than the network in {folder}: {_some(data.classes)} "
            f"where it has {_some(meta['classes'])}"
        )
    if list(data.image_size) != meta["image_size"]:
        raise RnasError(
            f"{data.name} has images of {data.image_size}: the network in {folder} takes {meta['image_size']}"
        )
    n = min(settings.limit or len(data.test), len(data.test))
    return data.name, data.test[stratified(data.test.labels, n, seed=0).nonzero()[:, 0]]  # the same for every run


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _partial_state(settings: Evaluate, folder: Path, eps: float, name: str, weights: str) -> Path:
    """The folder that keeps an unfinished evaluation. RnasError if it holds one that would not be gone on with."""
    state = folder / PARTIAL
    wanted = {
        "attacks": list(settings.attacks),
        "eps": eps,
        "norm": settings.norm,
        "limit": settings.limit,
        "data": settings.data or name,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "weights": weights,
    }
    found = read_json(state / SETTINGS) if (state / SETTINGS).exists() else {}
    if not isinstance(found, dict):
        raise RnasError(f"{state / SETTINGS} is damaged: remove {state} to start anew")
    differing = [k for k, v in wanted.items() if found.get(k) != v]
    if begun(state) and "weights" not in differing:  # or else of a network that is no longer there
        if not settings.resume:
            raise RnasError(f"{state} holds an unfinished evaluation: --resume goes on with it, or remove it")
        if differing:
            raise RnasError(
                f"{state} holds an evaluation with other {', '.join(differing)}: "
                "resume with the settings it began with, or remove it to start anew"
            )
        return state
    shutil.rmtree(state, ignore_errors=True)
    write_json(state / SETTINGS, wanted)
    return state


def _save_examples(folder: Path, model: torch.nn.Module, x: Tensor, y: Tensor, eps: float, settings: Evaluate) -> None:
    """A few test images with their PGD-20 versions and what the network says of both, for the report."""
    attack = PGD(eps=eps, step=eps / 4, steps=20, norm=settings.norm, seed=settings.seed)
    x_adv = attack(model, x, y)
    with torch.no_grad(), full_precision():
        clean_prediction, adversarial_prediction = (model(images).argmax(1).cpu().numpy() for images in (x, x_adv))
    arrays = {
        "clean": (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy(),
        "adversarial": x_adv.permute(0, 2, 3, 1).cpu().numpy(),
        "label": y.cpu().numpy(),
        "clean_prediction": clean_prediction,
        "adversarial_prediction": adversarial_prediction,
        "attack": np.array("pgd20"),
    }
    write_arrays(folder / EXAMPLES, arrays)


def _lines(name: str, summary: dict[str, Any]) -> list[str]:
    """The result as lines to print: one an attack, then the warnings."""
    rows = {"clean": summary["clean"], **summary["attacks"], **{k: summary[k] for k in ("union",) if k in summary}}
    lines = [
        f"{name}, {key}: {row['accuracy']:.1%} ({low:.1%} to {high:.1%}, n = {summary['n']})"
        + (", at any distance: ε does not bound it, and no union counts it" if key in UNBOUNDED else "")
        for key, row in rows.items()
        for low, high in [row["interval"]]
    ]
    lines.insert(1, f"{name}, chance: {summary['chance']:.1%} (always answering the largest class)")
    return lines + [f"warning: {warning}" for warning in summary["warnings"]]
