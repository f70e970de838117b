"""The whole pipeline of `rnas run`: search, train, evaluate, report, and export where the packages for it are there."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rnas.compute.device import choose_device, choose_precision, hardware
from rnas.console import Console
from rnas.data.sources import load_data
from rnas.deploy.export import check_target, export
from rnas.errors import RnasError
from rnas.evaluation.evaluate import check_attacks, evaluate_run, holds
from rnas.nas.methods.rnas import Settings
from rnas.nas.search import search
from rnas.nets.derived import check_image_size
from rnas.nets.saved import load_model
from rnas.planning import fit
from rnas.planning.budgets import Budget, is_fitted, plan, work
from rnas.records import layout
from rnas.records.codec import encode
from rnas.records.folder import Run as Folder
from rnas.records.layout import GENOTYPE, META, MODEL, REPORT
from rnas.report import write_report
from rnas.settings import Run
from rnas.training.train import train
from rnas.wording import roughly


def run(settings: Run, console: Console | None = None) -> Path:
    """Run the pipeline in `settings.out`; returns the path of the report.

    What an earlier call with the same settings finished is not done again (`resume`). RnasError for bad input, before
    anything is written.
    """
    console = console or Console(quiet=True)
    out = settings.out
    missing = _missing(out / MODEL)
    if missing is not None:
        console.say(f"note: without {MODEL} at the end: {missing}")
    data = load_data(settings.source, settings.seed, console, settings.out)
    try:
        check_image_size(data.image_size, 8, 4, "the search")
    except RnasError as e:
        raise RnasError(f"{e}; choose one with --image-size") from e
    check_attacks(settings.attacks or ())
    kept = (out / layout.FITTED).exists()
    choice = fit.choose(settings, data, console) if is_fitted(settings) else None
    if choice is None:
        budget = plan(settings, len(data.train))
        console.say(f"run: {work(budget)}")
    else:
        budget = plan(settings, len(data.train), choice.budget(settings.eps or data.eps_default))
        console.say(fit.describe(choice, budget, settings.minutes, kept))
    device, facts = hardware(choose_device(settings.device)), {"precision": choose_precision(settings.precision).name}
    with Folder.open(out, settings, resume=settings.resume, device=device, facts=facts):
        if choice is None:
            return _work(budget, out, console, missing)
        fit.keep(choice, out)
        with fit.threads(choice.threads):
            return _work(budget, out, console, missing, None if kept else float(choice.seconds))


def _work(
    budget: Budget[Settings], out: Path, console: Console, missing: str | None, seconds: float | None = None
) -> Path:
    """What is not done yet of a run in `out`; the path of the report. `missing` says why there can be no ONNX file,
    `seconds` how long the whole should take."""
    started, steps = time.perf_counter(), 2 + 2 * len(budget.trainings)
    report, exported = out / REPORT, out / MODEL
    evaluations = {name: replace(budget.evaluate, run=out / name) for name in budget.trainings}
    parts = (out / "search" / GENOTYPE, report, *([exported] if missing is None else []))
    if all(map(holds, evaluations.values())) and all(path.exists() for path in parts):
        console.say(f"the run in {out} is finished: nothing is left to do\nreport: {report}")
        return report

    def begin(step: int, what: str) -> None:
        spent = time.perf_counter() - started
        left = f"; {roughly(max(0.0, seconds - spent))} left for the whole" if seconds is not None else ""
        console.say(f"step {step} of {steps}: {what}{left}")

    if not (out / "search" / GENOTYPE).exists():
        begin(1, "search")
        search(budget.search, console)
    for k, (name, job) in enumerate(budget.trainings.items()):
        if not (out / name / META).exists():
            begin(2 + 2 * k, f"training of {name}")
            train(job, console)
        if not holds(evaluations[name]):
            begin(3 + 2 * k, f"evaluation of {name}")
            evaluate_run(evaluations[name], console)
    begin(steps, "report")
    write_report([out], report)
    console.say(f"report: {report}")
    if missing is None:
        model, meta = load_model(out / "train")
        export(model, encode(meta), "onnx", exported, meta.image_size)
        console.say(f"model: {exported}")
    else:
        console.say(f"model: {out / 'train'}; {missing}, then: rnas export {out} --out {exported}")
    console.say(f"next: open the report; rnas evaluate {out} --attacks aa attacks harder")
    return report


def _missing(file: Path) -> str | None:
    """Why the ONNX `file` cannot be written, such as packages that a plain installation lacks; None if it can."""
    try:
        check_target("onnx", file)
    except RnasError as e:
        return str(e)
    return None
