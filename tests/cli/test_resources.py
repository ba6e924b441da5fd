"""Recipes and DeepSpeed files are looked up in the working directory first, then in the package."""

import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY

from phi3v_dist import config, resources
from phi3v_dist.errors import ConfigError
from phi3v_dist.parallel import zero


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", ["launch/configs/quickstart.yaml", "configs/quickstart.yaml", "quickstart.yaml"])
def test_a_recipe_is_found_by_each_of_its_names(name, elsewhere, caplog):
    with caplog.at_level("INFO"):
        settings = config.load(name, ["train.steps=70"])
    assert (settings.run.name, settings.train.steps) == ("quickstart", 70)
    assert f"{name} is not here" in caplog.text


def test_a_file_of_ones_own_comes_first(elsewhere, caplog):
    (elsewhere / "configs").mkdir()
    text = (REPOSITORY / "launch/configs/quickstart.yaml").read_text()
    (elsewhere / "configs/quickstart.yaml").write_text(text.replace("name: quickstart", "name: mine"))
    with caplog.at_level("INFO"):
        assert config.load("configs/quickstart.yaml").run.name == "mine"
    assert "is not here" not in caplog.text
    shutil.copytree(REPOSITORY / "ds_configs", elsewhere / "ds_configs")
    path = elsewhere / "ds_configs/zero3.json"
    path.write_text('{"zero_optimization": {"stage": 3, "mine": 1}}')
    assert zero.read(Path("ds_configs/zero3.json"))["zero_optimization"]["mine"] == 1


@pytest.mark.parametrize("name", ["ds_configs/zero3_lean.json", "zero3_lean.json"])
def test_a_deepspeed_file_is_found_elsewhere_too(name, elsewhere):
    assert zero.read(Path(name)) == zero.read(REPOSITORY / "ds_configs/zero3_lean.json")


@pytest.mark.parametrize(
    "path", ["other/quickstart.yaml", "../configs/quickstart.yaml", "/configs/quickstart.yaml", "configs", "."]
)
def test_other_paths_name_nothing_that_ships(path, elsewhere):
    assert resources.find(Path(path), "configs") == Path(path)


def test_a_slip_in_a_shipped_name_is_named(elsewhere):
    with pytest.raises(ConfigError, match=r"no such file; did you mean configs/quickstart\.yaml\?"):
        config.load("configs/quickstrat.yaml")
    with pytest.raises(ConfigError, match=r"no such file; did you mean ds_configs/zero3_lean\.json\?"):
        zero.read(Path("ds_configs/zero3_laen.json"))
    with pytest.raises(ConfigError, match=r"mine/quickstrat\.yaml: no such file$"):
        config.load("mine/quickstrat.yaml")
