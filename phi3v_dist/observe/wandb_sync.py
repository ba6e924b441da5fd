"""Run folders whose attempts logged to W&B offline → the same runs on a W&B server, and what is missing there.

What comes in: `RUN/wandb/*run-*`, one folder for each attempt and each restart of the client. What goes out: uploads,
one folder at a time in the order of their starts, and a message for everything that did not arrive. Surprise: `wandb
sync` cannot be believed. It ends with 0 whatever happened, and one damaged folder among several keeps all of them from
being sent (OBSERVABILITY.md §0.3). So each folder is looked at first, and afterwards rows are counted on both sides.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phi3v_dist.errors import ConfigError, LaunchError
from phi3v_dist.observe import wandb_client
from phi3v_dist.observe.metrics import ATTEMPT, STEP
from phi3v_dist.observe.tracker import RECORD_NAME, read_rows
from phi3v_dist.progress import track
from phi3v_dist.secrets import redacted

INSPECT_TIMEOUT_S, UPLOAD_TIMEOUT_S = 600.0, 3600.0
UPLOADED_SUFFIX = ".synced"  # `wandb sync` leaves it beside a file of which everything was sent
FOLDER = re.compile(r"(offline-)?run-(\d{8}_\d{6})-(.+)")
_STEP, _ATTEMPT = (re.compile(rf'"{name}": ?"?(\d+)') for name in (STEP, ATTEMPT))

Place = tuple[int, int]  # attempt, step


@dataclass(frozen=True)
class Look:
    """What the client's own reader finds in one folder.

    rows: number of `log` calls in it. places: those of them that are rows of the record. damage: why not everything
    could be read; empty when it could.
    """

    folder: Path
    run_id: str
    entity: str
    project: str
    rows: int
    places: Counter[Place]
    damage: str

    @property
    def is_uploaded(self) -> bool:
        return any(self.folder.glob(f"*.wandb{UPLOADED_SUFFIX}"))

    @property
    def is_offline(self) -> bool:
        return self.folder.name.startswith("offline-")


def require_server() -> None:
    """Raises ConfigError without a key, LaunchError without a server."""
    import wandb

    why = wandb_client.why_not_online(wandb)
    if why:
        raise (ConfigError if "key" in why else LaunchError)(f"W&B: {why}")


def sync(run_folder: Path, say: Callable[[str], None]) -> list[str]:
    """Upload what one run folder holds; returns a message for everything that is missing on the server afterwards.

    Raises:
        ConfigError: `run_folder` has no W&B folders.
    """
    looks = []
    problems = []
    for folder in track(folders(run_folder), "reading", "W&B folders"):
        look = inspect(folder)
        if look.damage:
            problems.append(f"{folder}: {look.damage}; {look.rows} rows of it can be read")
        if look.run_id:
            looks.append(look)
    said: list[str] = []
    rows = 0
    for look in track(looks, "uploading", "W&B folders"):
        rows += look.rows
        if look.is_uploaded or _was_sent_online(look, rows):
            say(f"{look.folder.name}: {look.rows} rows, uploaded before")
            continue
        said += _upload(run_folder, look.folder)
        say(f"{look.folder.name}: {look.rows} rows sent")
    problems += _missing_on_server(looks, said, say) if looks else []
    return problems + _missing_in_folders(run_folder, looks)


def folders(run_folder: Path) -> list[Path]:
    """One for each start of the client, the earliest first. Raises ConfigError where there is none."""
    found = [(path, FOLDER.fullmatch(path.name)) for path in (run_folder / "wandb").glob("*run-*") if path.is_dir()]
    named = sorted((name[2], path) for path, name in found if name)
    if not named:
        what = "it holds no wandb/*run-*" if run_folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{run_folder}: nothing to upload, {what}. Name a run folder whose `observe.wandb` was on")
    return [path for _, path in named]


def inspect(folder: Path) -> Look:
    """Read one folder with the client's own reader, which ends with 0 whatever it met."""
    done = _wandb(folder, INSPECT_TIMEOUT_S, "leet", "inspect", "--json", str(folder))
    lines, complaint = done.stdout.splitlines(), redacted(done.stderr.strip().removeprefix("wandb leet inspect: "))
    run = next((json.loads(line)["run"] for line in lines if '"type":"run"' in line), None)
    if not run:
        why = f"it cannot be read ({complaint or 'no run in it'}), so it is left out"
        return Look(folder, "", "", "", 0, Counter(), why)
    rows = [line for line in lines if '"type":"history"' in line]
    marks = [(_ATTEMPT.search(line), _STEP.search(line)) for line in rows]
    places = Counter((int(attempt[1]), int(step[1])) for attempt, step in marks if attempt and step)
    was_killed = "incomplete" in complaint  # the last record is torn, as after every kill
    damage = "" if was_killed or not complaint else f"it is damaged ({complaint}), and is sent as far as it can be read"
    return Look(folder, run["run_id"], run.get("entity", ""), run["project"], len(rows), places, damage)


def _upload(run_folder: Path, folder: Path) -> list[str]:
    """Send one folder; what the client called an error."""
    done = _wandb(run_folder, UPLOAD_TIMEOUT_S, "sync", "--yes", "--include-online", "--include-synced", str(folder))
    return [redacted(line) for line in done.stderr.splitlines() if "ERROR" in line]


def _wandb(run_folder: Path, timeout_s: float, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"WANDB_ERROR_REPORTING": "false"}
    if (run_folder / "wandb").is_dir():
        environment |= wandb_client.folders(run_folder)
    command = [sys.executable, "-m", "wandb", *words]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, env=environment
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"ERROR no end after {timeout_s:.0f} s")


def _was_sent_online(look: Look, rows: int) -> bool:
    """Whether a folder that was written online needs nothing: the server has all rows up to its end."""
    there = 0 if look.is_offline else _rows_on_server(look)
    return not look.is_offline and isinstance(there, int) and there >= rows


def _missing_on_server(looks: list[Look], said: list[str], say: Callable[[str], None]) -> list[str]:
    """Row counts compared; a run folder has one W&B run."""
    here, there = sum(look.rows for look in looks), _rows_on_server(looks[-1])
    name = f"{looks[-1].project}/{looks[-1].run_id}"
    if isinstance(there, str):
        return [f"{name}: the W&B server does not say how many rows it has ({there}), so {here} rows may be missing"]
    say(f"{name}: {here} rows here, {there} on the server")
    if there >= here:
        return []
    why = f" ({said[-1]})" if said else ""
    return [f"{name}: {here - there} of {here} rows did not arrive{why}; start the same command again"]


def _rows_on_server(look: Look) -> int | str:
    """How many rows the server has of this run; why that is not known when it does not say."""
    import wandb

    path = "/".join(filter(None, (look.entity, look.project, look.run_id)))
    try:
        return int(wandb.Api().run(path).historyLineCount or 0)
    except Exception as error:
        return 0 if "Could not find run" in str(error) else redacted(f"{type(error).__name__}: {error}")


def _missing_in_folders(run_folder: Path, looks: list[Look]) -> list[str]:
    """Rows of the record that W&B's own files do not hold: lost with a kill, a full disk, a damaged folder."""
    recorded = Counter((int(row[ATTEMPT]), int(row[STEP])) for row in read_rows(run_folder))
    held = sum((look.places for look in looks), Counter[Place]())
    lost = sorted((recorded - held).elements())
    if not lost:
        return []
    steps = {attempt: [step for its, step in lost if its == attempt] for attempt, _ in lost}
    where = "; ".join(f"attempt {attempt}: steps {min(of)} to {max(of)}" for attempt, of in steps.items())
    return [
        f"{run_folder}: {len(lost)} of {recorded.total()} rows of {RECORD_NAME} are in none of its W&B folders "
        f"({where}); the report has them"
    ]
