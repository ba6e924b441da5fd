"""A run folder → the W&B client, led into that folder, and a run opened with it online or offline.

Surprise: everything the client would scatter over the home folder is led into the run folder, because a table's
pictures lie in its *data* folder and an offline run that is moved without it has lost them. And before anything goes
online this asks whether there is a key and a server, because the client itself prompts for a missing key and retries a
dead address for longer than a collective waits.
"""

import contextlib
import logging
import os
import queue
import secrets
import socket
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from phi3v_dist.secrets import redacted_tree

FLUSH_INTERVAL_S = 1  # the client's 15 s lose everything of a run killed earlier (OBSERVABILITY.md §0.2)
CONNECT_TIMEOUT_S = 3
INIT_TIMEOUT_S = 5  # the client's own is 90 s
ID_NAME = "wandb-id"

Mode = Literal["online", "offline", "disabled"]

log = logging.getLogger(__name__)


def client(run_folder: Path, mode: Mode) -> ModuleType:
    """The client, told before its first import where it may write."""
    for name, value in folders(run_folder).items():
        given = os.environ.get(name)
        if given and Path(given).resolve() != Path(value):
            log.info("%s=%s is not used: W&B's files of this run are in %s/wandb", name, given, run_folder)
        os.environ[name] = value
    if mode == "offline":  # online, the settings that `wandb login` stored say which server
        os.environ["WANDB_CONFIG_DIR"] = str(run_folder / "wandb" / "config")
    (run_folder / "wandb").mkdir(parents=True, exist_ok=True)
    import wandb

    return wandb


def folders(run_folder: Path) -> dict[str, str]:
    """Environment variables that lead the client's files into the run folder."""
    inside = run_folder.resolve() / "wandb"  # the offline file stores absolute paths
    return {
        "WANDB_DIR": str(inside.parent),
        "WANDB_DATA_DIR": str(inside / "data"),
        "WANDB_CACHE_DIR": str(inside / "cache"),
    }


def open_run(
    wandb: ModuleType,
    run_folder: Path,
    mode: Mode,
    project: str,
    entity: str | None,
    name: str,
    config: Mapping[str, Any],
) -> Any:
    """This folder's W&B run, begun or gone on with. Raises whatever the client raises, within about 10 s.

    config: goes into the run with every credential replaced.
    """
    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT_S,
        x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
        x_disable_meta=True,  # argv may hold secrets and would be stored as typed
        save_code=False,
        disable_git=True,
        console="off",
        silent=True,
    )
    run = wandb.init(
        dir=run_folder, mode=mode, project=project, entity=entity, name=name, id=run_id(run_folder),
        resume="allow", config=redacted_tree(dict(config)), settings=settings,
    )  # fmt: skip
    its_own = logging.getLogger("wandb")
    its_own.propagate = False  # it speaks of a lost service in tracebacks, and we in a line
    for handler in its_own.handlers:  # its debug.log: on a full disk each line would be a traceback
        handler.handleError = lambda record: None  # type: ignore[method-assign]
    return run


def run_id(run_folder: Path) -> str:
    """The run's id, written before W&B hears of it, so that a requeued job continues the same run."""
    path = run_folder / ID_NAME
    if not path.exists():
        beside = path.with_suffix(".new")
        beside.write_text(secrets.token_hex(4))
        beside.replace(path)
    return path.read_text().strip()


def why_not_online(wandb: ModuleType) -> str | None:
    """What stands between this machine and the W&B server; None when nothing does."""
    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        return "no API key (set WANDB_API_KEY or run `wandb login`)"
    server = urlsplit(wandb.setup().settings.base_url)
    direct = urllib.request.proxy_bypass(server.hostname or "")
    proxy = None if direct else urllib.request.getproxies().get(server.scheme)
    target = urlsplit(proxy) if proxy else server
    port = target.port or {"https": 443}.get(target.scheme, 80)
    why = _why_not_reached(str(target.hostname), port)
    return f"{target.scheme}://{target.hostname}:{port} cannot be reached ({why})" if why else None


def _why_not_reached(host: str, port: int) -> str | None:
    """Connect within the time limit; in a thread, since looking up a name knows no limit."""
    answers: queue.Queue[str | None] = queue.Queue()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
            answers.put(None)
        except OSError as error:
            answers.put(str(error))

    threading.Thread(target=connect, name="wandb-connect", daemon=True).start()
    try:
        return answers.get(timeout=CONNECT_TIMEOUT_S + 0.5)
    except queue.Empty:
        return f"no answer within {CONNECT_TIMEOUT_S} s"


def service() -> psutil.Process | None:
    """The client's helper process (wandb-core), which does all writing and sending."""
    ours = (child for child in psutil.Process().children() if is_alive(child) and "wandb-core" in child.name())
    return next(ours, None)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_service() -> None:
    """Kill the client's helper process, for which the client would wait without a limit; rows are on the disk. What the
    client does about it, an exit of the whole process included, is held back."""
    import wandb

    for child in psutil.Process().children():
        if "wandb" in child.name():
            child.kill()
    with contextlib.suppress(SystemExit, OSError):
        wandb.teardown()
