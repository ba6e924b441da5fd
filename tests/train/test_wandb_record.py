"""What a real run of two ranks left for W&B, read back by the client's own reader, beside its record."""

import math
from itertools import pairwise

import pytest
import yaml
from wandb_world import DUMMY_KEY, offline_runs, records

from phi3v_dist.observe.metrics import ATTEMPT, STEP, entry_name, expected_names, lookup
from phi3v_dist.observe.tracker import read_rows

MEDIA = {"eval/predictions", "eval/images"}


@pytest.fixture(scope="module")
def written(reference) -> list[dict]:
    (folder,) = offline_runs(reference)  # one run folder: the other rank and DeepSpeed's own monitor are silent
    return records(folder)


@pytest.fixture(scope="module")
def rows(written) -> list[dict]:
    return [record["history"]["item"] for record in written if record["type"] == "history"]


def names(row: dict) -> set[str]:
    """Registered names of a row: without W&B's own columns, media by the name that they were logged under."""
    return {name.partition(".")[0] for name in row if not name.startswith("_")}


@pytest.mark.supports("wandb offline", on="2 ranks")
def test_wandb_holds_every_row_of_the_record_and_nothing_else(reference, rows):
    recorded = read_rows(reference)
    media = [row for row in rows if names(row) & MEDIA]
    numbers = [row for row in rows if not names(row) & MEDIA]
    assert [names(row) for row in numbers] == [row.keys() - {"time"} for row in recorded]
    assert [(row[STEP], names(row)) for row in media] == [(step, {STEP, *MEDIA}) for step in (0, 10)]
    for sent, kept in zip(numbers, recorded, strict=True):
        for name in names(sent):
            assert math.isfinite(sent[name]) and sent[name] == pytest.approx(kept[name], rel=1e-12), name
    for name in set().union(*map(names, rows)) - {STEP, ATTEMPT}:  # a save's row comes when it is written, steps later
        steps = [row[STEP] for row in rows if name in names(row)]
        last = steps[-2:] if name.startswith("goodput/") else []  # said once more when the run ends, of the same step
        assert all(earlier < later or [earlier, later] == last for earlier, later in pairwise(steps)), (name, steps)
    assert max(row[STEP] for row in rows) == 10


def test_every_name_is_registered_and_the_x_axis_is_the_trained_step(written, rows):
    shown = set().union(*map(names, rows))
    assert [name for name in shown if lookup(name) is None] == []
    entries = {entry_name(name) for name in shown}
    assert entries == expected_names("ranks", "validation", "checkpoint", "wandb", "base")
    axes = [record["metric"] for record in written if record["type"] == "metric"]
    assert {axis.get("step_metric", STEP) for axis in axes} == {STEP}
    assert {"name": STEP, "hidden": True}.items() <= {**axes[0], **axes[0]["options"]}.items()


def test_pictures_and_the_settings_with_what_they_ran_with_are_in_the_run_folder(reference, written):
    (folder,) = offline_runs(reference)
    assert list(folder.glob("files/media/images/**/*.jpg")) and (reference / "wandb" / "data").is_dir()
    (run,) = [record["run"] for record in written if record["type"] == "run"][:1]
    config = run["config"]["update"]
    resolved = yaml.safe_load((reference / "config.yaml").read_text())
    assert {name: config[name] for name in resolved} == resolved and "torch" in config["environment"]["versions"]
    files = [path for path in (reference / "wandb").rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".wandb"] == list(folder.glob("*.wandb"))
    assert not any(DUMMY_KEY.encode() in path.read_bytes() for path in files)
