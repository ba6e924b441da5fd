"""The registry and the layout → a W&B workspace, and a report for sharing, as code.

What comes in: nothing but the two tables. What goes out: `spec()`, the JSON that W&B stores for a workspace, made
without network or key; `push` and `share` send it. Surprise: wandb-workspaces makes the JSON, but only behind private
methods (`_to_model`), which are used here alone; its version is pinned in setup.cfg, and a golden file holds what came
out. What it changes with each run of the program (`__id__`) is left out of what is compared.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phi3v_dist.errors import ConfigError, LaunchError
from phi3v_dist.observe.layout import SECTIONS, Panel, Section, metrics_of
from phi3v_dist.observe.registry import PLACEHOLDER, STEP, Metric
from phi3v_dist.observe.run_folder import read_run
from phi3v_dist.secrets import redacted

NAME = "Phi-3-Vision"
COLUMNS = 3  # of panels beside each other
COMPARE = "Compare runs"
COMPARED = ("train.learning_rate.text", "train.rows_per_step", "data.row_length_tokens")  # settings, against results
RESULTS = ("train/loss", "perf/tokens_per_s_per_gpu", "goodput/productive_pct")
AGAINST = (("perf/tokens_per_s_per_gpu", "train/loss"), ("train/tokens", "train/loss"))
FORMS: dict[str, Any] = {"area": "stacked-area", "share": "pct-area"}


def require_package() -> None:
    """Raises ConfigError where wandb-workspaces is not installed."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError(
            "making a W&B dashboard needs the package wandb-workspaces, which is not installed: `python -m pip install "
            "'wandb-workspaces==0.4.13'` (the extra `dashboard` of setup.cfg)"
        )


def spec() -> dict[str, Any]:
    """The workspace as W&B stores it, without the parts that are drawn at random."""
    view = json.loads(workspace("", "")._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    without: dict[str, Any] = without_ids(view)
    return without


def workspace(entity: str, project: str) -> Any:
    """The workspace: seven sections of the layout and one that compares runs."""
    import wandb_workspaces.workspaces as ws

    axis = ws.SectionPanelSettings(x_axis=STEP)
    sections = [
        ws.Section(
            name=title, panels=panels, is_open=place == 0, panel_settings=axis,
            layout_settings=ws.SectionLayoutSettings(columns=COLUMNS, rows=-(-len(panels) // COLUMNS)),
        )
        for place, (title, panels) in enumerate(_sections())
    ]  # fmt: skip
    return ws.Workspace(
        entity=entity, project=project, name=NAME, sections=sections, auto_generate_panels=False,
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=20),
    )  # fmt: skip


def place_of(run_folder: Path) -> tuple[str | None, str]:
    """Entity and project of a run, by its config.yaml. Raises ConfigError when there is none."""
    observe = read_run(run_folder).config.get("observe")
    if not isinstance(observe, dict) or not observe.get("wandb_project"):
        raise ConfigError(f"{run_folder / 'config.yaml'} does not say `observe.wandb_project`: use --project")
    return observe.get("wandb_entity"), str(observe["wandb_project"])


def own_entity() -> str:
    """Whom the key belongs to. Raises LaunchError when the server does not say."""
    import wandb

    entity = _asking("whose key this is", lambda: wandb.Api().default_entity)
    if not entity:
        raise LaunchError("the W&B server does not say whose key this is: use --entity")
    return str(entity)


def _asking(what: str, ask: Callable[[], Any]) -> Any:
    """Whatever a server or its client makes of it becomes one line."""
    try:
        return ask()
    except Exception as error:
        raise LaunchError(
            f"asking the W&B server for {what}: {redacted(str(error)) or type(error).__name__}"
        ) from error


def push(entity: str, project: str) -> str:
    """Save the workspace as a new view of the project; its address."""
    saved = _asking("a new view", workspace(entity, project).save)
    return str(saved.url)


def share(entity: str, project: str) -> str:
    """Save a report with all panels over all runs of the project; its address."""
    built = report(entity)
    built.project = project
    for block in built.blocks:
        for runset in getattr(block, "runsets", ()):
            runset.entity, runset.project = entity, project
    _asking("a new report", built.save)
    return str(built.url)


def report(entity: str) -> Any:
    """The same panels as a W&B report, a heading and a sentence over each section; made without a network.

    Its runs are those of no project yet: naming one would look it up.
    """
    import wandb_workspaces.reports.v2 as wr

    intros = {section.title: section.intro for section in SECTIONS}
    blocks: list[Any] = []
    for title, panels in _sections():
        blocks += [wr.H2(title), wr.P(intros.get(title, "What is different between the runs, and what came of it?"))]
        blocks.append(wr.PanelGrid(runsets=[wr.Runset(name="Runs")], panels=_laid_out(panels)))
    return wr.Report(project="", entity=entity, title=NAME, description="Made by phi3v-dashboard", blocks=blocks)


def _laid_out(panels: list[Any]) -> list[Any]:
    """Panels in rows of `COLUMNS`; a report has 24 units of width, a workspace lays out by itself."""
    import wandb_workspaces.reports.v2 as wr

    width, height = 24 // COLUMNS, 6
    for place, panel in enumerate(panels):
        panel.layout = wr.Layout(x=place % COLUMNS * width, y=place // COLUMNS * height, w=width, h=height)
    return panels


def _sections() -> Iterator[tuple[str, list[Any]]]:
    for section in SECTIONS:
        yield section.title, [*_tiles(section), *(_panel(panel) for panel in section.panels)]
    yield COMPARE, _comparison()


def _tiles(section: Section) -> Iterator[Any]:
    import wandb_workspaces.reports.v2 as wr

    for panel in section.panels:
        if panel.tile:
            yield wr.ScalarChart(title=panel.title, metric=panel.tile, groupby_aggfunc="mean")


def _panel(panel: Panel) -> Any:
    """One chart of the layout: the metrics that name it in the registry, patterns by a regular expression."""
    import wandb_workspaces.reports.v2 as wr

    metrics = metrics_of(panel)
    if panel.kind == "media":
        return wr.MediaBrowser(title=panel.title, media_keys=[metric.name for metric in metrics], num_columns=4)
    exact: list[Any] = [metric.name for metric in metrics if not PLACEHOLDER.search(metric.name)]
    patterns = [metric for metric in metrics if PLACEHOLDER.search(metric.name)]
    return wr.LinePlot(
        title=panel.title, x=STEP, y=exact if not patterns else [], title_y=_unit(metrics), log_y=panel.log_y or None,
        metric_regex=regex(metrics) if patterns else None, plot_type=FORMS.get(panel.kind, "line"),
        max_runs_to_show=20,
    )  # fmt: skip


def regex(metrics: list[Metric]) -> str:
    """What matches the names of these metrics, in the syntax that JavaScript, Go and Python share."""
    names = (PLACEHOLDER.sub("[a-z0-9_]+", metric.name) for metric in metrics)
    return f"^({'|'.join(names)})$"


def _unit(metrics: list[Metric]) -> str | None:
    units = dict.fromkeys(metric.unit for metric in metrics)
    return next(iter(units)) if len(units) == 1 and "field" not in units else None


def _comparison() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    axes = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name)) for name in COMPARED]
    axes += [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name)) for name in RESULTS]
    clouds = [wr.ScatterPlot(title=f"{y} over {x}", x=wr.SummaryMetric(x), y=wr.SummaryMetric(y)) for x, y in AGAINST]
    return [
        wr.RunComparer(diff_only="split"),
        wr.ParallelCoordinatesPlot(title="Settings and results", columns=axes), *clouds,
    ]  # fmt: skip


def without_ids(part: Any) -> Any:
    """A view without what is drawn at random each time it is made."""
    if isinstance(part, dict):
        return {name: without_ids(value) for name, value in part.items() if name not in ("__id__", "id")}
    return [without_ids(value) for value in part] if isinstance(part, list) else part
