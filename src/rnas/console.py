"""What a person sees while a command works: rich bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Advance = Callable[[float], None]
Stage = Callable[[str, float, float], None]


def wrapped(text: str) -> str:
    """`text` broken between words to the width of the terminal; a word that is longer than that stays whole."""
    width = shutil.get_terminal_size().columns
    lines = (
        textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )
    return "\n".join(lines)


class Console:
    """Prints to `stream` (stdout). Plain lines unless it is a terminal; nothing at all if `quiet`."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False):
        self.stream = stream or sys.stdout
        self.quiet = quiet
        self._above: Callable[[str], None] | None = None  # prints above the bars that are on the screen

    def say(self, line: str) -> None:
        """Print one line; on a terminal as many as it takes without a break inside a word."""
        if self.quiet:
            return
        text = wrapped(line) if self.stream.isatty() else line
        if self._above is not None:
            self._above(text)
        else:
            print(text, file=self.stream, flush=True)

    def asks(self, question: str) -> bool | None:
        """The answer to a question of yes or no; None where nobody is at a terminal to give one."""
        if self.quiet or not (self.stream.isatty() and sys.stdin.isatty()):
            return None
        self.say(question)
        return input("[y/N] ").strip().casefold() in ("y", "yes")

    @contextmanager
    def bar(self, description: str, total: float) -> Iterator[Advance]:
        """A progress bar of `total` units while the context lasts, on a terminal; yields the function that moves it."""
        done = 0.0
        with self.stages(lines=False) as move:

            def advance(n: float) -> None:
                nonlocal done
                done += n
                move(description, done, total)

            move(description, 0, total)
            yield advance

    @contextmanager
    def stages(self, lines: bool = True) -> Iterator[Stage]:
        """Progress of work that reports (what, done, total): a bar on a terminal with the time that is left, else, with
        `lines`, a line when `what` begins.

        What follows a colon in `what` is news of the same work, shown on a terminal only.
        """
        seen: set[str] = set()
        if self.quiet or not self.stream.isatty():

            def line(what: str, done: float, total: float) -> None:
                work = what.partition(":")[0]
                if lines and work not in seen:
                    seen.add(work)
                    self.say(f"{work} ...")

            yield line
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:.0f}%"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        screen = RichConsole(file=self.stream)
        with Progress(*columns, console=screen, transient=True, speed_estimate_period=300) as progress:
            tasks: dict[str, TaskID] = {}

            def move(what: str, done: float, total: float) -> None:
                work = what.partition(":")[0]
                if work not in tasks:
                    tasks[work] = progress.add_task(what)
                progress.update(tasks[work], description=what, completed=done, total=total)

            self._above = lambda text: screen.print(text, markup=False, highlight=False, soft_wrap=True)
            try:
                yield move
            finally:
                self._above = None
