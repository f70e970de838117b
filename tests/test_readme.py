"""What the README shows is there: its commands parse, its files exist, its Python names are real."""

import re
import shlex
from pathlib import Path

import pytest

import rnas
from rnas import cli
from rnas.records.folder import command_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if ".venv/bin/rnas" in line]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    parsed = cli.parse(shlex.split(command)[1:])
    assert command_of(parsed) == shlex.split(command)[1]


def test_there_are_commands_to_try() -> None:
    assert len(commands()) >= 9


@pytest.mark.parametrize("name", sorted(set(re.findall(r"rnas\.(\w+)\(", README))))
def test_python_names_exist(name: str) -> None:
    assert callable(getattr(rnas, name))


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets
