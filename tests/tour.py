"""docs/tour.md → chapters: what to type, which files to write first, and what is then to be seen.

What comes in: the page. What goes out: `Chapter`s, each a list of fences in order. Surprise: a `text` fence is a claim.
Each of its lines must be in what the commands before it printed, with other numbers where there are numbers, and
anything where there is `…`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from commands import COMMAND_FENCES, FENCE, Command, commands_of
from conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "tour.md"
CHAPTER = re.compile(r"^## (\d+) (.+)$", re.M)
FILE_BEFORE = re.compile(r"`([\w./-]+)`:\s*\Z")
NUMBER = re.compile(r"\\?-?\d[\d,]*(?:(?:\\?\.|e\\?-?|:)\d+)*")
GAP = re.compile(r"(?:\\ |\s)+")


class File(NamedTuple):
    """What the reader is asked to write."""

    name: str
    text: str


class Claim(NamedTuple):
    """A line that is said to be seen."""

    line: str

    def is_in(self, output: str) -> bool:
        pattern = "".join(
            ".*" if part == "…" else GAP.sub(r"\\s+", NUMBER.sub(r"[-\\d][-\\d.,:e]*", re.escape(part)))
            for part in re.split(r"\s*(…)\s*", self.line.strip())
        )
        return re.search(pattern, output) is not None


@dataclass(frozen=True)
class Chapter:
    """items: in the order of the page."""

    number: int
    title: str
    items: tuple[Command | File | Claim, ...]

    def __str__(self) -> str:
        return f"{self.number}-{self.title.lower().replace(' ', '-').replace(',', '')}"


def chapters(page: Path = PAGE) -> list[Chapter]:
    """Raises ValueError: a fence that holds a file does not say which, in the words before it."""
    text = page.read_text(encoding="utf-8")
    begins = list(CHAPTER.finditer(text))
    ends = [following.start() for following in begins[1:]] + [len(text)]
    return [
        Chapter(int(found[1]), found[2], tuple(_items(page, text, found.end(), end)))
        for found, end in zip(begins, ends, strict=True)
    ]


def _items(page: Path, text: str, begin: int, end: int) -> list[Command | File | Claim]:
    items: list[Command | File | Claim] = []
    for fence in FENCE.finditer(text, begin, end):
        language, inside = fence[1], fence[2]
        if language in COMMAND_FENCES:
            first = text[: fence.start()].count("\n")
            items += [Command(page, first + c.line, c.text, c.note) for c in commands_of(page, fence[0])]
        elif language == "text":
            items += [Claim(line) for line in inside.splitlines() if line.strip()]
        else:
            name = FILE_BEFORE.search(text, begin, fence.start())
            if name is None:
                raise ValueError(f"{page}: the words before {inside.splitlines()[0]!r} do not end with `FILE`:")
            items.append(File(name[1], inside))
    return items
