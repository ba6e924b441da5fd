"""The model beside itself blind and untuned: names, pairs, and records of an earlier evaluation read back."""

import json
import logging

import pytest

from phi3v_dist.config import EvalSettings
from phi3v_dist.evaluate.breakdown import Judged
from phi3v_dist.evaluate.controls import read_judged, with_controls
from phi3v_dist.evaluate.score import score_answer
from phi3v_dist.observe.metrics import check, lookup

FIELDS = EvalSettings(fields={
    "price": {"pattern": "Price: ([0-9]+)", "kind": "number"},
    "colour": {"pattern": "A (.*?) square"},
}).fields  # fmt: skip
TRUTH = "A red square, Price: 100"


def judged(answer, blind=None, loss=1.0, tokens=4):
    def score(text):
        return score_answer(text, TRUTH, FIELDS, stopped=True, num_tokens=5)

    return Judged(score(answer), score(blind) if blind else None, {}, loss * tokens, tokens, {})


def test_the_controls_and_the_differences_are_those_computed_by_hand():
    tuned = [
        judged("A red square, Price: 90", "A blue square, Price: 50", loss=0.5),
        judged("A red square, Price: 100"),
    ]
    base = [judged("A cat", loss=3.0), judged("Price: 40", loss=5.0, tokens=12)]
    metrics = with_controls(tuned, base)
    check(metrics)
    assert {name: value for name, value in metrics.items() if "blind" in name} == pytest.approx({
        "eval/blind/samples": 1, "eval/blind/parse_fail_pct": 0, "eval/blind/stop_pct": 100,
        "eval/blind/gen_tokens/mean": 5, "eval/blind/field_em/colour": 0, "eval/blind/field_em/price": 0,
        "eval/blind/price_mae": 50, "eval/blind/price_within_10pct": 0, "eval/blind/price_median_ape_pct": 50,
        "eval/minus_blind/parse_fail_pct": 0, "eval/minus_blind/stop_pct": 0, "eval/minus_blind/gen_tokens/mean": 0,
        "eval/minus_blind/field_em/colour": 1, "eval/minus_blind/field_em/price": 0, "eval/minus_blind/price_mae": -40,
        "eval/minus_blind/price_within_10pct": 1, "eval/minus_blind/price_median_ape_pct": -40,
    })  # fmt: skip
    assert metrics["eval/loss"] == pytest.approx(0.75)
    assert metrics["eval/base/loss"] == pytest.approx((12 + 60) / 16)
    assert metrics["eval/minus_base/loss"] == pytest.approx(0.75 - 4.5)
    assert metrics["eval/base/parse_fail_pct"] == 100 and metrics["eval/minus_base/parse_fail_pct"] == -100
    assert metrics["eval/base/price_mae"] == 60
    assert metrics["eval/minus_base/price_mae"] == 0 - 60, "the second sample alone has an error on both sides"
    assert not any(name.endswith(("/low", "/high")) for name in metrics), "of two samples there is no interval"


def test_of_enough_samples_every_figure_and_difference_has_its_interval():
    tuned = [
        judged("A red square, Price: 90" if n % 3 else "A red square", "A blue square, Price: 50") for n in range(60)
    ]
    metrics = with_controls(tuned, [judged("A blue square, Price: 30") for _ in range(60)])
    check(metrics)
    for name in (
        "eval/loss",
        "eval/blind/price_mae",
        "eval/base/field_em/colour",
        "eval/minus_base/price_within_10pct",
    ):
        assert metrics[f"{name}/low"] <= metrics[name] <= metrics[f"{name}/high"]
    plain = {name for name in metrics if not name.endswith(("/low", "/high", "/samples"))}
    assert {f"{name}/{end}" for name in plain for end in ("low", "high")} | plain == {
        name for name in metrics if not name.endswith("/samples")
    }
    assert metrics["eval/minus_blind/parse_fail_pct/low"] > 0
    assert lookup("eval/minus_base/price_mae/low").better == "down"


def test_a_sample_the_untuned_model_was_not_asked_is_no_pair():
    metrics = with_controls([judged(TRUTH), judged("A blue square")], [None, judged(TRUTH)])
    assert metrics["eval/base/samples"] == 1
    assert (metrics["eval/field_em/colour"], metrics["eval/minus_base/field_em/colour"]) == (0.5, -1)
    assert not any("base" in name for name in with_controls([judged(TRUTH)], [None]))
    assert with_controls([], []) == {}


def test_records_are_judged_by_the_fields_of_now_and_damaged_lines_are_counted(tmp_path, caplog):
    row = {
        "shard": "a.tar", "key": "1", "loss": 0.5, "label_tokens": 4, "fields": {}, "parsed": True, "stopped": True,
        "num_tokens": 5, "prediction": "Price: 90", "target": TRUTH,
    }  # fmt: skip
    lines = [row, row | {"key": "2", "loss": None, "label_tokens": 0}, [1, 2], {"shard": 3}]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"')
    with caplog.at_level(logging.WARNING):
        found = read_judged(tmp_path, FIELDS)
    assert set(found) == {("a.tar", "1", TRUTH), ("a.tar", "2", TRUTH)}
    one = found["a.tar", "1", TRUTH]
    assert (one.loss_sum, one.label_tokens, one.score.fields["price"].error, one.score.parsed) == (2.0, 4, 10.0, False)
    assert found["a.tar", "2", TRUTH].label_tokens == 0
    assert "3 damaged lines" in caplog.text and str(tmp_path) in caplog.text
