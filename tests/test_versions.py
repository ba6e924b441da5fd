"""Accepted versions: one place for their bounds, and a wrong one is named before anything is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment
from declared import read_setup
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from phi3v_dist import versions
from phi3v_dist.attempt import build_cache
from phi3v_dist.cluster.findings import summarize
from phi3v_dist.cluster.report import read_reports
from phi3v_dist.errors import ConfigError
from phi3v_dist.planner.zero_share import zero_share

TIMEOUT_S = 240


def declared() -> dict[str, Requirement]:
    """Requirements of setup.cfg, with those of all extras, by name."""
    found = [Requirement(line) for lines in read_setup().values() for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_setup_cfg_declares_the_versions_that_the_code_accepts():
    bounds = {package: declared()[package].specifier for package in versions.ACCEPTED}
    assert bounds == {
        package: Requirement(package + accepted).specifier for package, accepted in versions.ACCEPTED.items()
    }


def test_pinned_versions_satisfy_the_declared_bounds():
    pins = [Requirement(line) for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    for name, requirement in declared().items():
        if name != "flash-attn":  # built on the cluster, against its torch
            assert name in pinned, f"constraints.txt does not pin {name}"
            assert requirement.specifier.contains(pinned[name]), f"{requirement} does not accept {pinned[name]}"


@pytest.mark.parametrize(
    ("package", "version", "accepted"),
    [
        ("deepspeed", "0.19.8", True),
        ("deepspeed", "0.19.8+unknown", True),
        ("deepspeed", "0.19.9", False),
        ("torch", "2.13.1+cu130", True),
        ("torch", "2.13.0a0+git1234", False),
        ("torch", "2.14.0.dev20261101", False),
        ("torch", "2.14.0", False),
        ("transformers", "5.23.4", True),
        ("transformers", "a fork", False),
    ],
)
def test_accepted_versions(package, version, accepted, monkeypatch):
    assert versions.accepts(package, version) is accepted
    monkeypatch.setattr(versions, "version", lambda name: version)
    assert versions.problems(package) == (
        []
        if accepted
        else [
            f"{package} {version} is installed, phi3v-dist needs {package}{versions.ACCEPTED[package]}: "
            f"pip install '{package}{versions.ACCEPTED[package]}'"
        ]
    )


@pytest.fixture
def other_packages(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with another DeepSpeed, and heavy packages that cannot be imported."""
    folder = tmp_path / "packages"
    (folder / "deepspeed-0.20.0.dist-info").mkdir(parents=True)
    (folder / "deepspeed-0.20.0.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.20.0\n")
    for name in ("torch", "transformers", "deepspeed"):
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} was loaded')\n")
    return folder


@pytest.mark.parametrize("command", ["check", "doctor", "train"])
def test_another_deepspeed_is_named_in_one_line_before_anything_is_loaded(
    command, other_packages, config_file, tmp_path
):
    report = ["--report", str(tmp_path / "reports"), "--token", "1"] if command == "doctor" else []
    done = subprocess.run(
        [sys.executable, f"launch/{command}.py", "--config", str(config_file), *report],
        env=environment(PYTHONPATH=f"{other_packages}:{REPOSITORY}"), cwd=REPOSITORY, capture_output=True, text=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    line = "deepspeed 0.20.0 is installed, phi3v-dist needs deepspeed==0.19.8: pip install 'deepspeed==0.19.8'"
    assert (done.returncode, done.stderr) == (ConfigError.exit_code, f"configuration: 1 problem\n  - {line}\n")

    if report:  # the job learns it from the node's report
        (found,) = read_reports(tmp_path / "reports")
        findings = summarize([found], [found.host], "1")
        assert findings.exit_code == ConfigError.exit_code
        assert any(line in text for text in findings.lines()), findings.lines()


def test_what_retells_rules_of_deepspeed_refuses_another_one(monkeypatch, tmp_path):
    monkeypatch.setenv(build_cache.VARIABLE, str(tmp_path))
    installed = versions.version
    monkeypatch.setattr(versions, "version", lambda name: "0.20.0" if name == "deepspeed" else installed(name))
    for use in (lambda: zero_share([], {"zero_optimization": {}}, 2, 2), lambda: build_cache.build("async_io")):
        with pytest.raises(ConfigError, match="deepspeed 0.20.0 is installed"):
            use()
