"""Checkpoint → a folder in the official layout, read back and compared before it gets its name.

python launch/export.py runs/quickstart                      the newest checkpoint → runs/quickstart/export
python launch/export.py runs/quickstart --out my-model --step 300
python launch/export.py runs/adapted                         a LoRA run: peft's adapter folder
python launch/export.py runs/adapted --merge                 a LoRA run: the whole model, adapters added in
"""

import argparse
from pathlib import Path

import yaml

from phi3v_dist.cli import run_script
from phi3v_dist.config import Settings
from phi3v_dist.errors import CheckpointError
from phi3v_dist.model.export import export
from phi3v_dist.model.sources import TrainedWeights, initial_weights
from phi3v_dist.survive.checkpoint import Checkpoints, read_tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    parser.add_argument("--step", type=int, help="default: the newest checkpoint that verifies")
    parser.add_argument("--merge", action="store_true", help="add LoRA adapters to the weights")
    parser.add_argument("--base", type=Path, help="model folder the run began with, if it moved")
    arguments = parser.parse_args()
    settings = settings_of(arguments.run, arguments.base)
    folder = arguments.run / "checkpoints"
    checkpoint = (
        Checkpoints(folder, keep=1).newest() if arguments.step is None else folder / f"step-{arguments.step:08d}"
    )
    if checkpoint is None or not checkpoint.is_dir():
        raise CheckpointError(f"{folder}: no checkpoint{'' if checkpoint is None else ' ' + checkpoint.name}")
    base = initial_weights(settings.model.path, settings.model.init_from, settings.run.seed)
    weights = TrainedWeights(read_tensors(checkpoint), base, settings.train.lora)
    export(weights, settings, arguments.out or arguments.run / "export", arguments.merge)


def settings_of(run: Path, base: Path | None) -> Settings:
    """The settings a run folder records, its model folder replaced by `base` where that is given."""
    path = run / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run}: no config.yaml, so this is no run folder")
    tree = yaml.safe_load(path.read_text())
    tree.pop("environment", None)
    tree["run"] |= {"root": str(run.parent), "name": run.resolve().name}  # it may have been moved
    if base:
        tree["model"]["path"] = str(base)
    return Settings.model_validate(tree)


def cli() -> None:
    """Entry point of the installed command."""
    run_script(main)


if __name__ == "__main__":
    cli()
