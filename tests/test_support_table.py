"""docs/support.md says of each setting where it is tested, and nothing that the tests' marks do not say."""

from pathlib import Path

import pytest
from conftest import TESTS
from support_table import PAGE, cells_of, page


def test_the_page_is_what_the_marks_say(all_tests: list[pytest.Item]) -> None:
    wanted, written = page(cells_of(all_tests)).splitlines(), PAGE.read_text(encoding="utf-8").splitlines()
    assert written == wanted, "run `make support`"


def test_a_row_names_where_it_is_tested_or_says_that_it_is_not() -> None:
    shown = {"2 ranks": {TESTS / "x/test_quick.py": True, TESTS / "x/test_at_night.py": False}}
    lines = page({"lora": shown}).splitlines()
    cell = "[at night](../tests/x/test_at_night.py) *slow*<br>[quick](../tests/x/test_quick.py)"
    assert f"| `train.parts`: `lora` | – | {cell} | – | – | – |" in lines
    assert "| `train.parts`: `full` | **not tested** | – | – | – | – |" in lines


def test_a_mark_for_a_row_or_a_place_that_there_is_not_is_refused(request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match="has no row 'lroa'"):
        page({"lroa": {"2 ranks": {Path("x.py"): True}}})
    item = request.node
    item.add_marker(pytest.mark.supports("lora", on="3 ranks"))
    with pytest.raises(ValueError, match="`on` is '3 ranks', not one of one process, 2 ranks"):
        cells_of([item])
