"""Names commands in help and messages as this process was started.

Texts are written as commands are typed in the repository (`python launch/check.py`). An installation has `phi3v-check`.
"""

import re
import sys
from pathlib import Path

from phi3v_dist.resources import REPOSITORY

SCRIPTS = "launch"
LAUNCHED = re.compile(rf"(?<![\w.-])(deepspeed|torchrun)( (?:[^\n]|(?<=\\)\n)*?){SCRIPTS}/(\w+)\.py")
SPELLINGS = (  # in the repository → in an installation
    (LAUNCHED, r"\1\2--module phi3v_dist.cli.\3"),
    (re.compile(rf"(?:\bpython )?\b{SCRIPTS}/(\w+)\.py"), r"phi3v-\1"),
    (re.compile(rf"\b{SCRIPTS}/configs/"), "configs/"),
)
REMARK = re.compile(r"(\S)( {2,})(?=\S)")  # a column of explanations behind commands


def as_typed(text: str) -> str:
    """The text with our commands as people start them here. Columns behind commands stay where they are."""
    folder = _scripts_folder()
    if folder is None:
        return installed(text)
    return text if folder == Path(SCRIPTS) else re.sub(rf"\b{SCRIPTS}/(?=\w+\.py\b)", f"{folder}/", text)


def installed(text: str) -> str:
    """The text with our commands as an installation has them."""
    return "\n".join(_with_column(old, new) for old, new in _line_pairs(text))


def _line_pairs(text: str) -> list[tuple[str, str]]:
    """Each line before and after: the number of lines does not change."""
    new = text
    for pattern, spelling in SPELLINGS:
        new = pattern.sub(spelling, new)
    return list(zip(text.split("\n"), new.split("\n"), strict=True))


def _with_column(old: str, new: str) -> str:
    before, after = REMARK.search(old.lstrip()), REMARK.search(new.lstrip())
    if old == new or before is None or after is None:
        return new
    indent = len(new) - len(new.lstrip())
    place, column = indent + after.end(), len(old) - len(old.lstrip()) + before.end()
    return new[: indent + after.end(1)] + " " * max(2, len(after[2]) + column - place) + new[place:]


def _scripts_folder() -> Path | None:
    """The folder of `train.py` and its like as it was typed, or can be typed; None in an installation."""
    started = Path(sys.argv[0])
    if started.parent.name == SCRIPTS and started.suffix == ".py":
        return started.parent
    if started.name.startswith("phi3v-"):
        return None

    # Started with `python -m`, or by a program that imports us
    in_repository = Path.cwd() == REPOSITORY and Path(SCRIPTS, "train.py").is_file()
    return Path(SCRIPTS) if in_repository else None
