"""The whole pipeline of `rnas run`: search, train, evaluate, report, export, side by side in one folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rnas import fitting
from rnas.budget import Budget, is_fitted, plan
from rnas.console import Console
from rnas.errors import RnasError
from rnas.evaluation import check_attacks, evaluate_run, holds
from rnas.export import export
from rnas.nas.search import GENOTYPE, search
from rnas.nets.derived import check_image_size
from rnas.nets.saved import load_model
from rnas.report import write_report
from rnas.runs import Run as Folder
from rnas.settings import Run
from rnas.steps import choose_device, choose_precision, hardware, load_data
from rnas.train import train


def run(settings: Run, console: Console | None = None) -> Path:
    """Run the pipeline in `settings.out`; returns the path of the report.

    What an earlier call with the same settings finished is not done again (`resume`). RnasError for bad input, before
    anything is written.
    """
    console = console or Console(quiet=True)
    out = settings.out
    data = load_data(settings.source, settings.seed, console, settings.out)
    try:
        check_image_size(data.image_size, 8, 4, "the search")
    except RnasError as e:
        raise RnasError(f"{e}; choose one with --image-size") from e
    check_attacks(settings.attacks or ())
    kept = (out / fitting.FITTED).exists()
    choice = fitting.choose(settings, data, console) if is_fitted(settings) else None
    if choice is None:
        budget = plan(settings, len(data.train))
    else:
        budget = plan(settings, len(data.train), choice.changes(settings.eps or data.eps_default))
        console.say(fitting.describe(choice, budget, settings.minutes, kept))
    device, facts = hardware(choose_device(settings.device)), {"precision": choose_precision(settings.precision).name}
    with Folder.open(out, settings, resume=settings.resume, device=device, facts=facts):
        if choice is None:
            return _work(budget, out, console)
        fitting.keep(choice, out)
        with fitting.threads(choice.threads):
            return _work(budget, out, console)


def _work(budget: Budget, out: Path, console: Console) -> Path:
    """What is not done yet of a run in `out`; the path of the report."""
    report, exported = out / "report.html", out / "model.onnx"
    evaluations = {name: replace(budget.evaluate, run=out / name) for name in budget.trainings}
    if all(map(holds, evaluations.values())) and report.exists() and exported.exists():
        console.say(f"the run in {out} is finished: nothing is left to do\nreport: {report}\nmodel: {exported}")
        return report
    if not (out / "search" / GENOTYPE).exists():
        search(budget.search, console)
    for name, job in budget.trainings.items():
        if not (out / name / "model.json").exists():
            train(job, console)
        if not holds(evaluations[name]):
            evaluate_run(evaluations[name], console)
    model, meta = load_model(out / "train")
    export(model, meta, "onnx", exported, tuple(meta["image_size"]))
    write_report([out], report)
    console.say(f"report: {report}\nmodel: {exported}")
    return report
