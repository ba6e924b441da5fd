"""A run watched in a terminal, from its files alone."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_cluster import write_rich_run

from phi3v_dist.errors import ConfigError
from phi3v_dist.observe.live import Record, block, watch

ROOT = Path(__file__).parents[2]
NOW_S = 1764000600.0


def said(run: Path, now_s: float = NOW_S, width: int = 80) -> str:
    record = Record(run / "metrics.jsonl")
    record.read()
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(block(run, record, now_s))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return " ".join(" ".join(lines).split())


def row(step: int, **numbers: float) -> str:
    names = {name.replace("__", "/"): value for name, value in numbers.items()}
    return json.dumps({"time": NOW_S - 100 + step, "run/attempt": 1, "train/step": step, **names}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("train: {steps: 200}\n")
    return tmp_path


def test_a_finished_run_is_told_in_eighty_columns(tmp_path: Path) -> None:
    text = said(write_rich_run(tmp_path / "rich", num_samples=4))
    assert text.startswith("rich · finished") and "600 of 600" in text and "100 %" in text
    for words in ("loss", "tokens/s per process", "bwd 5", "rank 5 on gpu-01", "of the wall time; lost: replay",
                  "step 600: ", "price_mae", "slowest rank at"):  # fmt: skip
        assert words in text, words


def test_a_run_that_has_not_begun_says_so(run: Path) -> None:
    assert said(run) == f"{run.name} · has not begun step none yet of 200"
    (run / "attempts" / "0001").mkdir(parents=True)
    assert "starting: no step is done yet" in said(run)


def test_a_run_that_is_going_has_its_pace_and_the_time_left(run: Path) -> None:
    (run / "metrics.jsonl").write_text(
        "".join(row(step, train__loss=9.0 / step, time__step_s=1.0) for step in range(1, 101))
    )
    text = said(run)
    assert "running, attempt 1, last row 0 s ago" in text
    assert "100 of 200" in text and "1 min 40 s left" in text
    assert "silent: attempt 1, last row 5 min 00 s ago; see launch/diagnose.py" in said(run, NOW_S + 300)


def test_only_what_was_appended_is_read_and_a_rewritten_record_is_read_anew(run: Path) -> None:
    path = run / "metrics.jsonl"
    record = Record(path)
    record.read()
    path.write_text(row(1, train__loss=3.0) + '{"train/st')
    record.read()
    assert record.latest["train/loss"] == 3.0
    with path.open("a") as file:
        file.write('ep": 1}\n' + row(2, train__loss=2.0))
    record.read()
    assert [loss for _, loss in record.losses] == [3.0, 2.0]
    path.write_text(row(1, train__loss=7.0))
    record.read()
    assert [loss for _, loss in record.losses] == [7.0]


def test_what_a_later_attempt_trained_again_is_not_drawn_twice(run: Path) -> None:
    rows = [row(step, train__loss=1.0) for step in (1, 2, 3, 4)]
    again = [json.loads(row(step, train__loss=2.0)) | {"run/attempt": 2} for step in (3, 4)]
    (run / "metrics.jsonl").write_text("".join(rows) + "".join(json.dumps(one) + "\n" for one in again))
    record = Record(run / "metrics.jsonl")
    record.read()
    assert list(record.losses) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_a_worry_is_said_when_it_begins_and_again_after_it_was_well(run: Path) -> None:
    stalls = [1.0, 30.0, 40.0, 1.0, 50.0]
    (run / "metrics.jsonl").write_text("".join(row(step, data__stall_pct=s) for step, s in enumerate(stalls, start=2)))
    record = Record(run / "metrics.jsonl")
    record.read()
    assert list(record.warnings) == [
        f"step {s}: {p} % of the step spent waiting for data" for s, p in ((3, "30.0"), (6, "50.0"))
    ]


def test_a_loss_that_is_not_finite_is_said(run: Path) -> None:
    (run / "metrics.jsonl").write_text(row(1, train__loss=3.0) + row(2).replace("}", ', "train/loss": null}'))
    assert "step 2: loss is not finite" in said(run)


def test_names_of_hosts_cannot_write_on_the_terminal(run: Path) -> None:
    (run / "metrics.jsonl").write_text(row(1, health__slowest_rank=0.0))
    (run / "ranks").mkdir()
    line = {"time": 1.0, "host": "\x1b[31mred\n", "ranks": [0], "values": {}}
    (run / "ranks" / "x.jsonl").write_text("\n" + json.dumps(line) + "\n")
    assert "rank 0 on \\x1b[31mred\\n" in said(run)


def test_into_a_pipe_it_prints_once_and_ends(run: Path) -> None:
    (run / "metrics.jsonl").write_text(row(1, train__loss=3.0))
    command = [sys.executable, "launch/report.py", "--watch", str(run)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.count("1 of 200") == 1 and "\x1b" not in done.stdout


def test_on_a_terminal_it_goes_on_until_the_run_ends(run: Path) -> None:
    master, slave = pty.openpty()
    console = Console(file=os.fdopen(slave, "w"), force_terminal=True, width=80, markup=False)
    (run / "metrics.jsonl").write_text(row(1, train__loss=3.0))

    def train() -> None:
        time.sleep(0.3)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(row(2, train__loss=2.0))
        time.sleep(0.5)
        (run / "summary.json").write_text("{}")

    thread = threading.Thread(target=train)
    thread.start()
    watch(run, console, every_s=0.1)
    thread.join()
    console.file.flush()
    shown = ""
    while select.select([master], [], [], 0.2)[0]:  # a read gives what one buffer of the terminal holds
        shown += os.read(master, 1 << 16).decode(errors="replace")
    assert re.search(r"1 of 200.*2 of 200", shown, re.DOTALL) and "finished" in shown


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        watch(tmp_path / "typo", Console(), 1.0)
