"""Runs the steps of a plan that are not done yet; what was cut off goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rnas.console import Console
from rnas.errors import RnasError, out_of_memory
from rnas.evaluation.distortion import distortion
from rnas.evaluation.evaluate import evaluate_run, holds
from rnas.nas.search import search
from rnas.records.layout import DISTORTION, GENOTYPE, META
from rnas.reproduce.plan import Plan, Step
from rnas.settings import Distortion, Evaluate, Search, Train
from rnas.training.train import train


def finished(step: Step) -> bool:
    """Whether `step` was done, by whichever table or figure: an evaluation may hold more attacks than are wanted."""
    match step:
        case Search():
            return (step.out / GENOTYPE).exists()
        case Train():
            return (step.out / META).exists()
        case Evaluate():
            return holds(step)
        case Distortion():
            return (step.out / DISTORTION).exists()


def perform(step: Step, console: Console) -> None:
    """Do `step`, or the rest of it."""
    match step:
        case Search():
            search(step, console)
        case Train():
            train(step, console)
        case Evaluate():
            evaluate_run(step, console)
        case Distortion():
            distortion(step, console)


def needs(step: Step, plan: Plan) -> list[Path]:
    """The paths of the steps without which `step` cannot begin."""
    match step:
        case Search():
            return []
        case Train():
            found = [Path(step.arch)]
        case Evaluate():
            found = [step.run]
        case Distortion():
            found = [Path(name) for name in step.networks]
    return [path for path in found if path in plan.steps]


def run_missing(plan: Plan, console: Console, after: Callable[[dict[Path, str]], None]) -> dict[Path, str]:
    """Run what is missing. A step that fails (its loss is no longer finite, memory runs out) is told of and left, and
    what needs it is left too: the rest goes on. Returns why, for each of these; `after` is called with it after each
    step."""
    failed: dict[Path, str] = {}
    for i, (path, step) in enumerate(plan.steps.items(), 1):
        lost = next((failed[p] for p in needs(step, plan) if p in failed), None)
        if lost is not None:
            failed[path] = lost
        elif not finished(step):
            console.say(f"[{i}/{len(plan.steps)}] {path.relative_to(plan.settings.out)}")
            try:
                perform(step, console)
            except (RnasError, MemoryError, RuntimeError) as e:
                error = e if isinstance(e, RnasError) else out_of_memory(e)
                if error is None:
                    raise
                console.say(f"failed: {error}")
                failed[path] = str(error)
            after(failed)
    return failed
