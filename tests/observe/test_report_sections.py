"""The report of a cluster's run: every panel of the layout, ranks, attempts, lists, damage."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from html_page import Page, require_nothing_fetched
from synthetic_cluster import HOSTILE, SLOW_RANK, rank_window, write_lists, write_ranks, write_rich_run
from synthetic_run import write_run

from phi3v_dist.observe import gantt, heatmap, layout, rank_record, sections
from phi3v_dist.observe.hard_samples import hard_samples
from phi3v_dist.observe.layout import SECTIONS, metrics_of
from phi3v_dist.observe.metrics import PLACEHOLDER, REGISTRY
from phi3v_dist.observe.rank_record import read_ranks
from phi3v_dist.observe.registry import Metric
from phi3v_dist.observe.report import write_report
from phi3v_dist.observe.run_folder import read_run


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    run = write_rich_run(tmp_path_factory.mktemp("rich") / "cluster", num_samples=8)
    return run, Page(write_report(run))


@pytest.fixture(scope="module")
def record(rich: tuple[Path, Page]) -> rank_record.RankRecord:
    found = read_ranks(rich[0], [])
    assert found is not None
    return found


def test_every_panel_whose_numbers_were_logged_is_drawn_in_its_section(rich: tuple[Path, Page]) -> None:
    run, page = rich
    logged = set(read_run(run).series)
    for section in SECTIONS:
        expected = [
            panel.title
            for panel in section.panels
            if panel.kind != "media" and logged & {metric.name for metric in metrics_of(panel)}
        ]
        if not expected:
            continue
        start = page.source.index(f'<section id="{section.id}">')
        part = page.source[start : page.source.index("</section>", start)]
        titles = re.findall("<strong>(.*?)</strong>", part)
        missing = [title for title in expected if not any(title in said.replace("&#39;", "'") for said in titles)]
        assert missing == [], section.id
        assert section.intro in page.text
    require_nothing_fetched(page)


def test_a_metric_that_is_new_in_the_registry_gets_its_line_without_further_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = Metric("perf/new_thing", "things/s", "up", "things done per second", "Throughput")
    monkeypatch.setattr("phi3v_dist.observe.sections.lookup", lambda name: new if name == new.name else None)
    rows = [{"time": 1.0 + step, "run/attempt": 1, "train/step": step, new.name: 2.0 * step} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (panel,) = [panel for section in sections.sections(read_run(tmp_path)) for panel in section.panels]
    assert panel.title == "Throughput" and panel.caption == "Things done per second (things/s, up is better)."


def test_lines_of_one_figure_are_called_by_what_tells_them_apart() -> None:
    assert sections.labels_of(["time/step_s", "time/step_s/min", "time/step_s/p99"]) == [
        "each step",
        "min",
        "99th percentile",
    ]
    assert sections.labels_of(["train/lr/text", "train/lr/vision"]) == ["text", "vision"]
    assert sections.labels_of(["time/data_s/mean", "time/fwd_s/mean"]) == ["data", "forward"]
    assert sections.labels_of(["node/gpu_00/own_s", "node/gpu_01/own_s"]) == ["gpu_00", "gpu_01"]
    assert sections.labels_of(["eval/price_mae", "eval/blind/price_mae"]) == ["model", "blind"]
    assert sections.labels_of(["eval/by_depth/from_0_to_0_5/loss", "eval/by_depth/is_x_y/loss"]) == ["0 – 0.5", "x y"]


def test_every_registered_metric_with_a_panel_has_a_figure_that_draws_it() -> None:
    drawn = {metric.name for section in SECTIONS for panel in section.panels for metric in metrics_of(panel)}
    assert {metric.name for metric in REGISTRY if metric.panel} == drawn
    assert {panel.kind for section in layout.SECTIONS for panel in section.panels} == {
        "line", "area", "share", "points", "media",
    }  # fmt: skip
    assert not PLACEHOLDER.search("".join(panel.title for section in SECTIONS for panel in section.panels))


def test_the_slow_rank_is_named_with_its_host_and_its_reason(
    rich: tuple[Path, Page], record: rank_record.RankRecord
) -> None:
    (guilty,) = heatmap.guilty_ranks(record)
    assert (guilty.rank, guilty.host, guilty.excess_in) == (SLOW_RANK, "gpu-01", "computing")
    assert (guilty.first_step, guilty.last_step) == (200, 600)
    assert guilty.ratio == pytest.approx(1.47, abs=0.03)
    assert "Ranks that the others waited for" in rich[1].text and "5 gpu-01 1.47 ×" in rich[1].text
    assert {"Own time: step × rank", "Time in the loader: step × rank", "Waiting: step × rank"} <= {
        panel.title for panel in heatmap.rank_panels(record)
    }


def test_of_two_ranks_the_slower_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    with (tmp_path / "ranks" / "one.jsonl").open("w") as file:
        for step in (10, 20, 30, 40):
            line = rank_window(step, "one", [0, 1])
            line["values"] = {"health/data_s": [0.1, 0.1], "health/compute_s": [1.0, 1.33], "comm/wait_s": [0.3, None]}
            file.write(json.dumps(line) + "\n")
    record = read_ranks(tmp_path, [])
    assert record is not None
    assert [(one.rank, one.excess_in) for one in heatmap.guilty_ranks(record)] == [(1, "computing")]


def test_no_slow_rank_disappears_from_a_map_of_thousands() -> None:
    own = np.ones((5000, 700), np.float32)
    own[3210, 444] = 2.5  # one window of one rank
    wait = np.full((5000, 700), 0.4, np.float32)
    wait[3210, 444] = 0.0
    steps = np.arange(10, 50010, 10)
    cells, firsts = heatmap.downsampled(own, steps, np.nanmax)
    assert cells.shape == (heatmap.ROWS, heatmap.COLUMNS) and (cells > 2).sum() == 1
    row, column = np.argwhere(cells > 2)[0]
    assert firsts[column] <= steps[3210] and (column + 1 == len(firsts) or firsts[column + 1] > steps[3210])
    assert row == 444 * heatmap.ROWS // 700
    assert (heatmap.downsampled(wait, steps, np.nanmin)[0] < 0.1).sum() == 1


def test_windows_that_a_failure_took_back_are_not_in_the_maps(tmp_path: Path) -> None:
    write_ranks(tmp_path, 4, 2, range(310, 401, 10))  # the second attempt
    for path in (tmp_path / "ranks").glob("*.jsonl"):
        lost = [{**json.loads(line), "run/attempt": 1} for line in path.read_text().splitlines()]
        kept = [{**line, "train/step": line["train/step"] - 200} for line in lost]
        path.write_text("".join(json.dumps(line) + "\n" for line in [*kept, *lost]) + path.read_text())
    record = read_ranks(tmp_path, [])
    assert record is not None and record.steps.tolist() == [*range(110, 201, 10), *range(310, 401, 10)]


def test_of_hundreds_of_ranks_the_slowest_are_in_the_step_that_is_drawn(tmp_path: Path) -> None:
    write_ranks(tmp_path, 256, 8, range(580, 601, 10))
    record = read_ranks(tmp_path, [])
    assert record is not None and len(record.spans) == 256
    shown = gantt._chosen(record)
    assert len(shown) == gantt.MOST_RANKS and SLOW_RANK in shown
    panel = gantt.step_panel(record)
    assert panel is not None and "on 32 ranks of 256" in panel.caption and "step_panel" not in panel.svg


def test_the_timeline_of_attempts_the_plan_and_the_quarantine_are_there(rich: tuple[Path, Page]) -> None:
    text = rich[1].text
    assert "Where the time went" in text and "a line for each attempt" in text
    assert "Planned and measured" in text and "63 GiB" in text and "5,200 tokens/s" in text
    assert "picture cannot be decoded: truncated JPEG decode 10 train-000003.tar:000000" in text


def test_tokens_are_coloured_by_their_loss_and_markup_in_them_is_text(rich: tuple[Path, Page]) -> None:
    run, page = rich
    step, cards = hard_samples(read_run(run))
    assert step == 600 and [card.loss for card in cards] == ["4", "3.5", "3", "2.5", "2", "1.5"]
    assert cards[0].picture is None and cards[1].picture is not None
    assert cards[0].tokens[0].level is None and {token.level for card in cards for token in card.tokens} > {0, 3}
    assert page.text.count(HOSTILE) >= 7 and "<script>" not in page.source
    assert "script" not in page.tags


def test_a_picture_outside_the_folder_is_not_put_into_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_samples=4)
    (tmp_path / "secret.jpg").write_bytes(b"not yours")
    write_lists(run)
    path = run / "eval" / "step-000600" / "highest_loss.jsonl"
    path.write_text(path.read_text().replace("thumbnails/000001.jpg", "../../../secret.jpg"))
    _, cards = hard_samples(read_run(run))
    assert cards[1].picture is None and cards[2].picture is not None


DAMAGE = {
    "summary.json": ["{"],
    "config.yaml": ["- a list", "- of things"],
    "metrics.jsonl": ["[1]", '{"train/step": "x"}', '{"time": null, "run/attempt": 1, "train/step": 4}'],
    "quarantine.jsonl": ['{"reason": 3}', "null", "\xff"],
    "ranks/gpu-00.jsonl": ['{"ranks": [0]}', '{"train/step": 1, "ranks": [-4], "values": {}}', '{"train/st'],
    "ranks/gpu-01.jsonl": [
        '{"train/step": 10, "ranks": [1], "values": {"comm/wait_s": ["x"]}}',
        '{"train/step": 1, "ranks": [1, 2], "values": {"comm/wait_s": [1]}}',
    ],
    "eval/step-000600/predictions.jsonl": ['{"fields": 3}', "[]", '{"sample_id": 1'],
    "eval/step-000600/highest_loss.jsonl": [
        '{"loss": null}',
        '{"shard": "a", "key": "b", "loss": 1, "prompt": "p", "tokens": [3]}',
    ],
}
ALSO_DAMAGED = {  # and not worth a note: a plan can be made again, and what is no number is not shown
    "plan.json": ["[]"],
    "eval/step-000600/scores.json": ['{"eval/loss": "a word", "eval/price_mae": null, "eval/field_em/title": 1e999}'],
}


def test_damaged_files_give_a_page_that_names_each_of_them(tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    write_run(run, num_samples=4)
    (run / "ranks").mkdir()
    for name, lines in (DAMAGE | ALSO_DAMAGED).items():
        (run / name).write_bytes("".join(f"{line}\n" for line in lines).encode("latin-1"))
    page = Page(write_report(run))
    said = re.search('<div class="missing">.*?</div>', page.source, re.DOTALL)
    assert said and [name for name in DAMAGE if Path(name).name not in said.group()] == []


def test_half_a_record_keeps_its_other_half(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_samples=4)
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(content[:2000] + b"\x00" * 300 + content[2000:-40])
    page = Page(write_report(run))
    assert "is damaged" in page.text and "Loss" in page.text


def test_a_folder_of_ranks_that_are_no_files_or_another_name_is_left_alone(tmp_path: Path) -> None:
    assert read_ranks(tmp_path, []) is None
    (tmp_path / "ranks" / "dir.jsonl").mkdir(parents=True)
    assert read_ranks(tmp_path, []) is None


@pytest.mark.slow
def test_a_hundred_thousand_rows_make_a_page_in_seconds_and_of_a_few_megabytes(tmp_path: Path) -> None:
    run = write_rich_run(tmp_path / "long", num_samples=30)
    with (run / "metrics.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    with (run / "metrics.jsonl").open("w") as file:
        for repeat in range(100_000 // len(rows) + 1):
            for row in rows:
                step = row["train/step"] + 600 * repeat
                file.write(json.dumps({**row, "train/step": step, "run/attempt": 1, "time": 1.764e9 + step}) + "\n")
    shutil.rmtree(run / "ranks")
    write_ranks(run, 256, 4, range(10, 20_000, 10))
    began = time.process_time()
    path = write_report(run)
    print(f"{time.process_time() - began:.1f} s of processor time, {path.stat().st_size / 1e6:.2f} MB")
    assert path.stat().st_size < 4e6
