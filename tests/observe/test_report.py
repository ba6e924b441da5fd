import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from html_page import Page, require_nothing_fetched
from synthetic_run import BEST_PRICE_MAE, write_run, write_scores

from phi3v_dist.errors import ConfigError
from phi3v_dist.observe.metrics import format_number, format_value
from phi3v_dist.observe.report import write_report
from phi3v_dist.observe.run_folder import read_run
from phi3v_dist.observe.verdict import sentence


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    run = write_run(tmp_path_factory.mktemp("full") / "quickstart")
    return run, Page(write_report(run))


def test_the_page_shows_the_final_numbers_beside_the_blind_control(full: tuple[Path, Page]) -> None:
    run, page = full
    summary = json.loads((run / "summary.json").read_text())
    for name in ("eval/field_em/category", "eval/price_mae", "eval/parse_fail_pct", "eval/stop_pct"):
        assert format_value(name, summary[name]) in page.text, name
    for name in ("eval/blind/field_em/category", "eval/blind/price_mae"):
        assert format_value(name, summary[name]) in page.text, name
    assert f"{format_number(BEST_PRICE_MAE)} at the very best" in page.text
    assert "the answers are read from the pictures" in page.text
    assert "8 min 32 s" in page.text and "in 2 attempts" in page.text


def test_the_page_has_every_figure_and_a_gallery(full: tuple[Path, Page]) -> None:
    _, page = full
    titles = [
        "Price: true against predicted",
        "Category: true against answered",
        "Price error against the blind control",
    ]
    titles += ["Loss", "Learning rate", "Gradient norm", "Step time", "Throughput", "Packing", "Exact match"]
    assert [title for title in titles if title not in page.text] == []
    assert page.tags.count("svg") == page.tags.count("figure") == 23
    assert sum(address.startswith("data:image/jpeg;base64,") for address in page.addresses) == 18
    assert page.tags.count("article") == 18


def test_scores_of_parts_have_figures_of_their_own_and_no_column(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_samples=4)
    parts = {"eval/chance_category": 0.125}
    for part in ("from_0_to_0_5", "from_0_5_to_1"):
        parts |= {f"eval/by_depth/{part}/field_em/category": 0.5, f"eval/by_depth/{part}/samples": 2}
        parts |= {f"eval/blind/by_depth/{part}/field_em/category": 0.25}
    parts |= {"eval/by_position/from_0_to_4096/loss": 1.5, "eval/by_source/is_catalogue/loss": 1.5}
    for path in (run / "summary.json", *run.glob("eval/*/scores.json")):
        path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    text = Page(write_report(run)).text
    for words in ("Category right by depth", "0.5 – 1", "guessing", "Loss by position", "0 – 4,096", "Loss by source"):
        assert words in text, words
    assert "by_depth" not in text


def test_the_page_fetches_nothing(full: tuple[Path, Page]) -> None:
    _, page = full
    require_nothing_fetched(page)


def test_every_figure_follows_the_colours_of_the_page(full: tuple[Path, Page]) -> None:
    _, page = full
    drawings = [piece.partition("</svg>")[0] for piece in page.source.split("<svg")[1:]]
    for drawing in drawings:
        assert "var(--accent)" in drawing and "var(--muted)" in drawing
        assert re.findall(r"(?:fill|stroke): (?!none|var\()[^;\"]+", drawing) == []


def test_text_of_samples_is_shown_as_text(full: tuple[Path, Page]) -> None:
    _, page = full
    assert "<b>not bold</b>" in page.text
    assert "b" not in page.tags


def test_a_run_that_was_killed_before_its_first_evaluation_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "killed", evaluations=False, finished=False)
    page = Page(write_report(run))
    assert "not finished: last seen at step 600 of 600" in page.text
    assert "No evaluation yet" in page.text and "No summary.json" in page.text
    assert "Loss" in page.text and "true against predicted" not in page.text


def test_a_killed_run_shows_its_last_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "killed", num_samples=8, finished=False)
    (run / "eval" / "step-000600").rename(run / "eval" / "step-000600.partial")  # killed while it wrote its answers
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '600, "eval/' not in line))
    killed = read_run(run)
    assert killed.answered is not None and killed.answered.step == 450
    scores = json.loads((run / "eval" / "step-000450" / "scores.json").read_text())
    assert f"off by {format_number(scores['eval/price_mae'])} on average" in sentence(killed)


def test_a_handful_of_samples_is_not_called_evidence(tmp_path: Path) -> None:
    assert "chance" not in sentence(read_run(write_run(tmp_path / "few", num_samples=8)))


def test_an_empty_run_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 10}\n")
    page = Page(write_report(tmp_path))
    assert "Nothing was logged yet" in page.text
    assert f"deepspeed launch/train.py --config YOUR.yaml run.name={tmp_path.name}" in page.text
    assert "svg" not in page.tags


def test_scores_without_blind_control_or_answers_are_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"time": 1764000000.0, "run/attempt": 1, "train/step": 1, "train/loss": 2.5, '
        '"eval/field_em/group": 0.625, "eval/samples": 40}\n'
    )
    page = Page(write_report(tmp_path))
    assert "Of 40 validation samples the model gets the group of 62.5 % right." in page.text
    assert "no answers and no pictures" in page.text


def test_no_better_than_blind_is_not_called_seeing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "blind", num_samples=30)
    path = run / "eval" / "step-000600" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.open()]
    path.write_text(
        "".join(
            json.dumps({**row, **{name: row["blind"][name] for name in ("fields", "prediction", "parsed", "stopped")}})
            + "\n"
            for row in rows
        )
    )
    (run / "summary.json").write_text(json.dumps(write_scores(path.parent)))
    assert sentence(read_run(run)).endswith("nothing shows yet that the pictures are read.")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither config.yaml nor metrics.jsonl"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        write_report(tmp_path / "typo")


def test_the_command_writes_what_it_can_and_exits_with_the_error(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    run = write_run(tmp_path / "good", evaluations=False)
    command = [sys.executable, "launch/report.py", str(tmp_path / "typo"), str(run)]
    done = subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=240)
    assert done.returncode == ConfigError.exit_code
    assert "typo is not a run folder" in done.stderr and "Traceback" not in done.stderr
    assert str(run / "report.html") in done.stdout.splitlines() and (run / "report.html").exists()
    assert "No evaluation yet" in done.stdout  # what is missing is said in the terminal too
