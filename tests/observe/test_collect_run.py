"""A real run of two ranks: every rank's numbers reach rank 0, add up, and say which rank is slow and in what."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import write_samples
from launching import launch

from phi3v_dist.observe.columns import COLUMNS
from phi3v_dist.observe.metrics import entry_name, expected_names
from phi3v_dist.observe.tracker import read_metrics, read_rows
from phi3v_dist.train.laps import PARTS

MICRO_STEPS, STEPS = 2, 8  # each step is a window
# Every rank computes for so long in a step beside what the tiny model takes, whose time neighbours on the machine
# decide (0.2 to 1 s); then rank 1 needs 30 % of all that more, a little over where it has them for itself.
BASE_S, EXTRA_S = 1.6, 0.7
IN_DATA, IN_COMPUTING = (2, 3, 4), (5, 6, 7)  # as many windows as it takes until a rank is named
SAVED = (3, 6)
RATIO = 0.1  # of the ratio, as the issue asks for


def faults() -> str:
    every = [f"*:forward:*:slow={BASE_S / MICRO_STEPS}"]
    each_s = EXTRA_S / MICRO_STEPS
    data = [f"1:data:{step}:slow={each_s}" for step in IN_DATA]
    return ",".join(every + data + [f"1:backward:{step}:slow={each_s}" for step in IN_COMPUTING])


@pytest.fixture(scope="module")
def run(tiny_model, shards, tmp_path_factory) -> tuple[Path, str]:
    """Two sources, a peak, checkpoints; the run folder and what was said."""
    from conftest import settings_tree

    folder = tmp_path_factory.mktemp("collect")
    write_samples(folder / "more-000.tar", range(300, 330))
    tree = settings_tree.__wrapped__(tiny_model, shards, folder)
    tree["data"] |= {
        "train": [{"shards": str(shards / "train-*.tar"), "weight": 3}, {"shards": str(folder / "more-000.tar")}],
        "validation": [],
    }
    tree["train"] |= {"steps": STEPS, "rows_per_step": 2 * MICRO_STEPS, "grad_clip": 0.01}
    tree["checkpoint"] = {"every_steps": 3}
    tree["observe"] = {"wandb": "disabled", "log_every_steps": 1, "peak_tflops": 0.5}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = launch("torchrun", config, fault=faults())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Path(tree["run"]["root"]) / "run", done.stdout + done.stderr


def windows(folder: Path) -> dict[int, dict]:
    """Last step → rank 0's row of a window."""
    return {int(row["train/step"]): row for row in read_rows(folder) if "time/step_s/mean" in row}


def rank_lines(folder: Path) -> list[dict]:
    (path,) = (folder / "ranks").iterdir()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_logs_exactly_what_the_registry_says_of_it(run):
    logged = {entry_name(name) for row in read_rows(run[0]) for name in row if name != "time"}
    wanted = expected_names("ranks", "peak", "sources", "checkpoint")
    assert sorted(logged - wanted) == []
    assert sorted(wanted - logged) == []


def test_the_parts_of_a_step_add_up_to_it_in_means_and_lap_by_lap(run):
    for row in windows(run[0]).values():
        parts_s = sum(row[f"time/{part}_s/mean"] for part in PARTS)
        assert parts_s == pytest.approx(row["time/step_s/mean"], rel=1e-9)
    for line in rank_lines(run[0]):
        for spans in line["spans"]:
            assert {part for part, _, _ in spans} >= {"data", "fwd", "bwd", "opt"}
            for (_, _, end), (_, begin, _) in zip(spans, spans[1:], strict=False):
                assert begin == pytest.approx(end, abs=2e-6)
    blocked = [step - 1 for step, row in windows(run[0]).items() if row["time/ckpt_s/mean"] > 0]
    assert blocked == list(SAVED), "a save belongs to the step after it"


def test_windows_and_the_record_of_rank_0_tell_of_the_same_time(run):
    """A lap that is lost would be missing from the sum of all steps, which the record's own clock knows."""
    rows = [row for row in read_rows(run[0]) if "train/loss" in row]
    steps = {int(row["train/step"]): row["time"] for row in rows}
    covered_s = sum(row["time/step_s/mean"] for step, row in windows(run[0]).items() if step > 1)
    assert covered_s == pytest.approx(steps[STEPS] - steps[1], abs=0.3)


def test_every_rank_has_its_own_numbers_in_the_nodes_file(run):
    for line in rank_lines(run[0]):
        assert line["ranks"] == [0, 1] and line["run/attempt"] == 1 and list(line["values"]) == list(COLUMNS)
        assert all(len(values) == 2 for values in line["values"].values())
        row, own = windows(run[0])[line["train/step"]], line["values"]
        assert row["train/rank_loss/max"] == pytest.approx(max(own["train/rank_loss"]), rel=1e-5)
        assert own["train/rank_loss"][0] != own["train/rank_loss"][1]
        assert own["mem/host_rss_gib"][0] > 0.1 and own["gpu/temp_c"] == [None, None]


@pytest.mark.fault(14)
@pytest.mark.parametrize(("steps", "what"), [(IN_DATA, "data"), (IN_COMPUTING, "compute")])
def test_a_rank_that_is_30_percent_slower_is_named_with_what_it_is_slow_in(run, steps, what):
    folder, said = run
    ratios, wanted = [], []
    for line in rank_lines(folder):
        if line["train/step"] in steps:
            own = {name: line["values"][f"health/{name}_s"] for name in ("data", "compute")}
            row = windows(folder)[line["train/step"]]
            assert row["health/slowest_rank"] == 1
            assert own[what][1] - own[what][0] > EXTRA_S / 2
            ratios.append(row["health/straggler_ratio"])
            wanted.append(1 + EXTRA_S / (own["data"][0] + own["compute"][0]))
    assert np.median(ratios) == pytest.approx(np.median(wanted), rel=RATIO)
    words = {"data": "loading data", "compute": "computing"}[what]
    (line,) = [line for line in said.splitlines() if f"is slow in {words}" in line]
    assert "rank 1 on " in line


def test_the_history_of_a_step_has_its_windows_numbers_too(run):
    row = next(row for row in read_metrics(run[0]) if row["train/step"] == 4)
    assert {"train/loss", "time/step_s", "time/step_s/p99", "perf/mfu"} <= row.keys()
    assert row["train/clip_frac"] == 1.0, "every gradient is above 0.01"
