"""docs/faults.md says of each fault which tests show it, and nothing that the tests' marks do not say."""

from pathlib import Path

import pytest
from conftest import TESTS
from fault_table import PAGE, page, rows_of


def test_the_page_is_what_the_marks_say(all_tests: list[pytest.Item]) -> None:
    wanted, written = page(rows_of(all_tests)).splitlines(), PAGE.read_text(encoding="utf-8").splitlines()
    assert written == wanted, "run `make faults`"


def test_a_row_names_its_tests_or_says_not_yet() -> None:
    text = page({64: {"test_a_cut_picture": TESTS / "data" / "test_x.py"}})
    assert "| 64 | truncated JPEG | S | [a cut picture](../tests/data/test_x.py) |" in text
    assert "1 of 101 rows are shown by 1 tests" in text and text.count("| not yet |") + text.count("| no test: ") == 100
    assert r"`<\|end\|>`" in text  # a bar inside a cell


def test_a_mark_with_a_number_that_is_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="has no row 999, which these tests carry: test_typo"):
        page({999: {"test_typo": Path("x.py")}})
