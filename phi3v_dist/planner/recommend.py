"""A cluster → the settings with which a row fits and a step takes least time, and the config that says so.

What comes in: settings as they are, a cluster and a row. What goes out: the first `Plan` that fits, of
candidates in the order of their time, and the keys to change. Surprise: time costs nothing to compute and memory a few
seconds, so the candidates are sorted first; and those that differ by DeepSpeed's file alone share one trace.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from phi3v_dist import resources
from phi3v_dist.config import Settings
from phi3v_dist.config_file import merge
from phi3v_dist.errors import ConfigError
from phi3v_dist.invocation import as_typed
from phi3v_dist.model import build as model_build
from phi3v_dist.model.official_config import read_config
from phi3v_dist.parallel import zero
from phi3v_dist.planner.cost import HOST_COPY_BANDWIDTH, Cluster, cost
from phi3v_dist.planner.plan import Changes, Plan, changed, make_plan, sharing, smaller_files, trained_parameters
from phi3v_dist.planner.row import RowShape
from phi3v_dist.planner.zero_share import is_offloaded
from phi3v_dist.progress import track
from phi3v_dist.survive.durable import write_durably

RECOMPUTED = 1.28  # hardware work with checkpointing, of that without (PLANNER.md §5)
WEIGHT_PASSES = 3  # forward, forward again in the backward pass, backward
CPU_ADAM_BANDWIDTH = 20e9  # bytes a second of optimizer state that one rank's share of the cores works through


def recommend(
    settings: Settings, cluster: Cluster, row: RowShape, row_is: str, efficiency: float, epoch_rows: int | None
) -> tuple[Plan, Changes]:
    """The fastest that fits, and what it changes.

    Raises:
        ConfigError: the row is longer than the model's context, or nothing fits.
    """
    config = read_config(settings.model.path)
    if wrong := model_build.size_problems(changed(settings, {"parallel.sequence": 1})):
        raise ConfigError(wrong)
    trained = trained_parameters(config, settings)
    candidates = sorted(
        _candidates(settings, config, cluster), key=lambda c: _slowness(settings, c, config, cluster, row, trained)
    )
    least: Plan | None = None
    for changes in track(candidates, "tracing", "candidates"):
        tried = make_plan(changed(settings, changes), cluster, row, row_is, efficiency, epoch_rows, advise=False)
        if tried.fits:
            return tried, {key: value for key, value in changes.items() if value != _value(settings, key)}
        least = tried if least is None or tried.memory.total < least.memory.total else least
    assert least is not None
    need, have = (size / 2**30 for size in (least.memory.total, cluster.gpu.usable_bytes))
    raise ConfigError(
        f"nothing that was tried fits: the least was {need:.1f} GiB of {have:.1f} usable on a {cluster.gpu.name}; take "
        "more nodes, or a shorter data.row_length_tokens"
    )


def write_config(path: Path, config: Path, overrides: Sequence[str], changes: Changes) -> None:
    """The YAML file `config` with the words of the command line and these changes in it, as another file."""
    tree, _ = merge(resources.find(config, "configs"), overrides)  # they were found right when the settings were loaded
    for key, value in changes.items():
        section, _, name = key.partition(".")
        part = tree.setdefault(section, {})
        part[name] = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(tree, sort_keys=False)
    write_durably(path, f"# {config}, as {as_typed('launch/check.py')} --recommend changed it\n{text}")


def _candidates(settings: Settings, config: dict[str, Any], cluster: Cluster) -> Iterator[Changes]:
    files = [settings.parallel.deepspeed, *smaller_files(settings.parallel.deepspeed)]
    for sequence, recompute, away, file in itertools.product(
        sharing(config, cluster), (False, True), (False, True), files
    ):
        if away and not recompute:
            continue
        chosen: Changes = {
            "parallel.sequence": sequence, "model.gradient_checkpointing": recompute,
            "model.offload_activations": away, "parallel.deepspeed": file,
        }  # fmt: skip
        if recompute:
            chosen |= {"model.mlp_chunk_tokens": settings.model.mlp_chunk_tokens or 4096}
        yield chosen


def _slowness(
    settings: Settings, changes: Changes, config: dict[str, Any], cluster: Cluster, row: RowShape, trained: int
) -> tuple[float, int, int]:
    """Seconds of a step, of this candidate, roughly; then the number of ranks that share a row, and how much smaller
    DeepSpeed's share is made."""
    chosen = changed(settings, changes)
    found = cost(chosen, config, cluster, row, itemsize=2, trained=trained, gathered_elements=2 * trained)
    seconds = found.step_s * (RECOMPUTED if chosen.model.gradient_checkpointing else 1.0)
    sequence = chosen.parallel.sequence
    if chosen.model.offload_activations:  # there and back, half of it beside the computing
        kept = 2 * config["hidden_size"] * config["num_hidden_layers"] * row.tokens / sequence
        seconds += found.micro_steps * kept / HOST_COPY_BANDWIDTH
    files = [settings.parallel.deepspeed, *smaller_files(settings.parallel.deepspeed)]
    zero_config = zero.read(chosen.parallel.deepspeed)["zero_optimization"]
    if is_offloaded(zero_config, "offload_optimizer"):
        seconds += 16 * trained / cluster.ranks / CPU_ADAM_BANDWIDTH
    if is_offloaded(zero_config, "offload_param"):  # each pass needs all of them, of which every rank brings its share
        seconds += found.micro_steps * WEIGHT_PASSES * 2 * trained / cluster.ranks / HOST_COPY_BANDWIDTH
    return seconds, sequence, files.index(chosen.parallel.deepspeed)


def _value(settings: Settings, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(settings, section), name)
