"""The command line: each subcommand is a settings class; this file only says which function runs it."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

import rnas
from rnas.compute import threads as process
from rnas.console import Console, wrapped
from rnas.errors import RnasError, out_of_memory, unknown
from rnas.files import is_text
from rnas.planning.effects import check_effect
from rnas.settings import Compare, Data, Distortion, Evaluate, Export, Report, Reproduce, Run, Search, Train, Zoo

process.settle()

_SETTINGS: tuple[type, ...] = (Run, Search, Train, Evaluate, Distortion, Reproduce, Report, Compare, Data, Zoo, Export)
COMMANDS = tuple(settings.__name__.lower() for settings in _SETTINGS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exits with 2 and one line on standard error for bad input, with 130 or 143 when interrupted
    by SIGINT or SIGTERM."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # such as Windows gives a pipe, in cp1252: ε becomes ?
            stream.reconfigure(errors="replace")
    if arguments == ["--version"]:
        print(f"rnas {rnas.__version__}")
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        _check_text(arguments)
        _run(parse(arguments))
    except RnasError as e:
        _complain(str(e))
        sys.exit(2)
    except OSError as e:
        where = e.filename or "writing"
        _complain(f"{where}: {e.strerror or e}")
        sys.exit(2)
    except (MemoryError, RuntimeError) as e:
        message = out_of_memory(e)
        if message is None:
            raise
        _complain(str(message))
        sys.exit(2)
    except KeyboardInterrupt as e:
        words, code = ("terminated", 143) if isinstance(e, _Terminated) else ("interrupted", 130)
        print(f"rnas: {words}{_KEPT.get(arguments[0], '')}", file=sys.stderr)
        sys.exit(code)


_KEPT = dict.fromkeys(("run", "search", "train", "evaluate"), "; what is finished is kept, --resume goes on")
_KEPT |= dict.fromkeys(("data", "reproduce"), "; what is finished is kept, the next call goes on")


def _complain(text: str) -> None:
    """One line on standard error; on a terminal, lines that break between words."""
    line = f"rnas: {_one_line(text)}"
    print(wrapped(line) if sys.stderr.isatty() else line, file=sys.stderr)


def _one_line(text: str) -> str:
    """`text` as it may be shown: the names of files, and what servers answer, can hold line ends and worse."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def _check_text(arguments: Sequence[str]) -> None:
    """RnasError for bytes that are no text, such as a name from a system with other letters: neither torch nor a JSON
    file takes them."""
    for argument in arguments:
        if not is_text(argument):
            raise RnasError(f"{argument!a} is not UTF-8: rename the file or folder")
        if re.fullmatch(r"(--[\w-]+=)?", argument):  # an unset variable of the shell; as a path, the current folder
            raise RnasError(f"the argument '{argument}' is empty: expected a value")


class _Terminated(KeyboardInterrupt):
    """SIGTERM: leave as after Ctrl-C, with everything cleaned up."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def parse(arguments: Sequence[str]) -> Any:
    """The settings that the command line `arguments` asks for.

    RnasError for values that cannot be, for options without effect and for an unknown command; SystemExit with 2, after
    a box of tyro's that names the nearest options, for a line that does not parse.
    """
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise unknown("command", arguments[0], COMMANDS)
    resumed = _resumed(list(arguments))
    if resumed is not None:
        return resumed
    command = _parse(arguments)
    check_effect(command)
    return command


def _resumed(arguments: list[str]) -> Any:
    """The settings of the run that `--resume RUN` names, which lie in its folder; None if the line names none so."""
    if not arguments or arguments[0] not in _RESUMED or "--resume" not in arguments:
        return None
    command, at = arguments[0], arguments.index("--resume")
    run = next(iter(arguments[at + 1 :]), "-")
    if run.startswith("-") or any(argument.split("=")[0] == "--out" for argument in arguments):
        return None
    from rnas.records.folder import settings_of

    rest = [*arguments[1:at], *arguments[at + 2 :]]
    flags = [argument.partition("=")[0] for argument in rest if argument.startswith("-")]
    if set(flags) - _ANYWHERE or (rest and not flags):
        raise RnasError(f"--resume {run} takes the settings from its folder: leave out {shlex.join(rest)}")
    asked = _parse([command, *_RESUMED[command], "--out", run, *rest])

    def kind(found: dict[str, Any]) -> type[Any]:
        return _settings_of_method(found["method"]) if command == "search" else type(asked)

    found = settings_of(asked.out, command, kind)
    return replace(found, device=asked.device, save_memory=asked.save_memory)


_ANYWHERE = {"--device", "--save-memory"}
"""The options that a run may go on with differently."""
_RESUMED: dict[str, list[str]] = {"run": [], "search": [], "train": ["ResNet18"]}
"""The commands with --resume RUN, and what stands for their positional arguments until the settings are known."""


def _parse(arguments: Sequence[str]) -> Any:
    """The settings that the command line `arguments` spells out; a search's are those of its method."""
    search = _search_settings(arguments)
    if search is not Search:
        _check_flags(arguments, search)
    named = bool(arguments) and arguments[0] in COMMANDS
    classes = [search if settings is Search else settings for settings in _SETTINGS]
    pairs = zip(COMMANDS, classes, strict=True)
    commands: Any = Union[tuple(_command(name, settings, whole=named) for name, settings in pairs)]  # noqa: UP007
    command = tyro.cli(
        commands,
        prog="rnas",
        description=rnas.__doc__,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
    )
    return _at_home(command)


def _command(name: str, settings: type, *, whole: bool) -> Any:
    """`settings` as a subcommand, with its `whole` description or, for the list of commands, the first line of it."""
    description = None if whole else str(settings.__doc__).partition("\n")[0]
    return Annotated[settings, tyro.conf.subcommand(name, description=description)]


def _search_settings(arguments: Sequence[str]) -> type[Search]:
    """The settings of the method that a search asks for; what all share, where it only asks for help on searches."""
    values = [a.partition("=")[2] or (*arguments, "")[i + 1] for i, a in enumerate(arguments) if _flag(a) == "method"]
    helps = {"-h", "--help"} & set(arguments)
    if list(arguments[:1]) != ["search"] or (helps and not values):
        return Search
    return _settings_of_method(values[-1] if values else Search.method)


def _settings_of_method(name: str) -> type[Search]:
    from rnas.nas.methods import load

    return load(name).settings


def _flag(argument: str) -> str:
    """The setting that an argument names."""
    return argument[2:].partition("=")[0].replace("-", "_") if argument.startswith("--") else ""


def _check_flags(arguments: Sequence[str], search: type[Search]) -> None:
    """RnasError for a flag of another search method."""
    from rnas.nas.methods import check_has

    for flag in filter(None, map(_flag, arguments)):
        check_has(search, flag)


def _at_home(value: Any) -> Any:
    """`value` with `~` as the home folder in every path of it: shells leave it alone in --out=~/runs."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # unlike Path.expanduser, leaves what it does not know
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _at_home(getattr(value, f.name)) for f in fields(value) if f.init})
    return value


def _run(command: Any) -> None:
    # Imports wait until a command is known: torch takes seconds, and --help needs none of it.
    match command:
        case Run():
            from rnas.pipeline import run

            run(command, Console())
        case Search():
            from rnas.nas.search import search
            from rnas.nas.seeds import search_seeds
            from rnas.planning.forecast import announce_search

            console = Console()
            if command.seeds is not None:
                table = search_seeds(command, console, lambda one: partial(announce_search, one, console))
                console.say(f"{table}\nwrote {command.out}/seeds.json\nnext: rnas report {_word(command.out)}")
                return
            found = search(command, console, announce=partial(announce_search, command, console))
            options = f" --data {shlex.quote(command.source.data)}{f' --cells {found.depth}' if found.depth else ''}"
            console.say(f"wrote {command.out}/genotype.json\nnext: rnas train {_word(command.out)}{options} --out RUN")
        case Train():
            from rnas.planning.forecast import announce_train
            from rnas.training.train import train

            console = Console()
            train(command, console, partial(announce_train, command, console))
            console.say(f"wrote {command.out}/model.safetensors\nnext: rnas evaluate {_word(command.out)}")
        case Evaluate():
            from rnas.evaluation.evaluate import evaluate_run

            console = Console()
            evaluate_run(command, console)
            console.say(f"wrote evaluation.json beside the network\nnext: rnas report {_word(command.run)}")
        case Distortion():
            from rnas.evaluation.distortion import distortion
            from rnas.report.distortion import draw_distortion

            for path in draw_distortion(distortion(command, Console()), command.out):
                print(f"wrote {path}")
            print("beside them distortion.json; of a training run of yours, rnas report shows it")
        case Reproduce():
            from rnas.reproduce import reproduce

            reproduce(command, Console())
        case Report():
            from rnas.report import write_report

            write_report(command.runs, command.out)
            print(f"wrote {command.out}\nnext: open it in a browser")
        case Compare():
            from rnas.report.compare import compare, to_json, to_text

            comparisons = compare(command.runs)
            print(to_json(comparisons) if command.json else to_text(comparisons))
        case Data():
            from rnas.data import prepare

            with Console(sys.stderr).stages() as progress:
                summary = prepare(command.name, command.data_root, command.mirror, progress)
            print(
                json.dumps(summary) if command.json else f"{_describe(summary)}\nnext: rnas run --data {command.name}"
            )
        case Zoo():
            from rnas.nets.zoo import table_text, zoo_table

            rows = zoo_table()
            print(
                json.dumps(rows, indent=1)
                if command.json
                else table_text(rows, markdown=command.markdown, width=shutil.get_terminal_size().columns)
            )
        case Export():
            from rnas.deploy.export import check_target, export
            from rnas.evaluation.evaluate import model_folder
            from rnas.nets.saved import load_model
            from rnas.records.codec import encode

            check_target(command.format, command.out)
            model, meta = load_model(model_folder(command.run))
            difference = export(model, encode(meta), command.format, command.out, meta.image_size)
            print(f"wrote {command.out}; its logits differ from the network's by {difference:.1e} at most")


def _word(path: Path) -> str:
    """`path` as it is written on a command line."""
    return shlex.quote(str(path))


def _describe(summary: dict[str, Any]) -> str:
    height, width = summary["image_size"]
    text = (
        f"{summary['name']}: {summary['train']:,} training and {summary['test']:,} test images "
        f"of {height}x{width} pixels, {len(summary['classes'])} classes, in {summary['folder'] or 'memory'}"
    )
    return text if summary["complete"] else f"{text}; these are not the official counts"


if __name__ == "__main__":
    main()
