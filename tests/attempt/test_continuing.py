"""A run started again with other settings: what stops it, what is only said, and what is no change at all."""

import json
import subprocess

import pytest
import yaml
from conftest import REPOSITORY

from phi3v_dist import config, run
from phi3v_dist.attempt import continuing, environment
from phi3v_dist.attempt.finished import is_finished
from phi3v_dist.config import Settings, dump


@pytest.fixture
def begun(settings_tree, tmp_path):
    """A run folder with a checkpoint, made with `settings_tree`; returns what a second start with changes finds."""
    settings = Settings.model_validate(settings_tree)
    folder = settings.run.folder
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    ran_with = {"commit": environment.commit(), "versions": environment.versions(continuing.RECORDED)}

    def write(**changes):
        (folder / "config.yaml").write_text(yaml.safe_dump(dump(settings) | {"environment": ran_with | changes}))

    def again(*words: str) -> Settings:
        tree = yaml.safe_load(yaml.safe_dump(settings_tree))
        for word in words:
            key, _, value = word.partition("=")
            *parents, last = key.split(".")
            section = tree
            for part in parents:
                section = section[int(part)] if isinstance(section, list) else section.setdefault(part, {})
            section[last] = yaml.safe_load(value)
        return Settings.model_validate(tree)

    write()
    again.folder, again.write = folder, write
    return again


@pytest.mark.fault(42)
def test_changes_of_numbers_stop_a_resume_all_at_once_with_ways_to_go_on(begun):
    changed = begun("train.weight_decay=0.2", "data.row_length_tokens=900", "model.dtype=fp32", "run.seed=1")
    (message,) = continuing.problems(changed)
    lines = message.splitlines()
    assert lines[0] == f"{begun.folder} was trained so far with other settings:"
    assert set(lines[1:-1]) == {
        "  train.weight_decay: 0.1 → 0.2", "  data.row_length_tokens: 800 → 900", "  model.dtype: auto → fp32",
        "  run.seed: 0 → 1",
    }  # fmt: skip
    assert "run.allow_changes=true" in lines[-1] and "run.name" in lines[-1]
    assert message in run.problems(changed, world_size=1), "so launch/check.py says it too"


@pytest.mark.fault(42)
def test_other_data_stops_a_resume_and_the_same_place_in_another_spelling_does_not(begun, settings_tree, monkeypatch):
    (message,) = continuing.problems(begun("data.train.0.shards=other-*.tar"))
    assert "train-*.tar → other-*.tar" in message
    assert continuing.problems(begun("data.train.0.weight=2"))
    monkeypatch.chdir("/")
    assert not continuing.problems(begun(f"model.path={settings_tree['model']['path'].lstrip('/')}"))


@pytest.mark.parametrize(
    "word",
    [
        "observe.wandb=offline", "eval.samples=3", "checkpoint.keep=9", "watch.hang_s=99", "parallel.timeout_s=9",
        "data.num_workers=7", "data.prefetch_rows=9", "data.cache.path=/tmp/x", "data.max_bad_frac=0.5",
        "train.gradient_accumulation_steps=3",
    ],
)  # fmt: skip
def test_what_changes_no_numbers_may_change_without_a_word(begun, word):
    assert continuing.problems(begun(word)) == [] and continuing.warnings(begun(word)) == []


@pytest.mark.fault(42)
def test_another_length_and_another_validation_are_said_and_allowed(begun):
    longer = begun("train.steps=20", "data.validation=[]")
    assert continuing.problems(longer) == []
    curve, scores = continuing.warnings(longer)
    assert "another curve" in curve and "  train.steps: 10 → 20" in curve
    assert "cannot be compared" in scores


@pytest.mark.fault(42)
def test_allowed_changes_are_listed_and_go_on(begun):
    allowed = begun("run.allow_changes=true", "train.grad_clip=0.5")
    assert continuing.problems(allowed) == []
    (warning,) = continuing.warnings(allowed)
    assert "  train.grad_clip: 1.0 → 0.5" in warning


@pytest.mark.fault(42)
def test_another_commit_and_other_packages_are_a_warning_that_lists_them(begun):
    begun.write(commit="0" * 40, versions={"torch": "1.0", "wandb": environment.versions(["wandb"])["wandb"]})
    (warning,) = continuing.warnings(begun())
    assert f"  commit: {'0' * 40} → " in warning and "  torch: 1.0 → 2" in warning and "wandb" not in warning
    assert continuing.problems(begun()) == []


def test_settings_that_a_release_added_or_removed_are_no_change(begun):
    path = begun.folder / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["watch"], tree["train"]["eps"], tree["run"]["allow_changes"]
    tree["train"]["removed_since"] = 3
    path.write_text(yaml.safe_dump(tree))
    assert continuing.problems(begun()) == [] and continuing.warnings(begun()) == []
    assert "train.eps: 1e-08 → 0.1" in continuing.problems(begun("train.eps=0.1"))[0]


def test_where_a_run_began_is_compared_as_it_was_pinned(begun):
    path = begun.folder / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["model"]["init_from"] = "/runs/base/checkpoints/step-00000008"
    path.write_text(yaml.safe_dump(tree))
    assert continuing.problems(begun("model.init_from=/runs/base")) == []
    assert continuing.problems(begun("model.init_from=/runs/other"))
    assert continuing.problems(begun())


@pytest.mark.parametrize("content", ["", "- a", "{", "train: 3"])
def test_a_damaged_record_does_not_stand_in_the_way(begun, content):
    (begun.folder / "config.yaml").write_text(content)
    assert continuing.problems(begun("train.eps=0.1")) == []


def test_without_a_checkpoint_nothing_is_compared(begun):
    (begun.folder / "checkpoints" / "step-00000004").rmdir()
    assert continuing.problems(begun("train.eps=0.1")) == []


def test_an_installation_in_somebodys_repository_has_no_commit(tmp_path, monkeypatch):
    for words in (
        ["init", "--quiet"],
        ["-c", "user.name=x", "-c", "user.email=x", "commit", "--allow-empty", "-qm", "x"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    package = tmp_path / "site-packages" / "phi3v_dist"
    package.mkdir(parents=True)
    monkeypatch.setattr(environment, "PACKAGE", package)
    assert environment.commit() == "unknown"


def test_the_commit_is_the_checkouts():
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    assert environment.commit() == (git.stdout.strip() or "unknown")


@pytest.mark.fault(40)
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_by_itself(config_file):
    settings = config.load(config_file)
    folder = settings.run.folder
    (folder / "checkpoints").mkdir(parents=True)
    row = {"time": 1.0, "run/attempt": 1, "train/step": 4, "ckpt/save_s": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (message,) = continuing.problems(settings)
    assert "had a checkpoint of step 4, and none is left" in message and "remove the run folder" in message
    assert continuing.problems(config.load(config_file, ["run.allow_changes=true"])) == []
    (folder / "checkpoints" / "step-00000004").mkdir()
    assert continuing.problems(settings) == []


def test_a_run_is_finished_until_more_steps_or_epochs_are_asked_for(config_file):
    def asked(*words: str) -> bool:
        return is_finished(config.load(config_file, words))

    folder = config.load(config_file).run.folder
    folder.mkdir(parents=True)
    assert not asked()
    (folder / "summary.json").write_text('{"train/step": 10}')
    assert asked() and asked("train.steps=8") and not asked("train.steps=12")
    (folder / "config.yaml").write_text("train: {epochs: 2}")
    assert asked("train.steps=null", "train.epochs=2") and not asked("train.steps=null", "train.epochs=3")
