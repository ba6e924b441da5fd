"""Several runs on one page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from html_page import Page, require_nothing_fetched
from synthetic_run import write_run

from phi3v_dist.errors import ConfigError
from phi3v_dist.observe.compare import differing_settings, final_rows, write_comparison
from phi3v_dist.observe.run_folder import read_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """The second trained with half the rate, fewer steps, and ends with a worse loss."""
    runs = [write_run(tmp_path / name / "run", num_samples=4) for name in ("a", "b")]
    config = yaml.safe_load((runs[1] / "config.yaml").read_text())
    config["train"]["lr_text"] = 1e-3
    config["run"]["note"] = "<i>slow</i>"
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()][:300]
    rows = [{**row, "train/loss": 2 * row["train/loss"]} if "train/loss" in row else row for row in rows]
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return runs


def test_differences_are_from_the_first_run_and_the_worse_ones_are_marked(two: list[Path]) -> None:
    runs = [read_run(run) for run in two]
    loss = next(row for row in final_rows(runs) if row.name == "train/loss")
    assert loss.cells[0].difference == "" and loss.cells[1].good is False
    assert loss.cells[1].difference.startswith("+")
    assert differing_settings(runs) == [
        ("run.note", ["<b>not bold</b>", "<i>slow</i>"]),
        ("train.lr_text", ["0.002", "0.001"]),
    ]


def test_the_page_has_common_axes_and_fetches_nothing(two: list[Path], tmp_path: Path) -> None:
    path = write_comparison(two, tmp_path / "out.html")
    page = Page(path)
    require_nothing_fetched(page)
    assert "a/run" in page.text and "b/run" in page.text and "<i>slow</i>" in page.text
    start = page.source.index('<section id="training">')
    drawing = page.source[start : page.source.index("</svg>", start)]
    assert "a/run" in drawing and "b/run" in drawing  # the legend of the loss
    assert page.tags.count("svg") > 10 and "train/loss" in page.text


def test_the_command_writes_each_page_and_the_comparison_beside_the_first(two: list[Path]) -> None:
    command = [sys.executable, "launch/report.py", *map(str, two)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(two[0].parent / "comparison.html") == done.stdout.splitlines()[-1]
    assert all((run / "report.html").is_file() for run in two) and (two[0].parent / "comparison.html").is_file()


def test_one_run_is_not_compared(two: list[Path]) -> None:
    with pytest.raises(ConfigError, match="name 2 to"):
        write_comparison(two[:1])
    with pytest.raises(ConfigError, match="cannot be written"):
        write_comparison(two, two[0] / "no" / "such" / "folder.html")
