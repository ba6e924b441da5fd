"""What a run says about its model before one exists: every mistake at once, and settings without effect."""

import json
import shutil

import pytest
import torch

from phi3v_dist.config import Settings, load
from phi3v_dist.errors import ConfigError
from phi3v_dist.model import build

CPU = torch.device("cpu")


def settings_of(tree, **changes) -> Settings:
    tree = {section: dict(content) for section, content in tree.items()}
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return Settings.model_validate(tree)


def test_a_good_model_has_no_problems(settings_tree):
    assert build.problems(settings_of(settings_tree), CPU) == []


def test_mistakes_of_every_kind_come_together(settings_tree, tmp_path):
    wrong = settings_of(
        settings_tree, model__init_from=str(tmp_path / "nowhere"), model__attention="flash_attention_2",
        train__parts={"vision": "lora"}, train__lora={"targets": ["fc9"]},
    )  # fmt: skip
    found = build.problems(wrong, CPU)
    assert len(found) == 3
    for words in ("nowhere: no such folder", "flash_attention_2, but there is no GPU", "fc9: matches no linear layer"):
        assert sum(words in problem for problem in found) == 1, words


def test_weights_of_another_size_are_named_before_the_run(settings_tree, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    found = build.problems(settings_of(settings_tree, model__path=str(folder)), CPU)
    assert len(found) == 4 and all("config.json says" in problem for problem in found)


def test_a_folder_without_config_is_the_only_thing_said(settings_tree, tmp_path):
    found = build.problems(settings_of(settings_tree, model__path=str(tmp_path)), CPU)
    assert len(found) == 1 and "config.json: no such file" in found[0]


def test_a_model_trained_under_another_rule_needs_a_word(settings_tree, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "origin.json").write_text('{"longrope": "long"}')
    for key in ("model__path", "model__init_from"):
        found = build.problems(settings_of(settings_tree, **{key: str(folder)}), CPU)
        assert len(found) == 1 and "write model.longrope=long to go on so, or model.longrope=document" in found[0]
        said = settings_of(settings_tree, **{key: str(folder), "model__longrope": "document"})
        assert build.problems(said, CPU) == []


@pytest.mark.parametrize(
    ("changes", "key", "why"),
    [
        ({"train__parts": {"vision": "frozen"}}, "train.learning_rate.vision", "vision is frozen"),
        ({"train__lora": {"rank": 4}}, "train.lora", "no part is set to lora"),
        ({"model__vision_chunk_crops": 8}, "model.vision_chunk_crops", "`model.gradient_checkpointing` is off"),
    ],
)
def test_a_setting_without_effect_says_so(settings_tree, changes, key, why):
    assert not any("no effect" in line for line in build.describe(settings_of(settings_tree), CPU))
    lines = build.describe(settings_of(settings_tree, **changes), CPU)
    assert f"note     `{key}` has no effect: {why}" in lines


def test_freezing_everything_and_dora_are_refused(config_file):
    with pytest.raises(ConfigError, match="freezes everything, so there is nothing to train"):
        load(config_file, ["train.parts={text: frozen, vision: frozen, projector: frozen}"])
    with pytest.raises(ConfigError, match=r"`train.parts.text` is 'dora': use lora: DoRA needs"):
        load(config_file, ["train.parts.text=dora"])
