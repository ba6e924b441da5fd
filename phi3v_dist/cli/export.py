"""Checkpoint → a folder in the official layout, read back and compared before it gets its name.

python launch/export.py runs/quickstart                      the newest checkpoint → runs/quickstart/export
python launch/export.py runs/quickstart --out my-model --step 300
python launch/export.py runs/quickstart --best               the best by `checkpoint.best` of that run
python launch/export.py runs/adapted                         a LoRA run: peft's adapter folder
python launch/export.py runs/adapted --merge                 a LoRA run: the whole model, adapters added in
"""

import argparse
from pathlib import Path

from phi3v_dist import config
from phi3v_dist.cli.app import run_script
from phi3v_dist.config import Settings
from phi3v_dist.errors import CheckpointError, ConfigError
from phi3v_dist.model.export import export
from phi3v_dist.model.sources import TrainedWeights, initial_weights
from phi3v_dist.survive.best_file import BEST_NAME, best_checkpoint, read_best
from phi3v_dist.survive.checkpoint import Checkpoints, read_tensors
from phi3v_dist.survive.rank_files import TensorReader


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="default: the newest checkpoint that verifies")
    which.add_argument("--best", action="store_true", help="the checkpoint that checkpoints/best.json names")
    parser.add_argument("--merge", action="store_true", help="add LoRA adapters to the weights")
    parser.add_argument("--base", type=Path, help="model folder the run began with, if it moved")
    arguments = parser.parse_args()
    run = arguments.run.resolve()
    settings = settings_of(run, arguments.base)
    folder = run / "checkpoints"
    checkpoint: Path | None
    if arguments.best:
        checkpoint = best_of(folder)
    elif arguments.step is None:
        checkpoint = Checkpoints(folder, keep=1).newest()  # every byte of it was read
    else:
        checkpoint = folder / f"step-{arguments.step:08d}"
    if checkpoint is None or not checkpoint.is_dir():
        raise CheckpointError(f"{folder}: no checkpoint{'' if checkpoint is None else ' ' + checkpoint.name}")
    is_verified = arguments.step is None and not arguments.best
    reader = TensorReader(checkpoint) if is_verified else read_tensors(checkpoint)
    start = initial_weights(settings.model.path, settings.model.init_from, settings.run.seed, arguments.base)
    export(
        TrainedWeights(reader, start, settings.train.lora), settings, arguments.out or run / "export", arguments.merge
    )


def best_of(checkpoints: Path) -> Path:
    """The checkpoint that best.json names. Raises CheckpointError where there is none."""
    found = best_checkpoint(checkpoints)
    if found is None:
        raise CheckpointError(
            f"{checkpoints}: {BEST_NAME} names no checkpoint that is there. A run keeps one when `checkpoint.best` "
            "is set to a metric, such as eval/loss; leave out --best for the newest"
        )
    print(f"{found}: {read_best(checkpoints)}")
    return found


def settings_of(run: Path, base: Path | None) -> Settings:
    """The settings a run folder records, its model folder replaced by `base` where that is given."""
    try:
        settings = config.of_run(run)
    except ConfigError as error:
        raise CheckpointError(error.problems) from error
    moved = {"model": settings.model.model_copy(update={"path": base})} if base else {}
    return settings.model_copy(update=moved)


def main() -> None:
    """Entry point of the installed command."""
    run_script(run_command)


if __name__ == "__main__":
    main()
