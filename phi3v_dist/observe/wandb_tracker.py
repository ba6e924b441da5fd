"""Rows of numbers → a W&B run: offline inside the run folder, or online where a key and a server are at hand.

Surprise: everything the client would scatter over the home folder is led into the run folder, because a table's
pictures lie in its *data* folder and an offline run that is moved without it has lost them. The x axis is always
`train/step`: W&B's own step is renumbered when an offline run is continued. And a thread of its own talks to the
client, which blocks its caller once its service hangs: training only puts rows into a queue, and never waits.
"""

import atexit
import contextlib
import logging
import os
import queue
import secrets
import socket
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from phi3v_dist.observe.metrics import STEP
from phi3v_dist.observe.tracker import Prediction, Row, Tracker

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 1  # the client's 15 s lose everything of a run killed earlier (OBSERVABILITY.md §0.2)
CONNECT_TIMEOUT_S = 3
INIT_TIMEOUT_S = 5  # the default of 90 s keeps the other ranks waiting in a collective
FINISH_TIMEOUT_S = 60.0  # the client itself would try to reach a lost server for days
EXIT_TIMEOUT_S = 15.0  # the same after a crash, when the job is to end
WAITING_ROWS = 20_000  # rows kept for a client that is behind; a few MB
MEDIA_ROWS = 64  # pictures per evaluation; more make the offline folder and the web page heavy

Mode = Literal["online", "offline", "disabled"]


class WandbTracker(Tracker):
    """One W&B run over all attempts: its id is kept in `RUN/wandb-id`. Put it behind `AllOf`: its client may raise, and
    what it raised is raised by the next call here.

    A resume goes on in the same run. What an earlier attempt logged after the checkpoint stays there, and `run/attempt`
    tells it from the same steps trained again.
    """

    def __init__(
        self, run_folder: Path, mode: Mode = "offline", project: str = "phi3v-dist", entity: str | None = None
    ):
        self.run_folder = run_folder.resolve()  # the offline file stores absolute paths
        self.mode = mode
        self.project = project
        self.entity = entity
        self._run: Any = None
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue(WAITING_ROWS)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def start(self, config: Mapping[str, Any]) -> None:
        if self.mode == "disabled":
            return
        wandb = self._client()
        mode: Mode = self.mode
        obstacle = _why_not_online(wandb) if mode == "online" else None
        if mode == "online" and not obstacle:
            try:
                self._run = self._init(wandb, mode, config)
            except Exception as error:  # whatever the server answered, offline needs no server
                obstacle = f"it did not start online ({error})"
                _end_service()  # it keeps the run's id "in use" (wandb issue 9865)
        if self._run is None:
            mode = "offline"
            self._run = self._init(wandb, mode, config)
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        if obstacle:
            logger.warning("W&B: %s; logging offline, and later this uploads it:\n%s", obstacle, self._sync_command())
        logger.info("W&B: %s", self._run.url if mode == "online" else f"offline; upload it by {self._sync_command()}")
        self._thread = threading.Thread(target=self._deliver, name="wandb", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)  # later than the client's own hook, so it runs before

    def log(self, row: Row) -> None:
        if run := self._run:
            content = dict(row)
            self._put(lambda: run.log(content))

    def media(self, step: int, predictions: Sequence[Prediction], folder: Path) -> None:
        if (run := self._run) and predictions:
            shown = list(predictions[:MEDIA_ROWS])
            self._put(lambda: _log_media(run, step, shown, folder))

    def finish(self, summary: Row) -> None:
        if self._run:
            self._close(dict(summary), FINISH_TIMEOUT_S)
            self._raise_failure()

    def _close(self, summary: Mapping[str, Any] | None, timeout_s: float) -> None:
        """End the W&B run, as a crashed one without a summary; its service is killed when that takes too long."""
        atexit.unregister(self._close_at_exit)
        run, self._run = self._run, None

        def end() -> None:
            run.summary.update(summary or {})
            run.finish(exit_code=0 if summary is not None else 1)

        assert self._thread is not None
        with contextlib.suppress(queue.Full):  # then the client has hung for long, and the thread will not end
            self._queue.put_nowait(end)
            self._queue.put_nowait(None)
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning(
                "W&B did not finish within %.0f s and is left behind; this uploads what is missing:\n%s",
                *(timeout_s, self._sync_command()),
            )
            _end_service()

    def _close_at_exit(self) -> None:
        """After a crash nobody has called `finish`; the client's own hook would wait for its service for ever."""
        self._close(None, EXIT_TIMEOUT_S)

    def _put(self, task: Callable[[], object]) -> None:
        """Hand a task to the thread. Raises what went wrong there, and queue.Full when the client is far behind."""
        self._raise_failure()
        try:
            self._queue.put_nowait(task)
        except queue.Full:
            raise queue.Full(f"the client takes no rows, {WAITING_ROWS:,} wait; later ones are left out") from None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def _deliver(self) -> None:
        """The thread: one task after another; a failed one does not keep the next from being tried."""
        while (task := self._queue.get()) is not None:
            try:
                task()
            except Exception as error:  # told to the caller of the next verb
                self._failure = error

    def _sync_command(self) -> str:
        """What uploads everything of this run that is still on the disk: one folder for each attempt, oldest first."""
        return f"wandb sync {self.run_folder}/wandb/*run-*-{_run_id(self.run_folder / 'wandb-id')}"

    def _client(self) -> ModuleType:
        """The client, told before its first import where it may write."""
        folder = self.run_folder / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["WANDB_DIR"] = str(self.run_folder)
        os.environ["WANDB_DATA_DIR"] = str(folder / "data")
        os.environ["WANDB_CACHE_DIR"] = str(folder / "cache")
        if self.mode == "offline":  # online, the settings that `wandb login` stored say which server
            os.environ["WANDB_CONFIG_DIR"] = str(folder / "config")
        import wandb

        return wandb

    def _init(self, wandb: ModuleType, mode: Mode, config: Mapping[str, Any]) -> Any:
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
            x_disable_meta=True,  # argv may hold secrets and would be stored as typed
            save_code=False,
            disable_git=True,
            console="off",
            silent=True,
        )
        return wandb.init(
            dir=self.run_folder,
            mode=mode,
            project=self.project,
            entity=self.entity,
            name=self.run_folder.name,
            id=_run_id(self.run_folder / "wandb-id"),
            resume="allow",
            config=dict(config),
            settings=settings,
        )


def _run_id(path: Path) -> str:
    """The run's id, written before W&B hears of it, so that a requeued job continues the same run."""
    if not path.exists():
        beside = path.with_suffix(".new")
        beside.write_text(secrets.token_hex(4))
        beside.replace(path)
    return path.read_text().strip()


def _why_not_online(wandb: ModuleType) -> str | None:
    """What stands between this machine and the W&B server; None when nothing does.

    Asked first because the client prompts for a missing key, and retries a dead address for 13 s.
    """
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


def _end_service() -> None:
    """Kill the client's helper process, for which the client would wait without a limit; rows are on the disk. What the
    client does about it, an exit of the whole process included, is held back."""
    import wandb

    for child in psutil.Process().children():
        if "wandb" in child.name():
            child.kill()
    with contextlib.suppress(SystemExit, OSError):
        wandb.teardown()


def _log_media(run: Any, step: int, shown: Sequence[Prediction], folder: Path) -> None:
    images = [_image(prediction, folder) for prediction in shown]
    run.log(
        {
            STEP: step,
            "eval/predictions": _table(shown, images),
            # An offline table keeps its pictures outside the run's own folder; this list keeps them inside.
            "eval/images": [image for image in images if image],
        }
    )


def _image(prediction: Prediction, folder: Path) -> Any:
    import wandb

    if not prediction["thumbnail"] or not (folder / prediction["thumbnail"]).exists():
        return None
    return wandb.Image(str(folder / prediction["thumbnail"]), caption=prediction["prediction"])


def _table(predictions: Sequence[Prediction], images: Sequence[Any]) -> Any:
    """One row per answer: the texts, then per field its error (numbers) or whether it is right (words)."""
    import wandb

    fields = list(dict.fromkeys(name for prediction in predictions for name in prediction["fields"]))
    table = wandb.Table(columns=["image", "prompt", "target", "prediction", "blind", "fields_ok", *fields])
    for prediction, image in zip(predictions, images, strict=True):
        scores = [prediction["fields"].get(name) for name in fields]
        verdicts = [score and (score["error"] if score["kind"] == "number" else score["correct"]) for score in scores]
        blind = prediction["blind"] and prediction["blind"]["prediction"]
        fields_ok = sum(bool(score and score["correct"]) for score in scores)
        texts = [prediction[name] for name in ("prompt", "target", "prediction")]
        table.add_data(image, *texts, blind, fields_ok, *verdicts)
    return table
