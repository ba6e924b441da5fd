"""`phi3v-init` copies what a run needs, in the spelling of an installation, and overwrites nothing."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from phi3v_dist import config
from phi3v_dist.cli import init
from phi3v_dist.errors import ConfigError
from phi3v_dist.parallel import zero

RECIPES = sorted(path.stem for path in (REPOSITORY / "launch/configs").glob("*.yaml"))


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["phi3v-init", *words])
    init.run_command()


@pytest.mark.parametrize("name", RECIPES)
def test_a_copied_recipe_brings_every_file_that_it_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, name)
    settings = config.load(f"configs/{name}.yaml")
    assert zero.read(settings.parallel.deepspeed) and settings.parallel.deepspeed.is_file()
    text = Path(f"configs/{name}.yaml").read_text()
    assert all(Path(named).is_file() for named in re.findall(r"\b(?:configs|ds_configs)/[\w./-]+\.(?:yaml|json)", text))
    assert yaml.safe_load(text) == yaml.safe_load((REPOSITORY / f"launch/configs/{name}.yaml").read_text())
    (schema,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, re.M)
    assert Path("configs", schema).is_file()


def test_nothing_that_is_copied_names_the_repository(tmp_path, monkeypatch):
    run(monkeypatch, *RECIPES, "--out", str(tmp_path))
    copied = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(copied) > 15
    assert [path for path in copied if "launch/" in path.read_text()] == []
    page = (tmp_path / "slurm/README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", page)
    assert links and all((tmp_path / "slurm" / link).exists() for link in links)
    scripts = {path.name for path in (tmp_path / "slurm").iterdir() if path.stat().st_mode & 0o111}
    assert scripts == {"train.sh", "sweep.sh", "deputy.sh"}


def test_an_existing_file_is_not_overwritten_and_then_nothing_is_written(tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/env.sh").write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"content differs: \S*slurm/env\.sh\. .*--no-slurm"):
        run(monkeypatch, "--out", str(tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "slurm/env.sh"]

    run(monkeypatch, "lora", "--out", str(tmp_path), "--no-slurm")
    assert (tmp_path / "configs/lora.yaml").is_file() and (tmp_path / "slurm/env.sh").read_text() == "# mine\n"


def test_a_second_recipe_joins_the_first(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--out", str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    run(monkeypatch, "lora", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}/configs/lora.yaml\n{len(before) - 1} files were there already")
    assert f"cd {shlex.quote(str(tmp_path))} && phi3v-check --config configs/lora.yaml" in printed
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {tmp_path / "configs/lora.yaml"}
    assert all(after[path] == time for path, time in before.items())


def test_an_unknown_recipe_and_a_folder_that_cannot_be_made_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no recipe is called 'quikstart'; did you mean quickstart?"):
        run(monkeypatch, "quikstart", "--out", str(tmp_path))
    with pytest.raises(ConfigError, match="no recipe is called 'x'; there are icons, long"):
        run(monkeypatch, "x", "--out", str(tmp_path))
    (tmp_path / "configs").write_text("")
    with pytest.raises(ConfigError, match=r"configs/settings\.schema\.json cannot be written"):
        run(monkeypatch, "--out", str(tmp_path))


@pytest.mark.parametrize("name", ["plain", "with space", "it's $(touch fired)", "brace}"])
def test_jobs_use_the_environment_that_copied_their_scripts(name, tmp_path, monkeypatch):
    prefix = tmp_path / name
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin/python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "prefix", str(prefix))
    out = tmp_path / "out"
    run(monkeypatch, "--out", str(out))
    script = 'PHI3V_STAGE=; source slurm/env.sh; printf %s "$PHI3V_VENV"'
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-uc", script], cwd=out, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == str(prefix) and not (out / "fired").exists()


def test_a_systems_python_leaves_the_choice_to_the_scripts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    run(monkeypatch, "--out", str(tmp_path))
    assert init.VENV_LINE in (tmp_path / "slurm/env.sh").read_text()
