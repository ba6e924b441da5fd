"""A folder in the official layout (such as an export) → scores and predictions, in one process.

python launch/evaluate.py --config launch/configs/quickstart.yaml --model runs/quickstart/export --out /tmp/scores

Of the configuration only `data.validation`, `eval` and how samples are read is used: neither training shards nor the
base model need be there.
"""

import argparse
import logging
from pathlib import Path

from phi3v_dist import config, run
from phi3v_dist.cli import run_script
from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.evaluate.evaluator import Evaluator
from phi3v_dist.model import Phi3VForCausalLM
from phi3v_dist.model.weights import OfficialFolder
from phi3v_dist.observe.metrics import format_value
from phi3v_dist.parallel.topology import Topology


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", type=Path, help="default: RUN/export")
    parser.add_argument("--out", type=Path, help="where predictions are written; default: MODEL/../eval/export")
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    arguments = parser.parse_args()
    topology = Topology()
    settings = config.load(arguments.config, arguments.overrides)
    if not settings.data.validation:
        raise ConfigError("`data.validation` names no shards, so there is nothing to evaluate on")
    folder = arguments.model or settings.run.folder / "export"
    OfficialFolder(folder)  # refuses what is no model, such as an adapter alone, before the data is measured
    own_processor = settings.model_copy(update={"model": settings.model.model_copy(update={"path": folder})})
    data = run.Data.open(settings.data.validation, own_processor)
    sample_ids = run.fixed_order(data.lengths, settings.data.row_length_tokens)
    if not sample_ids:
        raise DataError(f"none of the {len(data.table)} samples of `data.validation` can be used: see launch/check.py")
    said = "longrope" in settings.model.model_fields_set  # else the rule that the folder was exported with
    longrope = settings.model.longrope if said else None
    model = Phi3VForCausalLM.from_pretrained(folder, longrope, settings.model.attention)
    evaluator = Evaluator(data.decoder, data.lengths, sample_ids, settings.eval, topology)
    metrics = evaluator.run(model.to(topology.device), arguments.out or folder.parent / "eval" / "export")
    for name, value in sorted(metrics.items()):
        logging.info("%-32s %s", name, format_value(name, value))


def cli() -> None:
    """Entry point of the installed command."""
    run_script(main)


if __name__ == "__main__":
    cli()
