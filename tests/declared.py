"""Writes the dependencies of setup.cfg as requirements files, which deptry reads (`make lint`).

    python tests/declared.py FOLDER        runtime.txt: with all extras but dev; dev.txt

Note: deptry reads requirements files and pyproject.toml, not setup.cfg.
"""

import configparser
import sys
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DEV = "dev"


def read_setup() -> Mapping[str, list[str]]:
    """Extra → its requirements; those of no extra under the empty name."""
    file = configparser.ConfigParser()
    file.read(REPOSITORY / "setup.cfg")
    texts = {"": file["options"]["install_requires"], **file["options.extras_require"]}
    return {extra: [line for line in text.splitlines() if line] for extra, text in texts.items()}


def main(folder: Path) -> None:
    lists = read_setup()
    runtime = [line for extra, lines in lists.items() if extra != DEV for line in lines]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runtime.txt").write_text("\n".join(runtime) + "\n")
    (folder / "dev.txt").write_text("\n".join(line for line in lists[DEV] if line not in runtime) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
