"""What a person sees: nothing breaks inside a word, and something moves in every phase."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rnas.console import Console, wrapped
from rnas.nas.methods.rnas import Settings as Search
from rnas.nas.search import search
from rnas.settings import Perturbation, SearchSpace, Source


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = "word " * 20 + "a/path/that/is/longer/than/the/terminal-is-wide/model.safetensors end"
    lines = wrapped(long).splitlines()
    assert " ".join(line.strip() for line in lines) == long
    assert sum(len(line) > 40 for line in lines) == 1, "the path stays whole"


def test_a_bar_and_lines_share_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    console = Console(screen)
    with console.bar("work", 10) as advance:
        advance(5)
        console.say("[1/2] half [of] it")
    assert "[1/2] half [of] it" in screen.getvalue()
    assert "50%" in screen.getvalue()


def test_every_phase_of_a_search_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, projection and measuring, and how far the whole is; nothing of it where no terminal is."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    settings = Search(
        tmp_path / "a",
        source=Source(limit_per_class=8),
        space=SearchSpace(cells=2, channels=2, nodes=1),
        perturbation=Perturbation(attack_steps=1),
        bound="0.01x",
        epochs=2,
        warmup=1,
        batch_size=20,
        monitor=20,
        projection_steps=3,
    )
    shown: list[tuple[str, float]] = []

    class Watched(Console):
        def stages(self, lines: bool = True):  # type: ignore[no-untyped-def]
            manager = super().stages(lines)

            class Both:
                def __enter__(self):  # type: ignore[no-untyped-def]
                    move = manager.__enter__()
                    return lambda what, done, total: (shown.append((what, done / total)), move(what, done, total))

                def __exit__(self, *error: object) -> None:
                    manager.__exit__(*error)  # type: ignore[arg-type]

            return Both()

    screen = io.StringIO()
    search(settings, Watched(screen))
    for phase in ("step 1 of", "projection", "measuring"):
        assert any(re.search(phase, what) for what, _ in shown)
    shares = [share for what, share in shown if what.startswith("search")]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5 < shares[-1] <= 1
    lines = [line for line in screen.getvalue().splitlines() if line.startswith("search 1/2")]
    assert len(lines) == 1
    assert lines[0].endswith("left")
    search(replace(settings, out=tmp_path / "b"))
