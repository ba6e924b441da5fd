"""A saved model → scores and predictions on validation data, in one process.

What comes in: a `SavedModel` and settings. What goes out: metrics, and the records that a run writes too. Surprise: of
the settings only `data.validation`, `eval` and how samples are read is used; tokenizer, crops and LongRoPE's rule are
the model's own, so neither training shards nor the folder that the run began with need be there for an export.
"""

from pathlib import Path

from phi3v_dist import config, run
from phi3v_dist.config import Settings
from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.evaluate.evaluator import Evaluator
from phi3v_dist.evaluate.records import PREDICTIONS_NAME
from phi3v_dist.invocation import as_typed
from phi3v_dist.model.saved import SavedModel
from phi3v_dist.parallel.topology import Topology


def settings_around(saved: SavedModel, overrides: list[str]) -> Settings:
    """Those of the run in which a model lies. Raises ConfigError when it lies in none."""
    if saved.run is None:
        raise ConfigError(f"{saved.weights.where} lies in no run folder, which would say what to ask: give --config")
    return config.of_run(saved.run, overrides)


def evaluate(saved: SavedModel, settings: Settings, out: Path, untuned: Path | None = None) -> dict[str, float]:
    """Ask all validation questions and write `out`.

    Args:
        untuned: records of an evaluation to compare with; default: of step 0 of the run in which the model lies.

    Raises:
        ConfigError, DataError: there is nothing to ask.
        CheckpointError: the model cannot be read.
    """
    if not settings.data.validation:
        raise ConfigError("`data.validation` names no shards, so there is nothing to evaluate on")
    if untuned and not (untuned / PREDICTIONS_NAME).is_file():
        raise ConfigError(f"--untuned {untuned}: there is no {PREDICTIONS_NAME}, so this is no evaluation's folder")
    at_first = saved.run / "eval" / "step-000000" if saved.run else None
    base = untuned or (at_first if at_first and at_first.is_dir() else None)
    of_model = {
        "model": settings.model.model_copy(update={"path": saved.files}),
        "data": settings.data.model_copy(update={"num_crops": settings.data.num_crops or saved.num_crops}),
    }
    data = run.Data.open(settings.data.validation, settings.model_copy(update=of_model))
    sample_ids = run.fixed_order(data.lengths, settings.data.row_length_tokens)
    if not sample_ids:
        raise DataError(
            f"none of the {len(data.table)} samples of `data.validation` can be used: see {as_typed('launch/check.py')}"
        )
    said = "longrope" in settings.model.model_fields_set  # else the rule that the model was trained under
    model = saved.load(settings.model.longrope if said else None, settings.model.attention)
    topology = Topology()
    evaluator = Evaluator(data.decoder, data.lengths, sample_ids, settings.eval, topology, settings.run.seed)
    metrics = evaluator.run(model.to(topology.device), out, base=base)
    assert metrics is not None  # nobody asks it to stop
    return metrics
