"""Where torch and DeepSpeed keep extensions that they compile, and locks there that nobody holds any more.

    python -m phi3v_dist.attempt.build_cache async_io          compile one, in this process, in sight

What comes in: the environment. What goes out: a build folder of this environment's own, and words about leftover locks.
Surprise: torch waits for such a lock without a limit and without a word, and the lock is an empty file that says
nothing of its maker; a process killed in a build leaves it behind, and every later start on that home stands still.
"""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from phi3v_dist import versions
from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.variables import host_name

VARIABLE = "TORCH_EXTENSIONS_DIR"
LOCK_NAME = "lock"  # of torch.utils.cpp_extension, one in each extension's folder


def own_build_folder() -> None:
    """Unless the user chose one: a folder for this environment alone. Two environments would build over each other."""
    os.environ[VARIABLE] = str(build_folder())


def build_folder() -> Path:
    """The one the user chose, else this environment's own."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "phi3v_dist" / "torch_extensions" / environment_digest()


def environment_digest() -> str:
    """Of what a compiled extension depends on: interpreter, place of the packages, machine, torch and DeepSpeed."""
    facts = [sys.prefix, sys.version, platform.machine(), os.environ.get("CUDA_HOME", "")]
    for package in ("torch", "deepspeed"):
        try:
            facts.append(version(package))
        except PackageNotFoundError:
            facts.append("none")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def is_built(name: str) -> bool:
    """Whether an extension of DeepSpeed's is here, compiled whole: by `build`, or with DeepSpeed when that was
    installed."""
    folder = build_folder() / name
    if (folder / f"{name}.so").is_file() and not (folder / LOCK_NAME).exists():
        return True
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(name))


def build(name: str) -> None:
    """Compile an extension of DeepSpeed's. Takes minutes; ranks find it done.

    Raises:
        LaunchError: there is none of that name, or what it needs is not installed.
        ConfigError: another version of DeepSpeed is installed.
    """
    own_build_folder()
    problems = leftover_locks()
    if problems:
        raise LaunchError(problems)
    versions.require("deepspeed")
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    builder = ALL_OPS.get(name)
    if builder is None or not builder.is_compatible(verbose=True):
        raise LaunchError(f"DeepSpeed's `{name}` cannot be built on {host_name()}; the lines above say what it misses")
    print(
        f"building {name} in {os.environ[VARIABLE]}: some minutes; if you end it, delete */{LOCK_NAME} there",
        flush=True,
    )
    builder.load()


def leftover_locks() -> list[str]:
    """One message for each build lock that no process of this machine holds; to be asked on each node."""
    folder = os.environ.get(VARIABLE)
    locks = sorted(Path(folder).glob(f"*/{LOCK_NAME}")) if folder else []
    if not locks:
        return []
    held = set(_open_files())
    return [
        f"{lock}: a build lock, {_age(lock)} old, that no process of {host_name()} holds. Was a build killed? What "
        "needs this extension would wait for ever: delete the file, unless another machine is building there now"
        for lock in locks
        if str(lock.resolve()) not in held
    ]


def _open_files() -> Iterator[str]:
    """Paths that processes of ours have open; a builder keeps its lock open to the end."""
    for process in psutil.process_iter():
        try:
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                yield os.path.realpath(link)
        except OSError:
            continue  # gone, or another user's


def _age(path: Path) -> str:
    try:
        minutes = max(0.0, time.time() - path.stat().st_mtime) / 60
    except OSError:
        return "some time"
    return f"{minutes / 60:.0f} h" if minutes >= 90 else f"{minutes:.0f} min"


if __name__ == "__main__":
    build(*sys.argv[1:])
