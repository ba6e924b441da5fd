"""Best and worst, the table of all answers, and what changed between two evaluations."""

import base64
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from synthetic_run import write_run

from phi3v_dist.errors import ConfigError
from phi3v_dist.observe import answers, gallery
from phi3v_dist.observe.answers import answer_table
from phi3v_dist.observe.changes import Answers, Turned, changes, read_answers
from phi3v_dist.observe.ranking import BY_LOSS, badness, described, ranked
from phi3v_dist.observe.report import write_changes, write_pages_of_answers, write_report
from phi3v_dist.observe.run_folder import Evaluation, read_run

HOSTILE = "</td></table><script>alert(1)</script><b>bold</b>"


def field(kind: str, target: Any, found: Any, correct: bool) -> dict[str, Any]:
    error = abs(found - target) if isinstance(found, float) and isinstance(target, float) else None
    return {"kind": kind, "target": target, "prediction": found, "correct": correct, "error": error}


def answer(number: int, fields: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    return {
        "sample_id": number, "shard": f"data/v-{number // 10}.tar", "key": f"k{number:03d}", "prompt": "What is it?",
        "target": f"truth {number}", "prediction": f"answer {number}", "fields": fields or {}, "blind": None,
        "thumbnail": None, "loss": 1.0,
    } | others  # fmt: skip


def side(rows: list[dict[str, Any]], label: str = "now") -> Answers:
    return Answers(label, Path("eval/step-000002"), rows)


def write_answers(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_best_is_right_and_near_worst_is_unreadable_whatever_the_kinds() -> None:
    rows = [
        answer(0, {"price": field("number", 100.0, 100.0, True), "title": field("exact", "a", "a", True)}),
        answer(1, {"price": field("number", 100.0, 101.0, False), "title": field("exact", "a", "a", True)}),
        answer(2, {"price": field("number", 100.0, 150.0, False), "title": field("exact", "a", "a", True)}),
        answer(3, {"price": field("number", 100.0, 900.0, False), "title": field("exact", "a", "b", False)}),
        answer(4, {"price": field("number", 100.0, None, False), "title": field("exact", "a", "a", True)}),
        answer(5),
    ]
    random.Random(0).shuffle(rows)
    assert [row["sample_id"] for row in ranked(rows)] == [0, 1, 2, 3, 4], "5 was asked for no field"
    fuzzy = [answer(i, {"name": field("fuzzy", "kitten", text, text == "kitten")}) for i, text in enumerate(
        ("kitten", "mitten", "sitting", "elephant")
    )]  # fmt: skip
    assert [badness(row) for row in fuzzy] == pytest.approx([0, 1 / 6, 3 / 7, 1])
    relaxed = (
        answer(0, {"height": field("relaxed", 10.0, 10.4, True)}),
        answer(1, {"height": field("relaxed", "tall", "Tall", True)}),
    )
    assert [badness(row) for row in relaxed] == pytest.approx([0.04, 0])
    assert badness(answer(0, {"zero": field("number", 0.0, 0.1, False)})) == 1


def test_equal_answers_and_those_without_fields_are_ordered_by_loss() -> None:
    rows = [answer(0, loss=2.0), answer(1, loss=0.5), answer(2, loss=float("nan")), answer(3, loss=None)]
    assert [row["sample_id"] for row in ranked(rows)] == [1, 0, 2, 3] and described(rows) == BY_LOSS
    parts = gallery.gallery(Evaluation(7, {}, rows, Path("nowhere")))
    best = parts["The best answers"][0]
    assert [(line.name, line.truth, line.answer, line.right) for line in best.fields] == [
        ("answer", "truth 1", "answer 1", None)
    ]


def test_the_random_ones_follow_from_the_step() -> None:
    rows = [answer(i, loss=float(i)) for i in range(100)]
    picked = [
        [
            card.prediction["sample_id"]
            for card in gallery.gallery(Evaluation(step, {}, rows, Path()))["Picked at random"]
        ]
        for step in (1, 1, 2)
    ]
    assert picked[0] == picked[1] != picked[2] and all(6 <= one < 94 for one in picked[0])


def test_the_table_has_every_answer_and_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = {"prediction": "blind words", "fields": {"price": field("number", 100.0, 300.0, False)}}
    rows = [answer(i, {"price": field("number", 100.0, 100.0 + i, i == 0)}, blind=blind) for i in range(9)]
    evaluation = Evaluation(400, {}, rows, Path("runs/a/eval/step-000400"))
    table = answer_table(evaluation)
    assert table.columns == [
        "sample", "price", "price: truth", "price: blind", "price: error", "answer", "truth", "blind", "loss",
    ]  # fmt: skip
    assert len(table.rows) == 9 and table.left_out == ""
    assert [cell.text for cell in table.rows[3]] == [
        "v-0.tar · k003", "103", "100", "300", "3", "answer 3", "truth 3", "blind words", "1",
    ]  # fmt: skip
    assert table.rows[3][1].sort == 103.0 and "wrong" in table.rows[3][1].kind and "wrong" not in table.rows[0][1].kind
    monkeypatch.setattr(answers, "MOST_ROWS", 4)
    table = answer_table(evaluation)
    assert len(table.rows) == 4
    assert table.left_out == "The first 4 of 9; the other 5 are in step-000400/predictions.jsonl."
    plain = answer_table(Evaluation(1, {}, [answer(0), answer(1, prompt="Another?")], Path("e")))
    assert plain.columns == ["sample", "question", "answer", "truth", "loss"]


def test_every_turn_of_a_field_is_counted_over_the_samples_asked_in_both() -> None:
    turns = [(True, True)] * 4 + [(True, False)] * 3 + [(False, True)] * 2 + [(False, False)]
    old, new = (
        [answer(i, {"title": field("exact", "a", "a" if turn[when] else f"b{when}", turn[when])}) for i, turn in
         enumerate(turns)]
        for when in (0, 1)
    )  # fmt: skip
    found = changes(side(old, "before"), side([*new, answer(99, {"title": field("exact", "a", "a", True)})]))
    assert found.num_common == 10 and found.turned == [Turned("title", 4, 2, 3, 1)]
    assert (found.num_better, found.num_worse, found.num_reworded) == (2, 3, 0)
    said = [row[1].text for row in found.table.rows]
    assert said[:5].count("title: newly right") == 2 and said[:5].count("title: newly wrong") == 3
    assert said[5:].count("title: another wrong answer") == 1 and said[5:].count("nothing") == 4


def test_numbers_say_by_how_much_and_the_largest_changes_have_cards() -> None:
    values = [(150.0, 110.0), (100.0, 130.0), (None, 100.0), (90.0, None), (90.0, 110.0), (70.0, 70.0)]
    old, new = (
        [answer(i, {"price": field("number", 100.0, pair[when], pair[when] == 100)}, prediction=f"{pair[when]}",
                loss=1.0 + when) for i, pair in enumerate(values)]
        for when in (0, 1)
    )  # fmt: skip
    found = changes(side(old), side(new))
    rows = {row[0].text: (row[1].text, row[2].sort) for row in found.table.rows}
    assert rows["v-0.tar · k000"] == ("price: error −40", pytest.approx(-0.4))
    assert rows["v-0.tar · k001"] == ("price: newly wrong, error +30", pytest.approx(0.3))
    assert rows["v-0.tar · k002"] == ("price: newly right, can be read now", -2)
    assert rows["v-0.tar · k003"] == ("price: cannot be read now", pytest.approx(1.9))
    assert rows["v-0.tar · k004"][0] == "price: another wrong answer" and rows["v-0.tar · k005"][0] == "nothing"
    error, loss = found.moved
    assert (error.num_samples, error.before, error.now, error.smaller, error.larger) == (4, "22.5", "20", 1, 1)
    assert (loss.what, loss.num_samples, loss.before, loss.now, loss.larger) == ("loss", 6, "1", "2", 6)
    names = {title: [card.now["sample_id"] for card in cards] for title, cards in found.cards.items()}
    assert names == {"Got worse the most": [3, 1], "Got better the most": [2, 0]}


def test_without_fields_the_loss_says_what_changed() -> None:
    found = changes(side([answer(0), answer(1)]), side([answer(0, loss=3.0), answer(1, loss=0.5, prediction="new")]))
    assert found.turned == [] and found.num_reworded == 1
    assert [row[1].text for row in found.table.rows] == ["nothing", "other words"]
    assert [card.lines[0].name for card in found.cards["Got better the most"]] == ["answer"]


def test_samples_are_known_by_shard_and_key_not_by_their_number() -> None:
    old = [answer(i) for i in range(20)]
    moved = [row | {"sample_id": 500 - i, "shard": "/elsewhere/" + row["shard"]} for i, row in enumerate(old)]
    found = changes(side(old), side(moved[5:]))
    assert found.num_common == 15 and found.notes == []
    other = [row | {"target": "another truth"} for row in old[:3]] + old[3:8]
    found = changes(side(old), side(other))
    assert found.num_common == 5 and "3 samples have the same name and another question or truth" in found.notes[0]
    twice = [row | {"shard": f"/{copy}/v-0.tar"} for copy in "ab" for row in old[:2]]
    assert changes(side(old), side(twice)).num_common == 0, "which of the two it is nobody knows"
    renamed = [answer(0, {"cost": field("exact", "a", "a", True)})]
    found = changes(side([answer(0, {"price": field("exact", "a", "a", True)})]), side(renamed))
    assert found.turned == [] and "cost, price" in found.notes[0]


def test_the_report_has_both_pages_and_text_of_samples_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "quickstart", num_samples=30)
    for path in run.glob("eval/*/predictions.jsonl"):
        rows = [json.loads(line) for line in path.open()]
        rows[1] |= {"prediction": HOSTILE, "prompt": HOSTILE}
        rows[1]["fields"]["title"] |= {"prediction": HOSTILE, "target": HOSTILE, "correct": False}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{half a line\n")
    report = Page(write_report(run))
    pages = {name: Page(run / name) for name in ("answers.html", "changes.html")}
    for name, page in pages.items():
        assert name in report.addresses and "b" not in page.tags and page.tags.count("script") == 1
        assert HOSTILE in page.text and "http" not in page.source.replace("http-equiv", "")
        script = re.search("<script>(.*?)</script>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode() if script else ""
        assert (
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page.source
        )
    assert pages["answers.html"].tags.count("tr") == 31 and "damaged lines are left out" in report.text
    assert "quickstart, step 450 → quickstart, step 600" in pages["changes.html"].text
    assert "30 samples were asked in both, of 30 before and 30 now" in pages["changes.html"].text


def test_one_evaluation_has_no_changes_and_none_no_pages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_samples=4)
    for step in (0, 150, 300, 450):
        (run / "eval" / f"step-{step:06d}" / "predictions.jsonl").unlink()
    assert list(write_pages_of_answers(read_run(run))) == ["answers.html"]
    assert (run / "answers.html").exists() and not (run / "changes.html").exists()
    (run / "eval" / "step-000600" / "predictions.jsonl").unlink()
    assert write_pages_of_answers(read_run(run)) == {}


def test_any_two_evaluations_are_compared_by_folder_or_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_samples=6)
    export = write_answers(tmp_path / "scores", [answer(1), answer(2)])
    page = Page(write_changes(run / "eval" / "step-000150", run, tmp_path / "page.html"))
    assert "run, step 150 → run, step 600" in page.text and "6 samples were asked in both" in page.text
    (export / "predictions.jsonl").open("a").write("torn")
    page = Page(write_changes(run, export, tmp_path / "page.html"))
    assert "no sample in common" in page.text and "1 damaged lines are left out" in page.text
    for folder in (tmp_path / "nothing", write_answers(tmp_path / "bad", []), write_run(tmp_path / "e", 4, False)):
        with pytest.raises(ConfigError, match=folder.name):
            read_answers(folder, [])
    root = Path(__file__).parents[2]
    command = [sys.executable, "launch/report.py", "--changes", str(export), str(run / "eval" / "step-000150")]
    done = subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(run / "eval" / "step-000150" / "changes.html")
