"""Finds the recipes, DeepSpeed files and Slurm scripts that ship with the package.

Note: an installation holds copies beside this module (setup.py puts them there). In the repository they are read where
people edit them, in `launch/configs`, `ds_configs` and `slurm`.
"""

import difflib
from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).parents[1]
REPOSITORY = PACKAGE.parent  # if this is one; of an installation it is site-packages
FOLDERS = {"configs": "launch/configs", "ds_configs": "ds_configs", "slurm": "slurm"}  # kind → in the repository
Kind = Literal["configs", "ds_configs", "slurm"]


def folder(kind: Kind) -> Path:
    """The folder that holds the shipped files of this kind."""
    installed = Path(__file__).parent / kind
    return installed if installed.is_dir() else REPOSITORY / FOLDERS[kind]


def find(path: Path, kind: Kind) -> Path:
    """Return `path` if it exists, else the shipped file that it names, else `path`.

    A relative path names a shipped file by its place in the repository, in what `phi3v-init` copies, or in the folder:
    `launch/configs/quickstart.yaml`, `configs/quickstart.yaml` and `quickstart.yaml` are the same recipe.
    """
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    for prefix in (FOLDERS[kind], kind, "."):
        if path.is_relative_to(prefix):
            shipped = folder(kind) / path.relative_to(prefix)
            return shipped if shipped.is_file() else path
    return path


def suggestion(path: Path, kind: Kind) -> str:
    """`; did you mean X?` for a path that does not exist, or nothing."""
    beside = {p.name: p for p in path.parent.glob(f"*{path.suffix}")}
    shipped = {p.name: path.with_name(p.name) for p in folder(kind).glob(f"*{path.suffix}")}
    known = beside or {name: place for name, place in shipped.items() if find(place, kind).is_file()}
    near = difflib.get_close_matches(path.name, known, n=1)
    return f"; did you mean {known[near[0]]}?" if near else ""
