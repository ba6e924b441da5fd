"""The JSON schema of the settings is current, takes every recipe, and finds mistakes."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import REPOSITORY

from phi3v_dist import config
from phi3v_dist.cli import check

FOLDER = REPOSITORY / "launch/configs"
SCHEMA = FOLDER / "settings.schema.json"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def mistakes(tree: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    return [error.json_path for error in validator.iter_errors(tree)]


def test_the_file_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as end:
        check.build_parser().parse_intermixed_args(["--schema"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and json.loads(printed) == json.loads(json.dumps(config.json_schema()))
    command = "python launch/check.py --schema > launch/configs/settings.schema.json"
    assert SCHEMA.read_text() == printed, f"the settings have changed: {command}"


def test_the_file_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_it_and_is_valid(path: Path):
    text = path.read_text()
    assert text.startswith(f"# yaml-language-server: $schema={SCHEMA.name}\n")
    assert mistakes(yaml.safe_load(text)) == []


def test_what_the_loader_takes_is_valid_and_what_it_refuses_is_not(settings_tree):
    settings_tree["eval"]["by"] = {"depth": [0, 0.5, 1], "kind": "values"}
    settings_tree["data"]["train"].append({"shards": ["a.tar", "b.tar"]})
    assert mistakes(settings_tree) == []
    settings_tree["train"]["stepz"] = 3
    settings_tree["model"]["dtype"] = "fp16"
    settings_tree["data"]["packing"] = "maybe"
    assert sorted(mistakes(settings_tree)) == ["$.data.packing", "$.model.dtype", "$.train"]
