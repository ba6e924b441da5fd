"""Rows of numbers → a W&B run: offline inside the run folder, or online where a key and a server are at hand.

Surprise: a thread of its own does all talking to the client, the opening of the run included: the client blocks its
caller once its service hangs, and training only puts rows into a queue and never waits. When the service dies (memory
ran out, somebody killed it), the thread opens the same run again. The x axis is always `train/step`: W&B's own step is
renumbered when an offline run is continued.
"""

import atexit
import contextlib
import errno
import logging
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from phi3v_dist.invocation import as_typed
from phi3v_dist.observe import wandb_client
from phi3v_dist.observe.alerts import Alerts, Said
from phi3v_dist.observe.metrics import PLACEHOLDER, REGISTRY, STEP
from phi3v_dist.observe.tracker import Prediction, Row, Tracker
from phi3v_dist.observe.wandb_client import FLUSH_INTERVAL_S, Mode, is_alive
from phi3v_dist.observe.wandb_media import MEDIA_ROWS, log_media

logger = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 60.0  # the client itself would try to reach a lost server for days
EXIT_TIMEOUT_S = 15.0  # the same after a crash or at a notice, when the job is to end
WAITING_ROWS = 20_000  # rows kept for a client that is behind; a few MB
REJOINS = 3  # times that a dead service is started again in one attempt
REJOIN_WAIT_S = 1.1  # a folder is named by the second in which it was made
LEAST_FREE_BYTES = 16 << 20  # the rest of a full disk is for the record; the client itself loses rows without a word
DISK_LOOK_S = 5.0
STOPPED_CODE = 1  # W&B shows a run that said it would be preempted and then failed as preempted, not as crashed

Task = Callable[[Any], object]  # what to do with the run


class WandbTracker(Tracker):
    """One W&B run over all attempts: its id is kept in `RUN/wandb-id`. Put it behind `AllOf`: what goes wrong in the
    thread is raised by the next call here.

    A resume goes on in the same run. What an earlier attempt logged after the checkpoint stays there, and `run/attempt`
    tells it from the same steps trained again.
    """

    def __init__(
        self,
        run_folder: Path,
        mode: Mode = "offline",
        project: str = "phi3v-dist",
        entity: str | None = None,
        name: str | None = None,
    ):
        """name: of the W&B run; default: that of the run folder."""
        self.run_folder = run_folder.resolve()  # the offline file stores absolute paths
        self.mode = mode
        self.project = project
        self.entity = entity
        self.name = name or self.run_folder.name
        self._config: Mapping[str, Any] = {}
        self._alerts = Alerts(self.run_folder)
        self._is_preempted = False
        self._queue: queue.Queue[Task | None] = queue.Queue(WAITING_ROWS)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._closing, self._left_behind = threading.Event(), threading.Event()
        self._wandb: Any = None
        # What follows belongs to the thread.
        self._run: Any = None
        self._is_online = False
        self._service: psutil.Process | None = None
        self._recent: deque[tuple[float, Task]] = deque()  # delivered, and perhaps not yet on the disk
        self._rejoins = 0
        self._lost: Exception | None = None
        self._is_told = False  # that something is wrong: once is enough
        self._disk_looked_s = 0.0

    def start(self, config: Mapping[str, Any]) -> None:
        if self.mode == "disabled":
            return
        self._config = dict(config)
        self._wandb = wandb_client.client(self.run_folder, self.mode)
        self._thread = threading.Thread(target=self._deliver, name="wandb", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)  # later than the client's own hook, so it runs before

    def log(self, row: Row) -> None:
        if not self._thread:
            return
        content = dict(row)
        self._put(lambda run: run.log(content))
        for said in self._alerts.look(row) if self.mode == "online" else ():
            self._put(lambda run, said=said: self._alert(run, said))  # type: ignore[misc]

    def media(self, step: int, predictions: Sequence[Prediction], folder: Path) -> None:
        if self._thread and predictions:
            shown = list(predictions[:MEDIA_ROWS])
            self._put(lambda run: log_media(run, step, shown, folder))

    def preempted(self) -> None:
        if self._thread and not self._is_preempted:
            self._is_preempted = True
            self._put(lambda run: run.mark_preempting())

    def finish(self, summary: Row) -> None:
        if self._thread:
            stopped = self._is_preempted
            self._close(dict(summary), STOPPED_CODE if stopped else 0, EXIT_TIMEOUT_S if stopped else FINISH_TIMEOUT_S)
            self._raise_failure()

    def _close(self, summary: Mapping[str, Any], exit_code: int, timeout_s: float) -> None:
        """End the W&B run; its service is killed when that takes too long."""
        atexit.unregister(self._close_at_exit)
        thread, self._thread = self._thread, None

        def end(run: Any) -> None:
            run.summary.update(summary)
            run.finish(exit_code=exit_code)

        assert thread is not None
        self._closing.set()
        with contextlib.suppress(queue.Full):  # then the client has hung for long, and the thread will not end
            self._queue.put_nowait(end)
            self._queue.put_nowait(None)
            thread.join(timeout_s)
        if thread.is_alive():
            logger.warning(
                "W&B did not finish within %.0f s and is left behind; this uploads what is missing:\n%s",
                *(timeout_s, self._sync_command()),
            )
            self._left_behind.set()  # else the thread would take this for a service to be started again
            wandb_client.end_service()

    def _close_at_exit(self) -> None:
        """After a crash nobody has called `finish`; the client's own hook would wait for its service for ever."""
        self._close({}, 1, EXIT_TIMEOUT_S)

    def _put(self, task: Task) -> None:
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

    def _sync_command(self) -> str:
        """What uploads everything of this run that is still on the disk: one folder for each attempt, oldest first."""
        return f"{as_typed('python launch/dashboard.py')} --sync {self.run_folder}"

    # The thread.

    def _deliver(self) -> None:
        """One task after another; a failed one does not keep the next from being tried, a lost service does."""
        try:
            self._join()
        except Exception as error:  # tried again with the next row, and then told to the caller of the next verb
            self._lost = error
        while (task := self._queue.get()) is not None:
            try:
                self._require_room()
                self._do(task)
            except Exception as error:
                self._failure, self._is_told = self._failure or error, True

    def _do(self, task: Task) -> None:
        """One task, with a new service if the old one is gone; nothing any more once that was done too often."""
        if self._left_behind.is_set() or (self._run is None and self._rejoins >= REJOINS):
            return
        if self._run is not None and self._has_service():
            try:
                task(self._run)
                self._remember(task)
                return
            except Exception as error:
                if not isinstance(error, ConnectionError) and self._has_service():
                    raise  # this task's own fault
                self._lost = error
        elif self._run is not None:
            self._lost = ConnectionError("its service (wandb-core) is gone")
        self._remember(task)
        self._rejoin()

    def _has_service(self) -> bool:
        return self._service is None or is_alive(self._service)

    def _remember(self, task: Task) -> None:
        now = time.monotonic()
        self._recent.append((now, task))
        while self._recent[0][0] < now - 2 * FLUSH_INTERVAL_S:
            self._recent.popleft()

    def _rejoin(self) -> None:
        """Go on in the same run with a new service, and say again what the old one may not have written. Raises the
        last failure when that did not help."""
        while self._rejoins < REJOINS and not self._left_behind.is_set():
            self._rejoins += 1
            self._run = None
            wandb_client.end_service()
            time.sleep(REJOIN_WAIT_S)
            self._closing.wait(REJOIN_WAIT_S * (2 ** (self._rejoins - 1) - 1))
            try:
                self._join()
                for _, task in self._recent:
                    task(self._run)
            except Exception as error:
                self._lost = error
                continue
            logger.log(
                logging.INFO if self._is_told else logging.WARNING,
                "W&B: %s; started it again, in the same run (%d of at most %d times)",
                *(self._lost, self._rejoins, REJOINS),
            )  # fmt: skip
            self._is_told = True
            return
        self._run = None
        self._recent.clear()
        if self._left_behind.is_set():
            return
        raise ConnectionError(f"W&B is given up for this attempt: {self._lost}") from self._lost

    def _join(self) -> None:
        """Open the run: online if that is wanted and possible, else offline."""
        self._require_room()
        wandb, online = self._wandb, self.mode == "online"
        where = (self.project, self.entity, self.name, self._config)
        obstacle = wandb_client.why_not_online(wandb) if online else None
        run = None
        if online and not obstacle:
            try:
                run = wandb_client.open_run(wandb, self.run_folder, "online", *where)
            except Exception as error:  # whatever the server answered, offline needs no server
                obstacle = f"it did not start online ({error})"
                wandb_client.end_service()  # it keeps the run's id "in use" (wandb issue 9865)
        self._is_online = run is not None
        self._run = run or wandb_client.open_run(wandb, self.run_folder, "offline", *where)
        self._service = wandb_client.service()
        _define_metrics(self._run)
        if self._is_preempted:
            self._run.mark_preempting()
        if obstacle and self._rejoins == 0:
            logger.warning("W&B: %s; logging offline, and later this uploads it:\n%s", obstacle, self._sync_command())
        said = self._run.url if self._is_online else f"offline; upload it by {self._sync_command()}"
        logger.info("W&B: %s", said)

    def _require_room(self) -> None:
        """Raises OSError while the disk is as good as full, and begins anew once it is not."""
        if self._run is not None and time.monotonic() - self._disk_looked_s < DISK_LOOK_S:
            return
        self._disk_looked_s = time.monotonic()
        if shutil.disk_usage(self.run_folder / "wandb").free < LEAST_FREE_BYTES:
            if self._run is not None:
                self._run = None
                time.sleep(1.5 * FLUSH_INTERVAL_S)  # for what the service still has; once it meets a full disk it
                wandb_client.end_service()  # drops all that comes later, without a word
            self._lost = OSError(errno.ENOSPC, "no room for W&B's own files", str(self.run_folder / "wandb"))
            raise self._lost

    def _alert(self, run: Any, said: Said) -> None:
        if self._is_online:
            run.alert(said.title, said.text, level=said.level)


def _define_metrics(run: Any) -> None:
    """One scheme for all names, from the registry: drawn over `train/step`; what has no panel is not drawn unasked."""
    run.define_metric(STEP, hidden=True)
    for metric in REGISTRY:
        if metric.panel is None and metric.name != STEP and not PLACEHOLDER.search(metric.name):
            run.define_metric(metric.name, step_metric=STEP, hidden=True)
    run.define_metric("*", step_metric=STEP)
