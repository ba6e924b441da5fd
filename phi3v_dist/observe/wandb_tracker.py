"""Rows of numbers → a W&B run: offline inside the run folder, or online where a key and a server are at hand.

Surprise: everything the client would scatter over the home folder is led into the run folder, because a table's
pictures lie in its *data* folder and an offline run that is moved without it has lost them. The x axis is always
`train/step`: W&B's own step is renumbered when an offline run is continued.
"""

import logging
import os
import secrets
import socket
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit

from phi3v_dist.observe.metrics import STEP
from phi3v_dist.observe.tracker import Prediction, Row, Tracker

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 1  # the client's 15 s lose everything of a run killed earlier (OBSERVABILITY.md §0.2)
CONNECT_TIMEOUT_S = 3
INIT_TIMEOUT_S = 8  # the default of 90 s keeps the other ranks waiting in a collective
MEDIA_ROWS = 64  # pictures per evaluation; more make the offline folder and the web page heavy

Mode = Literal["online", "offline", "disabled"]


class WandbTracker(Tracker):
    """One W&B run over all attempts: its id is kept in `RUN/wandb-id`. Put it behind `AllOf`: its client may raise."""

    def __init__(
        self, run_folder: Path, mode: Mode = "offline", project: str = "phi3v-dist", entity: str | None = None
    ):
        self.run_folder = run_folder.resolve()  # the offline file stores absolute paths
        self.mode = mode
        self.project = project
        self.entity = entity
        self._run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        if self.mode == "disabled":
            return
        wandb = self._client()
        mode: Mode = self.mode
        if mode == "online" and (obstacle := _why_not_online(wandb)):
            logger.warning("W&B: %s; logging offline, `wandb sync` uploads it later", obstacle)
            mode = "offline"
        try:
            self._run = self._init(wandb, mode, config)
        except Exception as error:  # whatever the server answered, offline needs no server
            if mode == "offline":
                raise
            logger.warning("W&B did not start online (%s); logging offline, `wandb sync` uploads it later", error)
            mode = "offline"
            self._run = self._init(wandb, mode, config)
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        logger.info("W&B: %s", self._run.url if mode == "online" else f"offline in {self._run.dir}")

    def log(self, row: Row) -> None:
        if self._run:
            self._run.log(dict(row))

    def media(self, step: int, predictions: Sequence[Prediction], folder: Path) -> None:
        if not self._run or not predictions:
            return
        shown = predictions[:MEDIA_ROWS]
        images = [_image(prediction, folder) for prediction in shown]
        self._run.log(
            {
                STEP: step,
                "eval/predictions": _table(shown, images),
                # An offline table keeps its pictures outside the run's own folder; this list keeps them inside.
                "eval/images": [image for image in images if image],
            }
        )

    def finish(self, summary: Row) -> None:
        if self._run:
            self._run.summary.update(dict(summary))
            self._run.finish()
            self._run = None

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
    try:
        socket.create_connection((target.hostname, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"{target.geturl()} cannot be reached ({error})"
    return None


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
