"""The workspace as code: complete, equal to its golden, and what the real client sends of it.

python tests/observe/test_dashboard.py        writes tests/golden/wandb_workspace.json anew
"""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, environment
from wandb_stub import ENTITY, WandbStub, answer
from wandb_world import DUMMY_KEY, fresh_client, stub  # noqa: F401

from phi3v_dist.cli import dashboard as script
from phi3v_dist.config import Settings
from phi3v_dist.errors import ConfigError, LaunchError, Phi3VError
from phi3v_dist.observe.layout import SECTIONS, metrics_of
from phi3v_dist.observe.metrics import PLACEHOLDER, REGISTRY, lookup

workspaces = pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed (extra `dashboard`)")

from phi3v_dist.observe import dashboard  # noqa: E402  # after the skip

GOLDEN = REPOSITORY / "tests" / "golden" / "wandb_workspace.json"
SUMMARY_ONLY = ("eval/best_", "eval/chance_")  # never in the history that a chart draws


@pytest.fixture(scope="module")
def spec() -> dict:
    return dashboard.spec()


def panels(spec: dict) -> list[tuple[str, dict]]:
    """Section and configuration of every panel."""
    sections = spec["section"]["panelBankConfig"]["sections"]
    return [(section["name"], panel) for section in sections for panel in section["panels"]]


def example(name: str) -> str:
    return PLACEHOLDER.sub("any_1", name)


def drawn_by(panel: dict) -> set[str]:
    """Every registered name that a panel shows, patterns by an example."""
    config = panel["config"]
    names = {*config.get("metrics", ()), *config.get("mediaKeys", ())}
    pattern = config.get("metricRegex")
    return names | {example(m.name) for m in REGISTRY if pattern and re.search(pattern, example(m.name))}


def test_every_registered_name_has_its_panel_or_says_that_it_has_none(spec: dict) -> None:
    charts = [(panel["config"].get("chartTitle"), drawn_by(panel)) for _, panel in panels(spec)]
    for metric in REGISTRY:
        shown_in = {title for title, names in charts if example(metric.name) in names}
        if metric.panel is not None:
            assert metric.panel in shown_in, metric.name
        elif not metric.name.startswith(SUMMARY_ONLY):
            assert not shown_in, f"{metric.name} says that no panel draws it"


def test_every_name_in_a_panel_is_registered(spec: dict) -> None:
    shown = set().union(*(drawn_by(panel) for _, panel in panels(spec)))
    assert len(shown) > 80 and all(lookup(name) for name in shown)
    compared = json.dumps([panel for section, panel in panels(spec) if section == dashboard.COMPARE])
    for name in re.findall(r'"summary:([^"]+)"', compared):
        assert lookup(name), name


def test_the_workspace_has_the_sections_of_the_layout_and_a_comparison_tiles_first(spec: dict) -> None:
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == [*(section.title for section in SECTIONS), dashboard.COMPARE]
    for section, made in zip(SECTIONS, sections, strict=False):
        kinds = [panel["viewType"] for panel in made["panels"]]
        tiles = sum(panel.tile is not None for panel in section.panels)
        assert kinds[:tiles] == ["Scalar Chart"] * tiles and "Scalar Chart" not in kinds[tiles:]
        titles = [panel["config"]["chartTitle"] for panel in made["panels"][tiles:]]
        assert titles == [panel.title for panel in section.panels]
        assert made["localPanelSettings"]["xAxis"] == "train/step"
        assert all(metrics_of(panel) for panel in section.panels)
    kinds = {panel["config"].get("plotType") for _, panel in panels(spec)}
    assert kinds >= {"line", "stacked-area", "pct-area"}
    assert {panel["viewType"] for panel in sections[-1]["panels"]} == {
        "Run Comparer", "Parallel Coordinates Plot", "Scatter Plot",
    }  # fmt: skip


def test_settings_that_are_compared_exist() -> None:
    for name in dashboard.COMPARED:
        kind: Any = Settings
        for part in name.split("."):
            kind = kind.model_fields[part].annotation
        assert kind in (int, float), name


def test_the_workspace_equals_its_golden(spec: dict) -> None:
    assert spec == json.loads(GOLDEN.read_text()), "if that is meant, see the top of this file"


def test_the_workspace_is_made_without_network_and_key(
    spec: dict, fresh_client: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.chdir(tmp_path)
    assert dashboard.spec() == spec
    assert dashboard.report("somebody").blocks
    assert not any(tmp_path.iterdir())


def run_folder(path: Path, **observe: str) -> Path:
    path.mkdir(parents=True)
    path.joinpath("config.yaml").write_text(yaml.safe_dump({"observe": observe}))
    return path


@pytest.mark.supports("wandb online", on="one process")
def test_push_saves_the_workspace_that_json_prints_in_the_project_of_the_run(
    stub: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run", wandb_project="pictures")
    monkeypatch.setattr(sys, "argv", ["dashboard.py", "--push", str(run)])
    script.run_command()
    (view,) = stub.views
    assert (view["entityName"], view["projectName"], view["type"]) == (ENTITY, "pictures", "project-view")
    words = [sys.executable, "launch/dashboard.py", "--json"]
    printed = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0 and printed.stderr == ""
    assert dashboard.without_ids(json.loads(view["spec"])) == json.loads(printed.stdout)

    monkeypatch.setattr(sys, "argv", ["dashboard.py", "--report", str(run), "--entity", "team"])
    script.run_command()
    out = capsys.readouterr()
    assert out.out.count(stub.url) == 2 and DUMMY_KEY not in out.out + out.err
    report = stub.views[1]
    assert (report["entityName"], report["projectName"]) == ("team", "pictures")
    assert '"project":{"name":"pictures","entityName":"team"' in json.dumps(json.loads(report["spec"])).replace(" ", "")


@pytest.mark.parametrize(
    ("fault", "times", "succeeds"),
    [
        (answer(429), 1, True),
        (answer(500), 1, True),
        (answer(200, after_s=2, body=b'{"data": {}}'), 1, False),
        (answer(200, body=b"<html>a proxy's page</html>"), 50, False),
        (answer(403), 50, False),
    ],
    ids=["429", "500", "slow and empty", "malformed", "forbidden"],
)
def test_a_bad_answer_to_a_push_is_tried_again_or_one_line(
    fault, times: int, succeeds: bool, stub: WandbStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.faults["UpsertView2"] = [fault] * times
    if succeeds:
        assert dashboard.push(ENTITY, "pictures").startswith(stub.url) and len(stub.views) == 1
    else:
        with pytest.raises(LaunchError, match="asking the W&B server for a new view"):
            dashboard.push(ENTITY, "pictures")


@pytest.mark.parametrize(
    ("words", "key", "code", "said"),
    [
        (["--push"], DUMMY_KEY, 2, "which project?"),
        (["--push", "--project", "p"], "", 2, "no API key (set WANDB_API_KEY"),
        (["--push", "--project", "p"], DUMMY_KEY, 5, "http://127.0.0.1:9 cannot be reached"),
        (["--push", "no-such-run"], DUMMY_KEY, 2, "no-such-run is not a run folder: there is no such folder"),
        (["--push", "a", "b"], DUMMY_KEY, 2, "2 were given"),
        (["--json", "a"], DUMMY_KEY, 2, "takes no other word"),
        (["--sync"], DUMMY_KEY, 2, "needs at least one run folder"),
        (["--sync", "a", "--project", "p"], DUMMY_KEY, 2, "takes no --entity and no --project"),
        (["--sync", "a"], "", 2, "no API key"),
        (["--json", "--push"], DUMMY_KEY, 2, "not allowed with argument"),
    ],
)
def test_wrong_input_is_told_in_words(
    words: list[str], key: str, code: int, said: str, fresh_client: None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(sys, "argv", ["dashboard.py", *words])
    with pytest.raises((SystemExit, Phi3VError)) as found:
        script.run_command()
    error = found.value
    text = capsys.readouterr().err if isinstance(error, SystemExit) else error.report()
    assert said in text and (error.code if isinstance(error, SystemExit) else error.exit_code) == code


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'wandb-workspaces=="):
        dashboard.require_package()
