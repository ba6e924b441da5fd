"""The text file of a sweep → what each task of a job array adds to the settings.

What comes in: lines of `key=value` words, with quotes as in a shell. What goes out: overrides, and a run of its own for
each task. Surprise: no shell reads the file. `$(date)`, `$HOME` and `*` are those characters and nothing else.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from phi3v_dist import config
from phi3v_dist.errors import ConfigError

OVERRIDE = r"[A-Za-z_][\w.]*=.*"


def read_tasks(path: Path) -> list[list[str]]:
    """The words of each task, the first of them task 0. Empty lines and those that begin with `#` are no tasks.

    Raises:
        ConfigError: no file, no task in it, or a line that is not words of the form `key=value`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the sweep {path} cannot be read: {error}") from error
    tasks, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            words = shlex.split(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}: {line.strip()}")
            continue
        wrong = [word for word in words if not re.fullmatch(OVERRIDE, word) or not word.isprintable()]
        problems += [f"{path}:{number}: {word!r} is not key=value" for word in wrong]
        tasks.append(words)
    if problems or not tasks:
        raise ConfigError(problems or f"the sweep {path} has no line of key=value words, so no task")
    return tasks


def added_by(task: int, tasks: list[list[str]], file: str, given: Sequence[str]) -> list[str]:
    """What the task adds to `given`: its words, and a `run.name` that ends in the task's number unless they say one.

    Args:
        file: the YAML file of the sweep. given: overrides for all of its tasks.

    Raises:
        ConfigError: there is no such task, or the settings are wrong.
    """
    if not 0 <= task < len(tasks):
        found = f"its {len(tasks)} lines are tasks 0 to {len(tasks) - 1}"
        raise ConfigError(f"the sweep has no line for task {task}: {found} (sbatch --array=0-{len(tasks) - 1})")
    words = tasks[task]
    if any(word.startswith("run.name=") for word in words):
        return words
    return [*words, f"run.name={config.load(file, [*given, *words]).run.name}-{task}"]


def describe(tasks: list[list[str]], file: str, given: Sequence[str]) -> list[str]:
    """One line for each task: what it adds, and its run folder.

    Raises:
        ConfigError: the settings of a task are wrong, or two of them would train in one folder.
    """
    lines, problems, taken = [], [], dict[Path, int]()
    for task, words in enumerate(tasks):
        try:
            folder = config.load(file, [*given, *added_by(task, tasks, file, given)]).run.folder
        except ConfigError as error:
            problems += [f"task {task}: {problem}" for problem in error.problems]
            continue
        if (other := taken.setdefault(folder, task)) != task:
            problems.append(f"task {task}: trains in {folder}, as task {other} does")
        lines.append(f"task {task}: {shlex.join(words)} → {folder}")
    if problems:
        raise ConfigError(problems)
    return lines
