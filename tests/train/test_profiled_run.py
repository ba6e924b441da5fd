"""A real run on two ranks that is profiled on rank 1, killed, and goes on: its traces, its losses and its goodput."""

import gzip
import json
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import launch, losses

from phi3v_dist.observe.metrics import check
from phi3v_dist.observe.tracker import read_rows
from phi3v_dist.survive.goodput import Span, parts, timeline
from phi3v_dist.survive.timeline import WHATS


@dataclass(frozen=True)
class Trial:
    folder: Path
    killed: subprocess.CompletedProcess[str]
    finished: subprocess.CompletedProcess[str]
    unread: bool  # the first start's wish was still there after it


@pytest.fixture(scope="module")
def trial(launched, reference) -> Trial:
    """Asked for what there is not; killed in step 7, of which 4 are saved; profiled in steps 5 and 6 on rank 1."""
    config, root = launched
    words = ("run.name=profiled", "observe.wandb=disabled", "observe.log_every_steps=3")
    folder = root / "profiled"
    folder.mkdir()
    (folder / "PROFILE").write_text("steps=lots")
    killed = launch("torchrun", config, *words, fault="1:forward:7:kill9")
    unread = (folder / "PROFILE").exists()
    (folder / "PROFILE").write_text("steps=2 ranks=1\n")
    finished = launch("torchrun", config, *words)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return Trial(folder, killed, finished, unread)


def test_the_trace_holds_the_steps_that_were_asked_for_on_that_rank_alone(trial: Trial) -> None:
    files = sorted(path.relative_to(trial.folder / "profiles") for path in trial.folder.glob("profiles/*/*"))
    kinds = ("flame.svg", "memory.txt", "ops.txt", "trace.json.gz")
    assert files == [Path(f"step-000005/rank-00001.{kind}") for kind in kinds]
    with gzip.open(trial.folder / "profiles/step-000005/rank-00001.trace.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    steps = [name for name in names if name.startswith("train_step ")]
    assert steps == ["train_step 5", "train_step 6"]
    assert {"data", "forward", "backward", "optimizer", "Phi3VForCausalLM", "aten::mm"} <= set(names)


def test_the_flame_graph_and_the_tables_open_without_anything_else(trial: Trial) -> None:
    folder = trial.folder / "profiles/step-000005"
    picture = ElementTree.parse(folder / "rank-00001.flame.svg")
    said = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    for name in ("train_step", "forward", "Phi3VForCausalLM", "backward", "aten::mm"):
        assert any(text.startswith(f"{name}: ") for text in said), name
    (outer,) = [text for text in said if text.startswith("train_step: ")]
    assert outer.endswith(" 2 calls")
    assert "http" not in (folder / "rank-00001.flame.svg").read_text().replace("http://www.w3.org/2000/svg", "")
    assert "aten::mm" in (folder / "rank-00001.ops.txt").read_text()
    assert "CPU Mem" in (folder / "rank-00001.memory.txt").read_text()


def test_losses_are_to_the_bit_those_of_a_run_that_nobody_looks_at(trial: Trial, reference: Path) -> None:
    assert losses(trial.folder) == losses(reference)


def test_what_cannot_be_recorded_is_named_with_what_can_and_the_file_is_gone(trial: Trial) -> None:
    said = re.sub(r"\s+", " ", trial.killed.stdout + trial.killed.stderr)
    assert "PROFILE asks for a profile that cannot be made: `steps=lots`: not a number from 1 to 20" in said
    assert "`steps=N` (1 to 20) and `ranks=N,N,…` (0 to 1)" in said
    assert not trial.unread


# --- goodput of the same run ----------------------------------------------------------------------------------------


def logged(folder: Path, attempt: int) -> list[dict[str, float]]:
    return [row for row in read_rows(folder) if "goodput/restarts" in row and row["run/attempt"] == attempt]


def until(spans: list[Span], end_s: float) -> list[Span]:
    return [Span(s.attempt, s.what, s.begin_s, min(s.end_s, end_s)) for s in spans if s.begin_s < end_s]


def test_the_numbers_of_the_run_are_those_of_its_timeline(trial: Trial) -> None:
    spans, last = timeline(trial.folder), logged(trial.folder, 2)[-1]
    found = parts(until(spans, last["time"]))
    wall_s = sum(found.values())
    assert last["goodput/productive_pct"] == pytest.approx(100 * found["productive"] / wall_s, abs=0.05)
    lost = {what: last[f"goodput/lost_{what}_s"] for what in WHATS if what != "productive"}
    assert lost == pytest.approx({what: found[what] for what in lost}, abs=0.02)
    assert last["goodput/restarts"] == 1


def test_every_part_of_a_killed_run_is_found(trial: Trial) -> None:
    spans = timeline(trial.folder)
    found = parts(spans)
    assert sum(found.values()) == pytest.approx(spans[-1].end_s - spans[0].begin_s, abs=1e-6)
    assert all(found[what] > 0 for what in WHATS), found
    steps = {(row["run/attempt"], row["train/step"]): row["time/step_s"] for row in read_rows(trial.folder)
             if "time/step_s" in row}  # fmt: skip
    assert {number for attempt, number in steps if attempt == 1} == set(range(1, 7))
    assert found["replay"] == pytest.approx(steps[1, 5] + steps[1, 6], abs=0.01), "saved after step 4, killed in step 7"
    kept_s = sum(step_s for (attempt, number), step_s in steps.items() if attempt == 2 or number <= 4)
    assert found["productive"] + found["data"] == pytest.approx(kept_s, abs=0.02)
    (evaluation,) = [row for row in read_rows(trial.folder) if "time/eval_s" in row]
    assert found["eval"] == pytest.approx(evaluation["time/eval_s"], abs=0.5)


def test_goodput_is_logged_with_every_window_and_at_the_end(trial: Trial) -> None:
    assert [row["train/step"] for row in logged(trial.folder, 1)] == [3, 6]
    assert [row["train/step"] for row in logged(trial.folder, 2)] == [6, 9, 10]
    for row in logged(trial.folder, 2):
        check({name: value for name, value in row.items() if name != "time"})
    assert (
        logged(trial.folder, 1)[-1]["goodput/lost_replay_s"] == 0 < logged(trial.folder, 2)[0]["goodput/lost_replay_s"]
    )
