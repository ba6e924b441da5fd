"""Pages of docs → the commands on them, and whether their programs would take them.

What comes in: a Markdown page. What goes out: `Command`s as typed, with the remark behind `#`; and an error for one
whose program, options, settings or files are not there. Surprise: nothing is started. The parsers are the real ones,
stopped after they have parsed: argparse's of `phi3v_dist/cli/*.py`, DeepSpeed's and torchrun's, and `config.load` for
settings.

A fence without a language, or with `bash` or `sh`, holds commands; of one that has a line beginning with `$ ` only such
lines are, the others are output. `text`, `yaml`, `python`, `diff` and so on hold none.
"""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from conftest import REPOSITORY

from phi3v_dist import config
from phi3v_dist.errors import ConfigError

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
COMMAND_FENCES = ("", "bash", "sh")
ANY_CONFIG = REPOSITORY / "launch/configs/quickstart.yaml"  # stands for one that the reader has
ENDS_WORDS = {"|", "&&", ";", ">", ">>", "<", "&"}
OTHERS = {  # programs of others, of which nothing is known here but that they are meant
    "apptainer", "apt-get", "cat", "cp", "diff", "echo", "enroot", "export", "git", "head", "ls", "pip", "sacct",
    "scancel", "scontrol", "sinfo", "source", "squeue", "tail", "touch", "vllm", "wandb",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """text: as typed, without the remark. note: the remark. line: of the page, from 1."""

    page: Path
    line: int
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}: {self.text}"


def commands_of(page: Path, text: str | None = None) -> list[Command]:
    """In the order of the page. text: of a part of it, if not the whole."""
    text = page.read_text(encoding="utf-8") if text is None else text
    found = []
    for fence in FENCE.finditer(text):
        if fence[1] not in COMMAND_FENCES:
            continue
        lines, first = fence[2].splitlines(), text[: fence.start(2)].count("\n") + 1
        is_dialogue = any(line.startswith("$ ") for line in lines)
        typed, begin = "", 0
        for number, line in enumerate(lines):
            if not typed:
                if not line.strip() or line.lstrip().startswith("#") or is_dialogue and not line.startswith("$ "):
                    continue
                begin, line = number, line.removeprefix("$ ")
            if line.rstrip().endswith("\\"):
                typed += line.rstrip()[:-1] + " "
                continue
            whole = typed + line
            words, note = _split_remark(whole)
            found.append(Command(page, first + begin, words, note))
            typed = ""
    return found


def _split_remark(line: str) -> tuple[str, str]:
    quoted = ""
    for place, letter in enumerate(line):
        if quoted:
            quoted = "" if letter == quoted else quoted
        elif letter in "'\"":
            quoted = letter
        elif letter == "#" and line[place - 1 : place].isspace():
            return line[:place].strip(), line[place + 1 :].strip()
    return line.strip(), ""


def check(command: Command) -> None:
    """Raises AssertionError: it names what is wrong with it."""
    try:
        for words in _simple_commands(command.text):
            _check_words(words)
    except (ValueError, AssertionError, ConfigError) as error:
        raise AssertionError(f"{command}\n  {error}") from error


def _simple_commands(text: str) -> list[list[str]]:
    """`A=1 b c | d > e` → [[b, c], [d]]."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in ENDS_WORDS:
            found.append([word] if word in ("<", ">", ">>") else [])
        else:
            found[-1].append(word)
    simple = []
    for words in found:
        while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0], re.S):
            words = words[1:]
        if words and words[0] not in ("<", ">", ">>"):
            simple.append(words)
    return simple


def _check_words(words: Sequence[str]) -> None:
    program, rest = words[0], list(words[1:])
    match program:
        case "python":
            _check_python(rest)
        case "deepspeed":
            from deepspeed.launcher.runner import parse_args

            with _no_exit():
                launched = parse_args(rest)
            _check_python([launched.user_script, *launched.user_args])
        case "torchrun":
            from torch.distributed.run import parse_args as parse_torchrun

            with _no_exit():
                launched = parse_torchrun(rest)
            _check_python([launched.training_script, *launched.training_script_args])
        case "make":
            targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
            unknown = [word for word in rest if "=" not in word and word not in targets]
            assert not unknown, f"the Makefile has no target {', '.join(unknown)}"
        case "sbatch" | "slurm/train.sh" | "slurm/sweep.sh":
            _check_submission(list(words))
        case "srun":
            if "python" in rest:
                _check_python(rest[rest.index("python") + 1 :])
        case _ if program.startswith("phi3v-"):
            script = program.removeprefix("phi3v-")
            known = f"{program} = phi3v_dist.cli.{script}:main" in (REPOSITORY / "setup.cfg").read_text()
            assert known, f"setup.cfg has no command {program}"
            _check_python([f"launch/{script}.py", *rest])
        case _:
            assert program in OTHERS, f"what is {program!r}? (tests/commands.py knows no such program)"


def _check_submission(words: list[str]) -> None:
    script = next((n for n, word in enumerate(words) if word.startswith("slurm/")), None)
    assert script is not None, "no script of slurm/"
    assert (REPOSITORY / words[script]).is_file(), f"there is no {words[script]}"
    rest = words[script + 1 :]
    if words[script] in ("slurm/train.sh", "slurm/sweep.sh"):
        place = next((n for n, word in enumerate(rest) if word.endswith(".yaml")), None)
        assert place is not None, "no settings are named"
        _load(rest[place], [word for word in rest[place + 1 :] if not word.endswith(".txt")])


def _check_python(words: list[str]) -> None:
    script, rest = words[0], words[1:]
    if module := re.fullmatch(r"phi3v_dist\.cli\.(\w+)", script):  # after a launcher's --module
        script = f"launch/{module[1]}.py"
    if script in ("-c", "-m", "-"):
        return
    assert (REPOSITORY / script).is_file(), f"there is no {script}"
    if not script.startswith("launch/"):
        return
    if script == "launch/supervise.py" and "--" in rest:
        _check_words(rest[rest.index("--") + 1 :])
    namespace, more = parsed(script, rest)
    given = vars(namespace)
    if "source" in given and "mapping" in given:
        from phi3v_dist.data.importers import settings

        mapping = given["mapping"]
        settings.load(mapping if mapping is None or mapping.exists() else None, more)
    elif script == "launch/prepare.py" and "long" in given:
        from phi3v_dist.data.importers.documents import LongDocumentSettings
        from phi3v_dist.data.importers.sample import CatalogueSettings

        config.parse(LongDocumentSettings if given["long"] else CatalogueSettings, given["settings"])
    elif given.get("config"):
        _load(str(given["config"]), given.get("overrides") or [word for word in more if "=" in word])


def _load(path: str, overrides: Sequence[str]) -> None:
    """Settings of the repository as they are; of the reader's own files, the overrides over the quickstart's."""
    own = REPOSITORY / path
    inside = path.startswith("launch/configs/") and (own.exists() or own.name not in ("mine.yaml", "my.yaml"))
    assert not inside or own.is_file(), f"there is no {path}"
    words = [word for word in overrides if word != "…"]
    if not own.is_file() and any(word.startswith("train.epochs=") for word in words):
        words = ["train.steps=null", *words]
    config.load(own if own.is_file() else ANY_CONFIG, words)


class _Parsed(BaseException):
    pass


def parsed(script: str, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What the script's own parser makes of the words, and those that it leaves to settings."""
    depth, kept = 0, {}

    def stopping(name: str) -> Any:
        whole = getattr(argparse.ArgumentParser, name)

        def parse(self: argparse.ArgumentParser, *args: Any, **named: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = whole(self, *args, **named)
            finally:
                depth -= 1
            if depth:
                return result
            kept["result"] = result if isinstance(result, tuple) else (result, [])
            raise _Parsed

        return parse

    module = importlib.import_module(f"phi3v_dist.cli.{Path(script).stem}")
    names = ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args")
    with (
        mock.patch.multiple(argparse.ArgumentParser, **{name: stopping(name) for name in names}),
        mock.patch.object(sys, "argv", [script, *words]),
        _no_exit(),
    ):
        try:
            module.run_command()
        except _Parsed:
            return kept["result"]
    raise AssertionError(f"{script} parses nothing")


@contextmanager
def _no_exit():
    """A parser that ends the process has refused its words, and says why to stderr."""
    said: list[str] = []
    try:
        with mock.patch.object(argparse.ArgumentParser, "error", lambda self, message: _refuse(said, message)):
            yield
    except SystemExit as end:
        assert not end.code, "".join(said) or f"refused with {end.code}"


def _refuse(said: list[str], message: str) -> None:
    said.append(message)
    raise SystemExit(2)
