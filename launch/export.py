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
from phi3v_dist.survive.rank_files import TensorReader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    parser.add_argument("--step", type=int, help="default: the newest checkpoint that verifies")
    parser.add_argument("--merge", action="store_true", help="add LoRA adapters to the weights")
    parser.add_argument("--base", type=Path, help="model folder the run began with, if it moved")
    arguments = parser.parse_args()
    run = arguments.run.resolve()
    settings = settings_of(run, arguments.base)
    folder = run / "checkpoints"
    if arguments.step is None:
        checkpoint = Checkpoints(folder, keep=1).newest()  # every byte of it was read
    else:
        checkpoint = folder / f"step-{arguments.step:08d}"
    if checkpoint is None or not checkpoint.is_dir():
        raise CheckpointError(f"{folder}: no checkpoint{'' if checkpoint is None else ' ' + checkpoint.name}")
    reader = TensorReader(checkpoint) if arguments.step is None else read_tensors(checkpoint)
    start = initial_weights(settings.model.path, settings.model.init_from, settings.run.seed, arguments.base)
    export(
        TrainedWeights(reader, start, settings.train.lora), settings, arguments.out or run / "export", arguments.merge
    )


def settings_of(run: Path, base: Path | None) -> Settings:
    """The settings a run folder records, its model folder replaced by `base` where that is given."""
    path = run / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run}: no config.yaml, so this is no run folder")
    try:
        tree = yaml.safe_load(path.read_text())
        tree.pop("environment", None)
        tree["run"] |= {"root": str(run.parent), "name": run.name}  # it may have been moved
        if base:
            tree["model"]["path"] = str(base)
        return Settings.model_validate(tree)
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, KeyError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not the settings of a run that this release understands: {cause}") from error


def cli() -> None:
    """Entry point of the installed command."""
    run_script(main)


if __name__ == "__main__":
    cli()
