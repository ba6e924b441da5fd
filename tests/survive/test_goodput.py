"""The simulation against closed forms and against one that goes step by step; a run's record against sums by hand."""

import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v_dist.cli import check as launch_check
from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.survive.goodput import Costs, costs_of, measured, poisson, simulate
from phi3v_dist.survive.interval import daly_s

HOUR = 3600.0
CHEAP = Costs(step_s=10.0, blocked_s=1.0, write_s=20.0, restart_s=100.0)


def slowly(failures_s: list[float], costs: Costs, total_s: float, every_steps: int) -> tuple[int, int]:
    """Steps kept and lost, by living through every step; the same rules in other words."""
    period_s = costs.step_s + costs.between_s
    every_steps = max(every_steps, math.ceil(costs.write_s / period_s - 1e-9))
    kept = lost = 0
    ends = [*failures_s, total_s]
    for begin_s, end_s in zip([0.0, *failures_s], ends, strict=True):
        now_s, done, safe, writes = begin_s + costs.restart_s, 0, 0, []
        while now_s + period_s <= end_s + 1e-6:
            now_s += period_s
            done += 1
            if done % every_steps == 0:
                now_s += costs.blocked_s
                writes.append((now_s + costs.write_s, done))
        safe = max([steps for written_s, steps in writes if written_s <= end_s + 1e-6], default=0)
        kept, lost = (kept + done, lost) if end_s == total_s else (kept + safe, lost + done - safe)
    return kept, lost


quarters = st.integers(0, 400).map(lambda n: n / 4)  # sums of these are exact
some_costs = st.builds(
    Costs, step_s=st.integers(1, 40).map(lambda n: n / 4), blocked_s=quarters, write_s=quarters, restart_s=quarters,
    between_s=st.integers(0, 8).map(lambda n: n / 4),
)  # fmt: skip
some_failures = st.lists(st.integers(1, 3999).map(lambda n: n / 2), max_size=8, unique=True).map(sorted)


@given(failures_s=some_failures, costs=some_costs, every_steps=st.integers(1, 30))
def test_it_keeps_and_loses_the_steps_that_a_run_gone_through_one_by_one_does(
    failures_s: list[float], costs: Costs, every_steps: int
) -> None:
    found = simulate(failures_s, costs, 2000.0, 0.0, every_steps)
    kept, lost = slowly(failures_s, costs, 2000.0, every_steps)
    assert (round(found.useful_s / costs.step_s), found.num_lost_steps) == (kept, lost)


@given(failures_s=some_failures, costs=some_costs, interval_s=st.integers(0, 2000).map(float))
def test_no_second_is_counted_twice_and_failures_only_hurt(
    failures_s: list[float], costs: Costs, interval_s: float
) -> None:
    found = simulate(failures_s, costs, 2000.0, interval_s)
    parts_s = (found.useful_s, found.lost_s, found.blocked_s, found.restart_s)
    assert min(parts_s) >= 0 and sum(parts_s) <= 2000.0 + 1e-6
    undisturbed = simulate([], costs, 2000.0, interval_s)
    assert 0 <= found.frac <= undisturbed.frac <= 1 and undisturbed.num_lost_steps == 0
    assert found.num_launches == len(failures_s) + 1


def test_without_failures_only_the_start_and_the_saves_take_time() -> None:
    found = simulate([], CHEAP, 100.0 + 50 * (30 * 10.0 + 1.0), interval_s=301.0)
    assert found.useful_s == 50 * 300.0 and found.blocked_s == 50.0 and found.restart_s == 100.0


@pytest.mark.parametrize("mean_s", [2 * HOUR, 12 * HOUR])
def test_over_many_failures_it_comes_to_dalys_expected_value(mean_s: float) -> None:
    costs = Costs(step_s=1.0, blocked_s=60.0, write_s=0.0, restart_s=600.0)
    for interval_s in (daly_s(60.0, mean_s), 1000.0, HOUR):
        num_steps = math.ceil(interval_s - 60.0)
        expected = num_steps / (mean_s * math.exp(600 / mean_s) * math.expm1((num_steps + 60) / mean_s))
        total_s = 1000 * mean_s
        seeds = range(10)
        found = [simulate(poisson(mean_s, total_s, seed), costs, total_s, interval_s).frac for seed in seeds]
        assert sum(found) / len(found) == pytest.approx(expected, rel=0.01)


def test_dalys_interval_loses_less_than_others_also_in_the_simulation() -> None:
    mean_s, total_s = 6 * HOUR, 2000 * 6 * HOUR
    costs = Costs(step_s=5.0, blocked_s=30.0, write_s=60.0, restart_s=300.0)
    failures_s = poisson(mean_s, total_s, seed=3)
    best = simulate(failures_s, costs, total_s, daly_s(30.0, mean_s))
    for factor in (0.2, 0.5, 2.0, 5.0):
        assert best.frac > simulate(failures_s, costs, total_s, factor * daly_s(30.0, mean_s)).frac


def test_a_failure_inside_a_write_costs_that_save_and_the_interval_before_it() -> None:
    saved_s = 100.0 + 30 * 10.0 + 1.0  # the first step begins at 100; the 30 steps are copied at 401, written at 421
    inside = simulate([saved_s + 19.0], CHEAP, 2000.0, 0.0, every_steps=30)
    after = simulate([saved_s + 20.0], CHEAP, 2000.0, 0.0, every_steps=30)
    assert inside.num_lost_steps == 30 + 1 and after.num_lost_steps == 2


def test_a_failure_during_the_restart_begins_it_again() -> None:
    found = simulate([1000.0, 1099.0], CHEAP, 1200.0, 0.0, every_steps=1000)
    assert found.restart_s == 100.0 + 99.0 + 100.0 and found.useful_s == 0.0
    assert simulate([1000.0], CHEAP, 1200.0, 0.0, every_steps=1000).useful_s == 100.0


def test_restarts_may_differ() -> None:
    found = simulate([1000.0, 2000.0], CHEAP, 3000.0, 0.0, every_steps=1000, restarts_s=[950.0, 1200.0])
    assert found.restart_s == 950.0 + 1000.0 + 100.0 and found.useful_s == 900.0


def test_a_save_waits_for_the_write_before_it() -> None:
    slow = Costs(step_s=10.0, blocked_s=0.0, write_s=95.0, restart_s=0.0)
    assert simulate([294.0], slow, 295.0, 0.0, every_steps=1).useful_s == 100.0, "saved at 100 and 200, no more"
    assert simulate([295.0], slow, 296.0, 0.0, every_steps=1).useful_s == 200.0


def test_failures_are_poisson_and_the_seed_repeats_them() -> None:
    moments_s = poisson(100.0, 1e6, seed=1)
    assert len(moments_s) == pytest.approx(10_000, rel=0.03) and moments_s == sorted(moments_s)
    assert moments_s == poisson(100.0, 1e6, seed=1) != poisson(100.0, 1e6, seed=2)


def write_run(folder: Path, owners: bool = True) -> Path:
    """Launched at 1000; four steps of 5 s from 1030 on, saved after the second; killed; launched at 1060, resumed."""
    folder.mkdir()
    rows = [
        (1035.0, 1, 1, {"time/step_s": 5.0}),
        (1040.5, 1, 2, {"time/step_s": 5.0}),
        (1046.5, 1, 3, {"time/step_s": 5.0}),
        (1046.6, 1, 2, {"ckpt/blocked_s": 0.5, "ckpt/save_s": 2.5}),
        (1052.0, 1, 4, {"time/step_s": 5.0}),
        (1105.0, 3, 3, {"time/step_s": 6.0}),
        (1110.0, 3, 4, {"time/step_s": 4.0}),
        (1113.0, 3, 4, {"time/eval_s": 3.0}),
    ]
    lines = [json.dumps({"time": t, "run/attempt": number, "train/step": n} | row) for t, number, n, row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for number, launched_s in ((1, 1000.0), (2, 1060.0), (3, 1075.0)) if owners else ():
        (folder / f"attempts/{number:04d}").mkdir(parents=True)
        owner = {"pid_started": launched_s, "import_s": 8.0}
        (folder / f"attempts/{number:04d}/owner.json").write_text(json.dumps(owner))
    return folder


def test_a_runs_record_gives_the_sums_that_one_makes_by_hand(tmp_path: Path) -> None:
    found = measured(write_run(tmp_path / "run"))
    assert found.wall_s == 113.0 and found.useful_s == 20.0 and found.lost_s == 10.0 and found.num_lost_steps == 2
    assert found.blocked_s == 0.5 and found.evaluate_s == 3.0 and found.num_launches == 3
    assert found.restart_s == 30.0 + 24.0 and found.import_s == 24.0
    assert found.frac == 20 / 113 and found.frac_without_imports == 20 / 89
    assert measured(tmp_path / "run", import_s=13.0).frac_without_imports == 0.2


def test_a_run_without_attempts_files_counts_from_its_first_step(tmp_path: Path) -> None:
    found = measured(write_run(tmp_path / "run", owners=False))
    assert found.wall_s == 83.0 and found.restart_s == 0.0 and found.num_launches == 2


def test_costs_are_read_from_a_finished_run(tmp_path: Path) -> None:
    found = costs_of(write_run(tmp_path / "run"))
    assert found.between_s == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert found == Costs(5.0, blocked_s=0.5, write_s=2.0, restart_s=27.0, between_s=found.between_s)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere cannot say what a run costs: it has no metrics.jsonl"):
        measured(tmp_path / "nowhere")
    run = write_run(tmp_path / "run")
    (run / "attempts/0002/owner.json").write_text("{")
    with pytest.raises(DataError, match=r"attempts/0002/owner.json is damaged"):
        measured(run)


# --- launch/check.py --goodput --------------------------------------------------------------------------------------


def check(monkeypatch: pytest.MonkeyPatch, config_file: Path, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["check.py", "--config", str(config_file), *words])
    launch_check.run_command()


def test_check_prints_what_failures_will_cost_without_reading_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config_file: Path
) -> None:
    costs = ("--step-s", "4", "--blocked-s", "0.2", "--write-s", "30", "--restart-s", "240")
    shards = "data.train=[{shards: nowhere.tar}]"
    check(monkeypatch, config_file, "--goodput", *costs, shards, "checkpoint.every_steps=null")
    printed = capsys.readouterr().out
    rows = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows[::2]] == ["1", "8", "64"] and len(rows) == 6
    assert [row[2].strip() for row in rows[::2]] == ["20 min", "7.1 min", "2.5 min"]
    at_64 = [float(cell.strip().removesuffix(" %")) for cell in rows[4][3:]]
    assert at_64[0] == max(at_64) and 90 < min(at_64) < 98 < max(at_64) < 100
    check(monkeypatch, config_file, "--goodput", *costs, "checkpoint.every_steps=30")
    assert "30 steps" in (printed := capsys.readouterr().out) and "│       2 min │" in printed


def test_check_takes_costs_from_a_run_and_given_ones_before_those(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config_file: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    check(monkeypatch, config_file, "--goodput-of", str(run), "--restart-s", "7")
    printed = capsys.readouterr().out
    assert "takes  5 s" in printed and "for  0.5 s" in printed and "written in  2 s" in printed
    assert "next step  7 s" in printed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--goodput", "--step-s", "4"),
            [
                "1 problem\n",
                "--blocked-s: seconds",
                "--restart-s: seconds",
                "example --step-s 4 ",
                "--goodput-of runs/NAME",
            ],
        ),
        (("--goodput", "--step-s", "0", "--write-s", "nan"), ["a step takes time", "--write-s is nan", "--blocked-s"]),
        (("--goodput-of", "nowhere"), ["nowhere cannot say what a run costs"]),
        (("--write-s", "4"), ["--write-s: only with --goodput"]),
    ],
)
def test_check_says_what_is_wrong_with_costs(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, words: tuple[str, ...], told: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        check(monkeypatch, config_file, *words)
    assert all(part in raised.value.report() for part in told)
