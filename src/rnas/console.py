"""What a person sees while a command works: rich bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Advance = Callable[[int], None]
Stage = Callable[[str, int, int], None]


class Console:
    """Prints to `stream` (stdout). Plain lines unless it is a terminal; nothing at all if `quiet`."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False):
        self.stream = stream or sys.stdout
        self.quiet = quiet

    def say(self, line: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(line, file=self.stream, flush=True)

    def asks(self, question: str) -> bool | None:
        """The answer to a question of yes or no; None where nobody is at a terminal to give one."""
        if self.quiet or not (self.stream.isatty() and sys.stdin.isatty()):
            return None
        self.say(question)
        return input("[y/N] ").strip().casefold() in ("y", "yes")

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Advance]:
        """A progress bar of `total` units while the context lasts, on a terminal; yields the function that moves it."""
        if self.quiet or not self.stream.isatty():
            yield lambda n: None
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=RichConsole(file=self.stream), transient=True) as progress:
            task = progress.add_task(description, total=total)
            yield lambda n: progress.advance(task, n)

    @contextmanager
    def stages(self) -> Iterator[Stage]:
        """Progress of work that reports (what, done, total): a bar on a terminal, else a line when `what` begins.

        What follows a colon in `what` is news of the same work, shown on a terminal only.
        """
        seen: set[str] = set()
        if self.quiet or not self.stream.isatty():

            def line(what: str, done: int, total: int) -> None:
                work = what.partition(":")[0]
                if work not in seen:
                    seen.add(work)
                    self.say(f"{work} ...")

            yield line
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=RichConsole(file=self.stream), transient=True) as progress:
            tasks: dict[str, TaskID] = {}

            def move(what: str, done: int, total: int) -> None:
                work = what.partition(":")[0]
                if work not in tasks:
                    tasks[work] = progress.add_task(what)
                progress.update(tasks[work], description=what, completed=done, total=total)

            yield move
