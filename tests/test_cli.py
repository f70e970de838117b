"""The command line: quick help, and one clear sentence with exit code 2 for every kind of bad input."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rnas.cli import COMMANDS, main, parse
from rnas.records.folder import environment

CELL = {
    "normal": [["skip_connect", 0], ["skip_connect", 1]],
    "normal_concat": [2],
    "reduce": [["max_pool_3x3", 0], ["max_pool_3x3", 1]],
    "reduce_concat": [2],
}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("rnas: ")
    assert error.count("\n") == 1, "one sentence, no traceback"
    return error


def arrays(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """A small .npz's content, with some arrays changed or (None) left out."""
    x, y = np.zeros((8, 8, 8, 3), np.uint8), np.array([0, 1] * 4)
    every = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, **changes}
    return {name: value for name, value in every.items() if value is not None}


@pytest.mark.parametrize("command", [[], ["run"], ["search"], ["train"], ["evaluate"], ["report"]])
def test_help_loads_nothing_that_takes_its_time(command: list[str]) -> None:
    code = (
        "import sys, rnas.cli\ntry: rnas.cli.main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'numpy', 'scipy', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: rnas" in done.stdout.casefold()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("command", [["search", "--help"], ["evaluate", "--help"], ["train", "\udce9"], ["trän"]])
def test_output_that_is_not_utf_8(encoding: str, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the encoding lacks is replaced: a pipe on Windows is in cp1252, which has no ε."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(SystemExit):
        main(command)
    said = b"".join(s.buffer.getvalue() for s in (sys.stdout, sys.stderr) if not s.flush())
    assert b"rnas" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"y_test": None},
        {"x_train": np.zeros((8, 8, 8, 4), np.uint8)},
        {"x_train": np.zeros((8, 8, 8, 3), np.float64)},
        {"y_train": np.array([0, 2] * 4)},
        {"y_train": np.array([0, 1])},
        {"y_test": np.array([0.5] * 8)},
    ],
)
def test_npz_that_is_no_data_set(changes: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", **arrays(**changes))
    out = tmp_path / "out"
    error = refused(capsys, "search", "--data", str(tmp_path / "data.npz"), "--out", str(out))
    assert "data.npz" in error
    assert not out.exists(), "nothing is written"


def test_missing_and_unreadable_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert "nowhere.npz" in refused(capsys, "search", "--data", str(tmp_path / "nowhere.npz"), "--out", out)
    (tmp_path / "text.npz").write_text("not a zip file")
    assert "text.npz" in refused(capsys, "train", "ResNet18", "--data", str(tmp_path / "text.npz"), "--out", out)
    assert "cifar10" in refused(capsys, "search", "--data", "cifar", "--out", out)
    assert not Path(out).exists()


def test_folders_with_an_empty_class_or_a_truncated_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for name in ("cats", "dogs"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    (tmp_path / "train" / "birds").mkdir()
    out = str(tmp_path / "out")
    assert "birds" in refused(capsys, "search", "--data", str(tmp_path), "--out", out)
    (tmp_path / "train" / "birds").rmdir()
    broken = tmp_path / "train" / "cats" / "2.png"
    Image.effect_noise((64, 64), 50).save(broken)
    broken.write_bytes(broken.read_bytes()[:200])
    assert "2.png" in refused(capsys, "search", "--data", str(tmp_path), "--out", out, "--image-size", "8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normal": [["sep_conv_3", 0], ["skip_connect", 1]]}, "did you mean sep_conv_3x3"),
        ({"normal": [["skip_connect", 0], ["skip_connect", 2]]}, "earlier nodes"),
        ({"normal_concat": [1, 2]}, "concat"),
        ({"reduce": []}, "reduce"),
        ({"reduce_concat": None}, "reduce_concat"),
    ],
)
def test_genotypes_that_are_none(change: dict, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cell.json"
    path.write_text(json.dumps({**CELL, **change}))
    error = refused(capsys, "train", str(path), "--out", str(tmp_path / "out"))
    assert said in error
    assert "cell.json" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["search", "--method", "rns"], "did you mean rnas"),
        (["search", "--bound", "-1"], "above 0"),
        (["search", "--bound", "tight"], "such as 0.5x"),
        (["search", "--eps", "0"], "eps is 0"),
        (["search", "--eps", "8"], "(0, 1]"),
        (["search", "--channels", "0"], "channels is 0"),
        (["search", "--epochs", "0"], "epochs is 0"),
        (["search", "--epochs", "5", "--warmup", "5"], "warmup is 5 of 5"),
        (["search", "--batch-size", "4096"], "smaller --batch-size"),
        (["train", "RNAS-X"], "did you mean RNAS-"),
        (["train", "DSRNA"], "DSRNA"),
        (["train", "nowhere.json"], "nowhere.json"),
        (["train", "RNAS-L", "--drop-path", "1"], "drop-path"),
        (["train", "RNAS-L", "--clip", "nan"], "clip is nan"),
        (["train", "RNAS-L", "--momentum", "1"], "momentum is 1"),
        (["search", "--momentum", "1.5"], "momentum is 1.5"),
        (["search", "--lr", "inf"], "lr is inf: expected a finite number, 0 or more"),
        (["search", "--bound="], "'--bound=' is empty"),
        (["train", "RNAS-L", "--seed", "-5"], "seed is -5"),
        (["search", "--eps", "1e400"], "eps is inf"),
        (["search", "--clip", "-1"], "clip is -1"),
        (["search", "--data", "x" * 300], "x" * 300),
    ],
)
def test_settings_that_cannot_be(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_unknown_attacks_get_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = "train SqueezeNet --limit-per-class 4 --batch-size 32 --epochs 1 --standard".split()
    main([*training, "--out", str(tmp_path)])
    assert "pgd20" in refused(capsys, "evaluate", str(tmp_path), "--attacks", "pgd-20")
    assert not (tmp_path / "evaluation.json").exists()


def test_folders_that_hold_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "model.json" in refused(capsys, "evaluate", str(tmp_path))
    assert "genotype.json" in refused(capsys, "train", str(tmp_path), "--out", str(tmp_path / "out"))
    assert str(tmp_path) in refused(capsys, "report", str(tmp_path), "--out", str(tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


def test_an_empty_name_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a path it would be the current one: --out "$UNSET"."""
    monkeypatch.chdir(tmp_path)
    assert "is empty" in refused(capsys, "search", "--epochs", "2", "--out", "")
    assert not list(tmp_path.iterdir())


def test_the_home_folder_after_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = parse(["train", "RNAS-L", "--out=~/runs/a", "--data-root=~/data"])
    assert settings.out == tmp_path / "runs/a"
    assert settings.source.data_root == tmp_path / "data"
    assert parse(["report", "~/runs/a", "b", "--out", "c"]).runs == (tmp_path / "runs/a", Path("b"))


def test_a_run_does_not_lie_among_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
    out = str(tmp_path / "runs")
    for command in (["run"], ["search"], ["train", "RNAS-L"]):
        said = refused(capsys, *command, "--data", str(tmp_path), "--test-fraction", "0.2", "--out", out)
        assert "among the class folders" in said


def test_a_table_has_one_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert "choose one" in refused(capsys, "zoo", "--json", "--markdown")


def test_an_output_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "run")
    assert "cannot write" in refused(capsys, "search", "--out", out, "--batch-size", "32", "--epochs", "2")
    assert "is a file" in refused(capsys, "search", "--out", str(tmp_path / "file"), "--epochs", "2")


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "inter")]
)
def test_a_signal_ends_a_run_cleanly(number: int, code: int, word: str, tmp_path: Path) -> None:
    """What `timeout`, a cluster or Ctrl-C send: one sentence, and no temporary file is left."""
    command = [
        sys.executable,
        "-m",
        "rnas",
        "search",
        "--data",
        "digits",
        "--epochs",
        "9",
        "--out",
        str(tmp_path / "x"),
    ]
    process = subprocess.Popen(
        [*command, "--limit-per-class", "30"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # which `pytest &` ignores
    )
    while not (tmp_path / "x" / "environment.json").exists():
        assert process.poll() is None, "the search ended before it could be interrupted"
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == code
    assert word in error
    assert "--resume goes on" in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.tmp"))


def test_images_that_changed_are_told_from_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", **arrays())
    options = [
        "train",
        "ResNet18",
        "--data",
        str(tmp_path / "a.npz"),
        "--out",
        str(tmp_path / "x"),
        "--batch-size",
        "4",
    ]
    main([*options, "--epochs", "1", "--attack-steps", "1", "--image-size", "8"])
    capsys.readouterr()
    np.savez(tmp_path / "a.npz", **arrays(x_train=np.full((8, 8, 8, 3), 9, np.uint8)))
    said = refused(capsys, *options, "--epochs", "1", "--attack-steps", "1", "--image-size", "8", "--resume")
    assert "on other images" in said
    assert "statistics" not in said


def test_a_misspelt_array_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", **arrays(x_train=None), X_train=np.zeros(3))
    said = refused(capsys, "train", "ResNet18", "--data", str(tmp_path / "a.npz"), "--out", str(tmp_path / "x"))
    assert "lacks x_train" in said
    assert "X_train" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("run --image-size x", "--image-size"),
        ("run --image-size 4.5", "--image-size"),
        ("run --eps 8/a", "--eps"),
        ("search --out o --lr fast", "--lr"),
        ("data", "digits, cifar10"),
        ("train", "--out"),
        ("search --out o --epoch 3", "--epochs"),
        ("train RNAS-L --out o --bacth-size 3", "--batch-size"),
        ("run --budget big", "small"),
        ("search --out", "--out"),
        ("evaluate run --epochs 3", "--epochs"),
    ],
)
def test_a_command_line_that_does_not_parse(
    arguments: str, named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """tyro says what is wrong, and which options are near."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert "<" not in error, "nothing of Python's insides"


def test_a_mistyped_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean train" in refused(capsys, "trian", "RNAS-L")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train RNAS-L --standard --loss trades", "--loss"),
        ("train RNAS-L --standard --eps 8/255", "--eps"),
        ("train RNAS-L --trades-beta 3", "--trades-beta"),
        ("train ResNet18 --cells 3", "--cells"),
        ("train vgg16 --drop-path 0.1 --stem-stride 2", "--stem-stride and --drop-path"),
        ("search --bound 0x", "0x"),
        ("search --bound 0", "bound is '0'"),
        ("reproduce table1 --budget smoke --bounds 1e-2", "--bounds"),
    ],
)
def test_options_without_effect_are_refused(
    arguments: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(capsys, *arguments.split(), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_no_memory_is_told_with_what_helps(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: object) -> None:
        raise error

    monkeypatch.setattr("rnas.training.train.train", train)
    said = refused(capsys, "train", "RNAS-L", "--data", "digits", "--out", str(tmp_path / "out"))
    assert "out of memory" in said
    assert "--batch-size" in said
    assert "--save-memory" in said


def test_another_error_of_torch_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("rnas.training.train.train", train)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "RNAS-L", "--data", "digits", "--out", str(tmp_path / "out")])


def test_a_source_tree_without_git_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert environment("cpu", 0).commit is None


def test_a_name_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    assert "is not UTF-8" in refused(capsys, "run", "--data", folder, "--out", str(tmp_path / "out"))


def test_names_with_line_ends_stay_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/ant", "train/bee", "test/ant", "test/bee"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name / "0.png")
    (tmp_path / "train/ant/bad\n\x1b[31mred.png").write_bytes(b"no image")
    said = refused(capsys, "search", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    assert r"bad\n\x1b[31mred.png" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_and_describes_every_option(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    help_ = capsys.readouterr().out
    examples = [line for line in help_.splitlines() if line.startswith("    rnas ")]
    assert examples
    for example in examples:
        parse(example.split()[1:])
    assert max(map(len, help_.splitlines())) <= 80
    assert "None" not in help_
    rows = [line.strip("│ ").strip() for line in help_.splitlines() if line.startswith("│")]
    for row, below in itertools.pairwise([*rows, "-"]):
        if row.startswith("--"):
            text = re.sub(r"^--\S+( \S+( \[[^\]]*\])?)?", "", row).strip() or below
            assert text[0].isalnum() or text[0] == "α", f"nothing is said of {row}"
