import pytest

from phi3v_dist.observe.metrics import (
    FIELD,
    NAME_PATTERN,
    PLACEHOLDER,
    REGISTRY,
    check,
    format_value,
    lookup,
    step_row,
)
from phi3v_dist.train.step import StepResult


def test_every_registered_name_is_one_that_dashboards_can_sort_and_filter() -> None:
    for metric in REGISTRY:
        assert NAME_PATTERN.fullmatch(PLACEHOLDER.sub("price", metric.name)), metric.name
        assert metric.unit and metric.help


def test_no_name_is_registered_twice() -> None:
    names = [metric.name.lower() for metric in REGISTRY]
    assert len(names) == len(set(names))


def test_every_evaluation_metric_has_its_blind_control() -> None:
    blind = {metric.name for metric in REGISTRY if metric.name.startswith("eval/blind/")}
    for name in ("samples", "<field>_mae", "field_em/<field>", "parse_fail_pct", "stop_pct", "gen_tokens/mean"):
        assert lookup(f"eval/{name.replace(FIELD, 'price')}") is not None
        assert f"eval/blind/{name}" in blind
    assert "eval/blind/loss" not in blind, "the control is asked for answers alone"


def test_a_name_with_a_field_gets_that_field_in_its_meaning() -> None:
    metric = lookup("eval/weight_kg_mae")
    assert metric is not None
    assert metric.help == "mean absolute error of weight_kg, over parsed answers"
    best = lookup("eval/best_price_mae")
    assert best is not None and "lowest error of price" in best.help


def test_a_metric_of_a_part_says_which_part() -> None:
    metric = lookup("eval/by_depth/from_0_25_to_0_5/field_em/title")
    assert metric is not None and metric.unit == "frac"
    assert metric.help == "share of samples whose title is exactly right; where depth is from_0_25_to_0_5"
    assert lookup("eval/blind/by_depth/from_0_to_1/price_mae") is not None
    assert lookup("eval/by_depth/from_0_to_1/stop_pct") is None


def test_an_unregistered_name_is_refused_by_name_with_its_nearest_neighbour() -> None:
    check({"train/step": 3, "train/loss": 1.5, "eval/blind/field_em/title": 0.1})
    with pytest.raises(AssertionError, match=r"'train/los' is not in the registry.*'train/loss'"):
        check({"train/step": 3, "train/los": 1.5})


@pytest.mark.parametrize("name", ["eval/Price_mae", "eval/price mae", "eval/field_em/", "loss", "train/loss/mean"])
def test_names_outside_the_patterns_are_strangers(name: str) -> None:
    assert lookup(name) is None


def test_a_value_that_is_not_a_plain_number_is_refused() -> None:
    with pytest.raises(AssertionError, match="train/loss.*plain number.*str"):
        check({"train/loss": "2.0"})  # type: ignore[dict-item]


def test_a_step_logs_registered_numbers_that_add_up() -> None:
    result = StepResult(
        step=7, loss=2.5, grad_norm=1.1, learning_rates={"text": 1e-3, "vision": 1e-4, "projector": 1e-3},
        label_tokens=90, tokens=900, images=6, samples=6, quarantined=0, sample_ids=(1, 2, 3, 4, 5, 6), rows=2,
        seconds={"data": 0.5, "fwd": 1.0, "bwd": 2.0, "opt": 0.5}, data_wait_s=0.3,
    )  # fmt: skip
    row = step_row(result, row_length_tokens=500, world_size=2)
    check(row)
    assert row["time/step_s"] == 4.0
    assert row["perf/tokens_per_s_per_gpu"] == 112.5
    assert row["data/pack_efficiency"] == 0.9
    assert row["data/stall_pct"] == pytest.approx(7.5)
    assert row["train/label_token_frac"] == 0.1


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("eval/field_em/category", 0.94583, "94.6 %"),
        ("eval/parse_fail_pct", 1.6667, "1.7 %"),
        ("run/wall_s", 11100.0, "3 h 05 min"),
        ("run/wall_s", 432.4, "7 min 12 s"),
        ("time/step_s", 0.8123, "0.812 s"),
        ("train/tokens", 2340000, "2,340,000"),
        ("eval/price_mae", 42.6991, "42.7"),
        ("train/loss", float("nan"), "not finite"),
    ],
)
def test_numbers_are_written_as_a_person_reads_them(name: str, value: float, text: str) -> None:
    assert format_value(name, value) == text
