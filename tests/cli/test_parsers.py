"""What every command has in common: help on each option, `--version`, a script, an installed command."""

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import REPOSITORY

import phi3v_dist

SCRIPTS = sorted((REPOSITORY / "launch").glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]


def parser_of(name: str) -> argparse.ArgumentParser:
    return importlib.import_module(f"phi3v_dist.cli.{name}").build_parser()


def with_subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from with_subparsers(inner)


def without_help(parser: argparse.ArgumentParser) -> list[str]:
    return [
        f"{each.prog} {'/'.join(action.option_strings) or action.dest}"
        for each in with_subparsers(parser)
        for action in each._actions
        if not isinstance(action, argparse._SubParsersAction) and not action.help
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_help(name):
    assert without_help(parser_of(name)) == []


def test_an_option_without_help_is_found_in_subcommands_too():
    parser = argparse.ArgumentParser(prog="x")
    inner = parser.add_subparsers().add_parser("inner")
    inner.add_argument("--silent")
    inner.add_argument("word")
    assert without_help(parser) == ["x inner --silent", "x inner word"]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_says_its_version(name, capsys):
    with pytest.raises(SystemExit) as end:
        parser_of(name).parse_args(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"phi3v-dist {phi3v_dist.__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_help_names_commands_as_they_were_started(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"/venv/bin/phi3v-{name}"])
    text = parser_of(name).format_help()
    assert f"usage: phi3v-{name}" in text and "launch/" not in text
    monkeypatch.setattr(sys, "argv", [f"launch/{name}.py"])
    text = parser_of(name).format_help()
    assert f"usage: python launch/{name}.py" in text and f"phi3v-{name}" not in text


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_a_script_only_calls_its_command(path: Path):
    text = path.read_text()
    assert f"from phi3v_dist.cli.{path.stem} import main\n" in text and len(text.splitlines()) <= 20


def test_every_script_is_an_installed_command():
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    installed = dict(re.findall(r"(\S+) = (\S+)", setup["options.entry_points"]["console_scripts"]))
    assert installed == {f"phi3v-{name}": f"phi3v_dist.cli.{name}:main" for name in NAMES}
