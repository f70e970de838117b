"""Evaluation: attack a trained network on test images, and say how far the figures can be trusted."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rnas.attacks import PGD
from rnas.attacks.norms import Norm
from rnas.compute.device import choose_device
from rnas.compute.freezing import Model
from rnas.compute.precision import full_precision
from rnas.console import Console
from rnas.data import Split
from rnas.data import load as load_images
from rnas.data.dataset import stratified, white
from rnas.data.sources import load_own_data, load_test_data
from rnas.errors import RnasError
from rnas.evaluation import trust
from rnas.evaluation.battery import Progress, attack_named, run_attacks
from rnas.evaluation.features import MOST, STEPS, trained_vulnerability
from rnas.evaluation.result import Result
from rnas.evaluation.verdicts import begun
from rnas.files import check_writable, read_json, write_json
from rnas.nets.saved import find_model, load_model
from rnas.records import codec
from rnas.records.arrays import UNBOUNDED, write_arrays
from rnas.records.codec import encode
from rnas.records.evaluations import (
    Files,
    Kept,
    Mask,
    alike,
    answers,
    figure,
    in_folder,
    is_of,
    name_for,
    of_union,
    radius,
    read_all,
)
from rnas.records.folder import alone
from rnas.records.layout import META, PARTIAL, SETTINGS
from rnas.records.schema import Description, Evaluation
from rnas.settings import Evaluate
from rnas.wording import apart

PICTURED = 8  # images kept with their adversarial versions, to be looked at


def _sha256(*tensors: Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.detach().cpu().contiguous().flatten().numpy().data)  # without another copy of all images
    return content.hexdigest()


def evaluate(
    model: Model,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[str] = ("fgsm", "pgd20", "pgd100", "cw"),
    eps: float = 8 / 255,
    norm: Norm = "linf",
    seed: int = 0,
    batch_size: int = 256,
    state: Path | str | None = None,
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
    attacked = {name: figure(mask, found.seconds[name]) for name, mask in found.masks.items() if name != "clean"}
    summary = Evaluation(
        eps=float(eps),
        norm=norm,
        n=len(y),
        seed=int(seed),
        images_sha256=_sha256(x, y),
        chance=trust.chance(y.cpu().numpy()),
        warnings=tuple(found.warnings),
        clean=figure(found.masks["clean"]),
        attacks=attacked,
        union=of_union(found.masks),
    )
    return Result(summary, dict(found.masks))


@contextmanager
def shown(console: Console, name: str, images: int) -> Iterator[Progress]:
    """Within, show how far the attacks on `images` of the network called `name` are."""
    with console.stages() as move:

        def progress(attack: str, done: int, total: int, survivors: int, seconds: float) -> None:
            move(f"{attack} on {name}: {survivors} of {images} survive", done, total)

        yield progress


def evaluate_data(model: Model, settings: Evaluate, console: Console) -> Result:
    """Attack any callable `model` on the test images of `settings.data`, in their own size or in `image_size`; nothing
    is written."""
    if settings.data is None:
        raise RnasError("there are no images to evaluate on: give x and y, or data, such as 'cifar10'")
    data = load_images(settings.data, image_size=settings.image_size, to_test=True)
    test = _limited(data.test, settings.limit)
    x, y = test.images / white(test.images.device), test.labels
    eps = radius(settings, data.name)
    with shown(console, "the model", len(y)) as progress:
        result = evaluate(
            model, x, y, settings.attacks, eps, settings.norm, settings.seed, settings.batch_size, progress=progress
        )
    found = replace(result.evaluation, limit=settings.limit, data=settings.data, dataset=data.name)
    return Result(found, result.masks)


def evaluate_run(settings: Evaluate, console: Console | None = None) -> Result:
    """Evaluate the trained network of a run folder; writes evaluation.json, masks.npz and examples.npz into it, or
    into `settings.out`. Beside an evaluation of other settings these get a name of their own.

    Another evaluation that is under way in the folder is waited for.
    """
    console = console or Console(quiet=True)
    check_attacks(settings.attacks)
    folder = model_folder(settings.run)
    device = choose_device(settings.device)
    model, meta = load_model(folder)
    name, test = _test_images(settings, folder, meta)
    model.to(device)
    out = settings.out or folder
    try:
        check_writable(out)
    except RnasError as e:
        raise RnasError(f"{e}; --out names another folder for the results") from e
    with alone(out, wait=console.say):
        return _evaluate_into(out, settings, folder, model, meta, name, test, console)


def _evaluate_into(
    out: Path,
    settings: Evaluate,
    folder: Path,
    model: torch.nn.Module,
    meta: Description,
    name: str,
    test: Split,
    console: Console,
) -> Result:
    """Attack `model`, of `folder`, on the images `test` of the data set `name`, and keep what is found in `out`."""
    x, y = test.images / white(test.images.device), test.labels
    eps = radius(settings, name)
    earlier = _earlier(out, settings, meta.weights, console)
    state = _partial_state(settings, out, eps, name, meta.weights)
    with shown(console, folder.name, len(y)) as progress:
        result = evaluate(
            model, x, y, settings.attacks, eps, settings.norm, settings.seed, settings.batch_size, state, progress
        )
    few = _limited(test, min(len(test), MOST))
    with console.bar(f"F of {folder.name}", len(few)) as advance:
        attack = PGD(eps=eps, step=eps / 4, steps=STEPS, norm=settings.norm, seed=settings.seed)
        f = trained_vulnerability(model, meta.arch, few, attack, settings.batch_size, advance)
    summary = replace(
        result.evaluation,
        vulnerability=f,
        limit=settings.limit,
        data=settings.data,
        dataset=name,
        model=meta.arch,
        weights=meta.weights,
    )
    masks = result.masks
    same = next((kept for kept in earlier if alike(kept.summary, summary)), None)
    if same is not None:
        files = same.files
        summary, masks = _joined(summary, masks, same)
    else:
        files = Files(out, name_for(summary) if Files(out).summary.exists() else "")
        if files.name:
            console.say(f"{folder.name}: other evaluations are there; this one is {files.summary.name}")
    write_arrays(files.masks, {**masks, "labels": y.numpy()})
    spread = torch.linspace(0, len(y) - 1, min(PICTURED, len(y))).long()  # test sets are often sorted by class
    device = next(model.parameters()).device
    _save_examples(files.examples, model, x[spread].to(device), y[spread].to(device), eps, settings)
    write_json(files.summary, encode(summary))
    shutil.rmtree(state)
    for line in _lines(folder.name, summary):
        console.say(line)
    return Result(summary, masks)


def holds(settings: Evaluate) -> bool:
    """Whether the folder holds what an evaluation with `settings` would find, and maybe more attacks."""
    folder = find_model(settings.run)
    if folder is None:
        return False
    weights = codec.read(Description, folder / META).weights
    kept = [files for files in in_folder(settings.out or folder) if files.masks.exists()]
    return any(answers(codec.read(Evaluation, files.summary), settings, weights) for files in kept)


def _earlier(out: Path, settings: Evaluate, weights: str | None, console: Console) -> list[Kept]:
    """The evaluations in `out`, of which the network may have one already. RnasError if one is damaged, which is better
    known before the attacks, or if --out belongs to another network."""
    kept = read_all(out)
    if (strange := next((e for e in kept if not is_of(e.summary, weights)), None)) is None:
        return kept
    if settings.out is not None:
        raise RnasError(f"{strange.files.summary} is of another network than {settings.run}: choose another --out")
    if not strange.files.name:
        _put_aside(out, console)
    return [e for e in kept if is_of(e.summary, weights)]


def _joined(summary: Evaluation, masks: dict[str, Mask], earlier: Kept) -> tuple[Evaluation, dict[str, Mask]]:
    """A result with what an earlier evaluation of the same kind found by other attacks."""
    kept = {name: earlier.masks[name] for name in earlier.attacks if name not in masks and name in earlier.masks}
    masks = {**masks, **kept}
    answered = {_black_box_wins(earlier.masks)} - {_black_box_wins(masks)}  # it asked for attacks that were run since
    warnings = [*(w for w in earlier.summary.warnings if w not in answered), *summary.warnings]
    joined = replace(
        summary,
        attacks={**{name: earlier.summary.attacks[name] for name in kept}, **summary.attacks},
        union=of_union(masks),
        warnings=tuple(dict.fromkeys(warnings)),
        more={**earlier.summary.more, **summary.more},
    )
    return joined, masks


def _black_box_wins(masks: dict[str, Mask]) -> str | None:
    return trust.black_box_wins({name: (masks["clean"], mask) for name, mask in masks.items() if name != "clean"})


def _put_aside(folder: Path, console: Console) -> None:
    """Keep the evaluation.json of a network that `folder` no longer holds, under a name that is free."""
    taken = {files.name for files in in_folder(folder)}
    name = next(name for k in itertools.count(1) if (name := f"previous-{k}") not in taken)
    old, new = Files(folder), Files(folder, name)
    for before, after in ((old.masks, new.masks), (old.examples, new.examples), (old.summary, new.summary)):
        if before.exists():
            os.replace(before, after)
    console.say(f"{folder.name}: the evaluation of earlier weights is kept as {new.summary.name}")


def check_attacks(names: Sequence[str]) -> None:
    """RnasError for a name that is no attack, with the nearest ones."""
    for name in names:
        if name != "aa":
            attack_named(name, 8 / 255)


def model_folder(run: Path | str) -> Path:
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


def _test_images(settings: Evaluate, folder: Path, meta: Description) -> tuple[str, Split]:
    """The test images the network was made for, or those of --data; --limit of them, every class its share."""
    if settings.data is None:
        data = load_own_data(folder, meta)
    else:
        data = load_test_data(settings.data, folder, meta, image_size=settings.image_size)
    if tuple(data.classes) != meta.classes:
        raise RnasError(
            f"{data.name} has other classes than {folder / META}: {_disagreement(data.classes, meta.classes)}"
        )
    if data.image_size != meta.image_size:
        raise RnasError(
            f"{data.name} has images of {list(data.image_size)}: the network in {folder} takes {list(meta.image_size)}"
        )
    return data.name, _limited(data.test, settings.limit)


def _limited(test: Split, limit: int | None) -> Split:
    """`limit` test images, of every class its share: the same for every network."""
    n = min(limit or len(test), len(test))
    return test[stratified(test.labels, n, seed=0).nonzero()[:, 0]]


def _disagreement(classes: Sequence[str], known: Sequence[str]) -> str:
    """How the classes of images and of a network differ: only what differs, for they may be hundreds."""
    found = (
        ("only there", [c for c in classes if c not in known]),
        ("only here", [c for c in known if c not in classes]),
    )
    return "; ".join(f"{where} {_some(names)}" for where, names in found if names) or "the same in another order"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _partial_state(settings: Evaluate, out: Path, eps: float, name: str, weights: str | None) -> Path:
    """The folder that keeps an unfinished evaluation. RnasError if it holds one that would not be gone on with."""
    state = out / PARTIAL
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


def _save_examples(path: Path, model: torch.nn.Module, x: Tensor, y: Tensor, eps: float, settings: Evaluate) -> None:
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
    write_arrays(path, arrays)


def _lines(name: str, summary: Evaluation) -> list[str]:
    """The result as lines to print: one an attack, then the warnings."""
    lines = [
        f"{name}, {key}: {found.accuracy:.1%} ({found.interval[0]:.1%} to {found.interval[1]:.1%}, n = {summary.n})"
        + (", at any distance: ε does not bound it, and no union counts it" if key in UNBOUNDED else "")
        for key in ("clean", *summary.attacks, "union")
        if (found := summary.figure(key)) is not None and found.interval is not None
    ]
    lines.insert(1, f"{name}, chance: {summary.chance:.1%} (always answering the largest class)")
    if f := summary.vulnerability:
        value, low, high = apart(f.value, *f.interval)
        lines.append(f"{name}, F: {value} ({low} to {high}) under {f.attack}, mean of {f.layers} layers, n = {f.n}")
    return lines + [f"warning: {warning}" for warning in summary.warnings]
