"""How far a search is, and about how long the rest of it takes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

from rnas.console import Stage
from rnas.wording import roughly


class Progress:
    """Counted in passes of a batch: how many an epoch takes is known beforehand; within an epoch every pass moves."""

    def __init__(self, epochs: Iterable[float], finished: int, show: Stage):
        """`epochs`: the passes of each epoch; `finished` of them have been made before."""
        self.after = [0.0, *itertools.accumulate(epochs)]
        self.show = show
        self.started, self.first = time.perf_counter(), self.after[finished]
        self.epoch, self.done = finished, self.first

    def begin(self, epoch: int) -> None:
        """An epoch (from 1) begins."""
        self.epoch, self.done = epoch, self.after[epoch - 1]

    def moved(self, what: str, passes: float) -> None:
        """So many passes more of what is being done."""
        self.done = min(self.done + passes, self.after[self.epoch])
        epochs = len(self.after) - 1
        self.show(f"search: epoch {self.epoch} of {epochs}, {what}", self.done, self.after[-1])

    def left(self) -> str:
        """The time that is left for the whole, by the time that it took so far; nothing at the end."""
        done = self.after[self.epoch]
        if done >= self.after[-1]:
            return ""
        seconds = (time.perf_counter() - self.started) * (self.after[-1] - done) / (done - self.first)
        return f"; {roughly(seconds)} left"
