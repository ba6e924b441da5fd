"""tests/support.yaml and the tests' own marks → docs/support.md: which settings are tested, and on what.

    make support

What comes in: rows by hand, and `@pytest.mark.supports(ROW, on=PLACE)` on tests. Surprise: most cells are
"–", not tested. It may work; nobody has shown it.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from fault_table import TESTS, collected

PAGE = TESTS.parent / "docs" / "support.md"
PLACES = {  # as marks name them → as the page does
    "one process": "one process", "2 ranks": "2 ranks", "more ranks": "3 and more", "Slurm": "Slurm, 2 nodes and more",
    "GPU": "a GPU",
}  # fmt: skip
HEAD = """# What is tested, and on what

Settings and ways to run, and the tests that carry their name. Written by `make support` from `tests/support.yaml` and
the marks on the tests; do not edit. – is **not tested**: it may work, and nobody has shown it.

- **one process**: without a launcher. **2 ranks**, **3 and more**: real processes, real ZeRO-3, on CPUs over gloo.
- **Slurm**: a real Slurm of virtual nodes on one machine (`tests/slurm`).
- **a GPU**: skipped where there is none, as in CI: a test that is there, and no result of every commit.
- *slow*: by `make test-slow` alone.
"""

Cells = dict[str, dict[str, dict[Path, bool]]]  # row → place → file of tests → whether a quick test of it is among them


def cells_of(items: Iterable[pytest.Item]) -> Cells:
    """Raises ValueError: a mark names a place that there is not."""
    cells: Cells = defaultdict(lambda: defaultdict(dict))
    for item in items:
        is_quick = item.get_closest_marker("slow") is None
        for mark in item.iter_markers("supports"):
            place = mark.kwargs.get("on")
            if place not in PLACES:
                raise ValueError(f"{item.nodeid}: `on` is {place!r}, not one of {', '.join(PLACES)}")
            for row in mark.args:
                files = cells[row][place]
                files[item.path] = files.get(item.path, False) or is_quick
    return cells


def page(cells: Cells) -> str:
    """docs/support.md as it should be. Raises ValueError when a test names a row there is not."""
    sections = yaml.safe_load((TESTS / "support.yaml").read_text(encoding="utf-8"))
    known = {row for rows in sections.values() for row in rows}
    if unknown := sorted(set(cells) - known):
        raise ValueError(f"tests/support.yaml has no row {', '.join(map(repr, unknown))}, which marks of tests name")
    lines = [HEAD]
    for section, rows in sections.items():
        lines += [f"## {section}", "", f"| | {' | '.join(PLACES.values())} |", f"| --- |{' --- |' * len(PLACES)}"]
        for row, text in rows.items():
            shown = [_cell(cells.get(row, {}).get(place, {})) for place in PLACES]
            if not any(shown):
                shown[0] = "**not tested**"
            lines.append(f"| {text} | {' | '.join(cell or '–' for cell in shown)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(files: dict[Path, bool]) -> str:
    names = {path: path.stem.removeprefix("test_").replace("_", " ") for path in files}
    return "<br>".join(
        f"[{names[path]}](../{path.relative_to(TESTS.parent)}){'' if files[path] else ' *slow*'}"
        for path in sorted(files, key=lambda path: names[path])
    )


def main() -> None:
    PAGE.write_text(page(cells_of(collected())), encoding="utf-8")


if __name__ == "__main__":
    main()
