"""The table of scores: which numbers stand where, in words, on a terminal and in a pipe."""

import io
import math

from rich.console import Console

from phi3v_dist.observe.score_table import ScoreRow, printed, score_rows, widened

NUMBERS = {
    "train/step": 10, "eval/samples": 240, "eval/skipped": 0, "eval/chance_category": 0.1,
    "eval/field_em/category": 0.9875, "eval/field_em/category/low": 0.9708, "eval/field_em/category/high": 1.0,
    "eval/blind/field_em/category": 0.15, "eval/base/field_em/category": 0.0,
    "eval/minus_blind/field_em/category": 0.8375, "eval/minus_blind/field_em/category/low": 0.7875,
    "eval/minus_blind/field_em/category/high": 0.8792,
    "eval/price_mae": 34.14, "eval/blind/price_mae": 264.9, "eval/best_price_mae": 9.304,
    "eval/minus_blind/price_mae": -230.7, "eval/minus_blind/price_mae/low": -255.1,
    "eval/minus_blind/price_mae/high": -209.0,
    "eval/by_source/is_a/field_em/category": 0.5,
}  # fmt: skip


def test_a_row_has_the_model_its_controls_and_how_far_apart_they_are():
    category, price = score_rows(NUMBERS)
    assert category == ScoreRow(
        "field_em/category", "98.8 % (97.1 to 100.0)", "0.0 %", "15.0 %", "", "+83.8 points (+78.8 to +87.9)", ""
    )
    assert price == ScoreRow("price_mae", "34.14", "", "264.9", "", "−230.7 (−255.1 to −209)", "9.304")


def test_columns_in_which_nothing_stands_are_left_out():
    plain = {"eval/samples": 3, "eval/loss": 1.5}
    assert [str(column.header) for column in printed(plain).columns] == ["", "model"]
    assert printed({"train/step": 3}) is None and printed({"eval/samples": 3.0}) is None
    assert score_rows({"eval/loss": math.nan})[0].model == "not finite"


def test_in_a_pipe_the_table_is_as_wide_as_it_needs():
    console = Console(file=io.StringIO(), width=80)
    widened(console).print(printed(NUMBERS))
    said = console.file.getvalue()
    assert "240 samples" in said and "(+78.8 to +87.9)" in said and "field_em/category" in said
