"""Checkpoint → a folder in the official layout, read back and compared before it gets its name.

python launch/export.py runs/quickstart                      the newest checkpoint → runs/quickstart/export
python launch/export.py runs/quickstart --out my-model --step 300
"""

import argparse
from pathlib import Path

import yaml

from phi3v_dist.cli import run_script
from phi3v_dist.errors import CheckpointError
from phi3v_dist.model.export import export
from phi3v_dist.survive.checkpoint import Checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    parser.add_argument("--step", type=int, help="default: the newest checkpoint that verifies")
    arguments = parser.parse_args()
    config = arguments.run / "config.yaml"
    if not config.is_file():
        raise CheckpointError(f"{arguments.run}: no config.yaml, so this is no run folder")
    base = Path(yaml.safe_load(config.read_text())["model"]["path"])
    folder = arguments.run / "checkpoints"
    checkpoint = (
        Checkpoints(folder, keep=1).newest() if arguments.step is None else folder / f"step-{arguments.step:08d}"
    )
    if checkpoint is None or not checkpoint.is_dir():
        raise CheckpointError(f"{folder}: no checkpoint{'' if checkpoint is None else ' ' + checkpoint.name}")
    out = arguments.out or arguments.run / "export"
    export(checkpoint, base, out)


def cli() -> None:
    """Entry point of the installed command."""
    run_script(main)


if __name__ == "__main__":
    cli()
