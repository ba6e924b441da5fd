"""Files that only other programs read, such as the CI workflow, agree with the repository."""

import json
import os
import re
import shutil

import pytest
import yaml
from conftest import REPOSITORY

import phi3v_dist

IMAGES = ("Dockerfile", "slurm/phi3v.def")


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def test_the_workflow_runs_the_ci_script():
    (job,) = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)
    assert "3.11" in job["container"]["image"]


def test_the_ci_script_runs_the_readmes_test_command():
    commands = [line for line in read(".ci/run").splitlines() if line.startswith("make ")]
    assert commands == ["make test"]
    assert re.search(r"^make test\b", read("README.md"), re.M)


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_what_github_asks_of_them(name):
    form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= set(form)
    assert all(part["attributes"]["label"] for part in form["body"])


def test_pre_commit_runs_programs_that_make_setup_installs():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    programs = [hook["entry"].split()[0] for hook in repository["hooks"]]
    assert repository["repo"] == "local" and len(programs) >= 5
    missing = [program for program in programs if not shutil.which(program.removeprefix(".venv/bin/"))]
    assert missing == []


def test_the_citation_has_the_version_of_the_package():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == phi3v_dist.__version__


def test_both_container_images_are_made_by_one_script_from_the_same_files_and_versions():
    docker, apptainer = map(read, IMAGES)
    copied = {name for line in re.findall(r"^COPY (.*) /source\S*$", docker, re.M) for name in line.split()}
    assert copied == set(re.findall(r"^    (\S+) /source/\S+$", apptainer, re.M))
    assert copied <= {path.name for path in REPOSITORY.iterdir()}
    assert copied == set(re.findall(r"^!(\S+)$", read(".dockerignore"), re.M))
    for text in (docker, apptainer):
        assert "bash /source/slurm/container.sh /source" in text
    versions = [dict(re.findall(r"\b(CUDA|FLASH_ATTN)=([\w.]+)$", text, re.M)) for text in (docker, apptainer)]
    assert versions[0] == versions[1] and set(versions[0]) == {"CUDA", "FLASH_ATTN"}
    images = [re.findall(r"nvidia/cuda:.*?-devel-(\S+)", text) for text in (docker, apptainer)]
    assert images[0][0] == images[1][0]


def test_the_development_container_sets_up_as_a_person_does():
    assert json.loads(read(".devcontainer/devcontainer.json"))["postCreateCommand"] == "make setup"
