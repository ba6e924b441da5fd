"""tests/faults.yaml and the tests' own marks → docs/faults.md: each fault, what must happen, and which tests show it.

    make faults

What comes in: rows by hand, and `@pytest.mark.fault(ROW)` on tests. Surprise: the page cannot claim what no test has.
A row is "not yet" until a test carries its number.
"""

import contextlib
import io
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

TESTS = Path(__file__).parent
BAR = r"\|"  # in a cell of a Markdown table
PAGE = TESTS.parent / "docs" / "faults.md"
HEAD = """# Faults

What can go wrong, what must happen then, and the tests that show that it does. Written by `make faults` from
`tests/faults.yaml` and the marks on the tests; do not edit.

**E** stop with a clear error that names the thing · **S** skip, count and record the sample, go on · **R** resume by
itself, nothing lost or repeated · **W** go on with a visible warning.

{shown} of {rows} rows are shown by {tests} tests; the others say why not.
"""


Tests = dict[str, Path]  # name of the test function → its file


def rows_of(items: Iterable[pytest.Item]) -> dict[int, Tests]:
    """Row → the tests that carry its number."""
    rows: dict[int, Tests] = defaultdict(dict)
    for item in items:
        for mark in item.iter_markers("fault"):
            for row in mark.args:
                rows[row][item.name.partition("[")[0]] = item.path
    return rows


def page(shown: dict[int, Tests]) -> str:
    """docs/faults.md as it should be. Raises ValueError when a test names a row there is not."""
    sections = yaml.safe_load((TESTS / "faults.yaml").read_text(encoding="utf-8"))
    known = {row for rows in sections.values() for row in rows}
    if unknown := sorted(set(shown) - known):
        tests = ", ".join(name for row in unknown for name in shown[row])
        raise ValueError(
            f"tests/faults.yaml has no row {', '.join(map(str, unknown))}, which these tests carry: {tests}"
        )
    num_tests = len({name for tests in shown.values() for name in tests})
    lines = [HEAD.format(shown=len(shown), rows=len(known), tests=num_tests)]
    for section, rows in sections.items():
        lines += [f"## {section}", "", "| # | fault | expected | shown by |", "| --- | --- | --- | --- |"]
        for row, text in rows.items():
            tests = [
                f"[{name.removeprefix('test_').replace('_', ' ')}](../{path.relative_to(TESTS.parent)})"
                for name, path in sorted(shown.get(row, {}).items())
            ]
            cells = (str(row), text["fault"], text["expect"], "<br>".join(tests) or _why_untested(text))
            lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _why_untested(row: dict[str, str]) -> str:
    return f"no test: {row['untested']}" if "untested" in row else "not yet"


def collected() -> list[pytest.Item]:
    """All tests. Ends the program where they cannot be collected."""
    collector, printed = _Collector(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(TESTS)], plugins=[collector])
    if code != pytest.ExitCode.OK:
        sys.exit(f"{printed.getvalue()}\nthe tests cannot be collected, so the page cannot be written")
    return collector.items


class _Collector:
    """As a pytest plugin, keeps all tests, before any is left out."""

    items: list[pytest.Item]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items = list(items)


def main() -> None:
    PAGE.write_text(page(rows_of(collected())), encoding="utf-8")


if __name__ == "__main__":
    main()
