"""Copy a recipe, the DeepSpeed files that it needs and the Slurm scripts to where you are.

python launch/init.py                              quickstart, into this folder
python launch/init.py products lora --out mine     two recipes, into another one
python launch/init.py --no-slurm                   without the Slurm scripts

The copies name commands as an installation has them. Edit them freely: files in the working directory come before those
that ship with phi3v-dist. Nothing is overwritten.
"""

import argparse
import difflib
import re
import shlex
import sys
from pathlib import Path

import yaml

from phi3v_dist import resources
from phi3v_dist.cli.app import new_parser, run_script
from phi3v_dist.config import ParallelSettings
from phi3v_dist.errors import ConfigError
from phi3v_dist.invocation import as_typed, installed
from phi3v_dist.resources import Kind

SCHEMA_NAME = "settings.schema.json"
NAMED_FILES: dict[Kind, re.Pattern[str]] = {
    "configs": re.compile(r"\bconfigs/([\w./-]+\.yaml)\b"),
    "ds_configs": re.compile(r"\bds_configs/([\w.-]+\.json)\b"),
}
NOT_COPIED = {"container.sh", "phi3v.def"}  # they build an image from the repository
DEAD_LINK = re.compile(r"\[([^\]]*)\]\((?:\.\./[^)]*|phi3v\.def)\)")  # to a page that is not copied
VENV_LINE = "PHI3V_VENV=${PHI3V_VENV:-$PWD/.venv}\n"


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("init", __doc__)
    parser.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help=f"default: quickstart; there are {', '.join(recipe_names())}"
    )
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to (default: this folder)")
    parser.add_argument("--no-slurm", action="store_true", help="leave the Slurm scripts out")
    return parser


def run_command() -> None:
    arguments = build_parser().parse_args()
    recipes = [path_of(name) for name in arguments.recipes or ["quickstart"]]
    files = recipe_files(recipes)
    if not arguments.no_slurm:
        files |= slurm_files()

    written = write_new(files, arguments.out)
    for path in written:
        print(path)
    if len(written) < len(files):
        print(f"{len(files) - len(written)} files were there already, with the same content")
    first = Path("configs") / recipes[0].name
    place = "" if arguments.out.resolve() == Path.cwd() else f"cd {shlex.quote(str(arguments.out))} && "
    print(f"\nThe first lines of {arguments.out / first} name the data. Then: {place}phi3v-check --config {first}")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in resources.folder("configs").glob("*.yaml"))


def path_of(name: str) -> Path:
    """The shipped file of a recipe. Raises ConfigError when there is none of that name."""
    stem = name.removesuffix(".yaml")
    names = recipe_names()
    if stem not in names:
        near = difflib.get_close_matches(stem, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"no recipe is called {name!r}; {hint}")
    return resources.folder("configs") / f"{stem}.yaml"


def recipe_files(recipes: list[Path]) -> dict[Path, str]:
    """Path below the target folder → text: of the recipes, what they name, and the schema for editors."""
    sources = {Path("configs") / SCHEMA_NAME: resources.folder("configs") / SCHEMA_NAME}
    for recipe in recipes:
        sources[Path("configs") / recipe.name] = recipe
        text = recipe.read_text(encoding="utf-8")
        for kind, pattern in NAMED_FILES.items():
            for name in pattern.findall(text):
                sources[Path(kind) / name] = resources.folder(kind) / name

        # The DeepSpeed file that it trains with, which it names only if that is not the default
        parallel = yaml.safe_load(text).get("parallel", {})
        deepspeed = Path(parallel.get("deepspeed", ParallelSettings().deepspeed))
        sources[deepspeed] = resources.folder("ds_configs") / deepspeed.name
    return {path: installed(source.read_text(encoding="utf-8")) for path, source in sources.items()}


def slurm_files() -> dict[Path, str]:
    """Path below the target folder → text: of the scripts and their page."""
    files = {}
    for source in sorted(resources.folder("slurm").iterdir()):
        if source.name not in NOT_COPIED:
            files[Path("slurm") / source.name] = installed(source.read_text(encoding="utf-8"))
    readme, env = Path("slurm/README.md"), Path("slurm/env.sh")
    files[readme] = DEAD_LINK.sub(r"\1", files[readme])

    # Jobs use the environment in which this runs
    if (prefix := own_environment()) is not None:
        assert VENV_LINE in files[env]
        default = shlex.quote(str(prefix))
        files[env] = files[env].replace(VENV_LINE, f"PHI3V_VENV=${{PHI3V_VENV:-{default}}}\n")
    return files


def own_environment() -> Path | None:
    """The folder of the virtual or conda environment that runs this; None for a system's Python."""
    prefix = Path(sys.prefix)
    is_environment = sys.prefix != sys.base_prefix or (prefix / "conda-meta").is_dir()
    return prefix if is_environment and (prefix / "bin" / "python").exists() else None


def write_new(files: dict[Path, str], out: Path) -> list[Path]:
    """Write the files that are not there yet; returns their paths.

    Raises:
        ConfigError: a file is there with another content. Nothing is written then.
    """
    changed = [out / path for path, text in files.items() if (out / path).exists() and not holds(out / path, text)]
    if changed:
        names = ", ".join(map(str, changed))
        raise ConfigError(
            f"not overwritten, because their content differs: {names}. Move them away, choose another --out, or leave "
            f"the Slurm scripts out (--no-slurm): {as_typed('launch/init.py')} has written nothing"
        )

    written = []
    for path, text in files.items():
        target = out / path
        if target.exists():
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            target.chmod(0o755 if text.startswith("#!") else 0o644)
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
        written.append(target)
    return written


def holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def main() -> None:
    """Entry point of `phi3v-init` and `launch/init.py`."""
    run_script(run_command, private=False)  # the copies hold nothing private


if __name__ == "__main__":
    main()
