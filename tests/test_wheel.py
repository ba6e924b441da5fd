"""The wheel alone prepares data, trains, evaluates, exports and reports. Jobs: slurm/test_wheel_jobs.py."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from installed import Installation

import phi3v_dist

SHORT = (
    "train.steps=3", "train.warmup_steps=1", "eval.every_steps=3", "eval.samples=2", "eval.base=false",
    "eval.blind=false", "eval.max_new_tokens=4", "checkpoint.every_steps=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def installation(tmp_path_factory) -> Installation:
    return Installation.build(tmp_path_factory.mktemp("installation"))


def first_command(recipe: Path) -> list[str]:
    """The command in a recipe's head."""
    line = next(line for line in recipe.read_text().splitlines() if not line.startswith("# yaml-language-server"))
    words = shlex.split(line.removeprefix("# "))
    assert words[0] == "deepspeed"
    return words


@pytest.mark.supports("deepspeed", on="2 ranks")
def test_installed_commands_do_everything_in_an_empty_directory(installation, tmp_path):
    def run(*words: str) -> str:
        return installation.run(tmp_path, *words)

    # The recipe's own settings, on little data and for few steps
    run("phi3v-init", "quickstart")
    run("phi3v-prepare", "sample", "--out", "data/catalogue", "num_products=24")
    run("phi3v-prepare", "tiny", "--out", "data/tiny-phi3v")
    recipe = ("--config", "configs/quickstart.yaml", *SHORT)
    assert "3 steps" in run("phi3v-check", *recipe, "--world_size", "2")
    run(*first_command(tmp_path / "configs/quickstart.yaml"), *SHORT)
    one_rank = ("--standalone", "--nproc_per_node", "1", "--module", "phi3v_dist.cli.train")
    assert "is finished" in run("torchrun", *one_rank, *recipe)
    run("phi3v-export", "runs/quickstart")
    run("phi3v-evaluate", "--model", "runs/quickstart/export", "--out", "scores", *recipe)
    run("phi3v-report", "runs/quickstart")

    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert summary["train/step"] == 3
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    assert scores["eval/loss"] == pytest.approx(summary["eval/loss"], rel=1e-5)
    assert (tmp_path / "runs/quickstart/report.html").stat().st_size > 10_000
    assert installation.opened() == [], "files of the repository were read"

    # Proof that a file of the repository would have been found
    installation.run(tmp_path, "python", "-c", f"open({str(REPOSITORY / 'README.md')!r})")
    assert installation.opened() == [str(REPOSITORY / "README.md")]


def test_the_installation_is_whole_and_has_no_other_top_level_package(installation, tmp_path):
    where = installation.run(tmp_path, "python", "-c", "import phi3v_dist; print(phi3v_dist.__file__)")
    assert where.strip() == str(installation.site_packages / "phi3v_dist" / "__init__.py")
    ours = {path.name for path in installation.site_packages.iterdir()}
    version = phi3v_dist.__version__
    assert ours == {"phi3v_dist", f"phi3v_dist-{version}.dist-info", "dependencies.pth", "sitecustomize.py"}

    check = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", installation.python, "check"]
    done = subprocess.run(check, capture_output=True, text=True, env=installation.environment(tmp_path))
    assert done.returncode == 0 and "No broken requirements" in done.stdout, done.stdout


def test_a_name_is_looked_up_in_the_working_directory_first(installation, tmp_path):
    begin = ("phi3v-job", "begin", "--config", "quickstart.yaml")  # reads the settings, and imports little
    shipped = installation.run(tmp_path, *begin)
    assert f"run={tmp_path}/runs/quickstart" in shipped and "is not here" in shipped
    (tmp_path / "quickstart.yaml").write_text("run: {name: mine}\nmodel: {path: x}\ndata: {train: [{shards: x.tar}]}\n")
    mine = installation.run(tmp_path, *begin, "train.steps=3")
    assert f"run={tmp_path}/runs/mine" in mine and "is not here" not in mine


def test_installed_commands_name_themselves_as_they_are_typed(installation, tmp_path):
    text = installation.run(tmp_path, "phi3v-doctor", "--help")
    assert "phi3v-doctor --config" in text and "launch/" not in text
    version = installation.run(tmp_path, "phi3v-train", "--version")
    assert version.split() == ["phi3v-dist", phi3v_dist.__version__]
