"""Settings → the sinks of a run, on rank 0: the record, and what mirrors it.

What comes in: `Settings`, the attempt. What goes out: one `Tracker`. Surprise: what warns about a run (data that does
not come fast enough) and what adds to its numbers (goodput) are sinks too, since all they need is the rows.
"""

from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.config import Settings
from phi3v_dist.observe.console import ConsoleTracker
from phi3v_dist.observe.health import StarvationWatch
from phi3v_dist.observe.tensorboard_tracker import TensorBoardTracker, why_not
from phi3v_dist.observe.tracker import AllOf, JsonlTracker, Tracker
from phi3v_dist.observe.wandb_tracker import WandbTracker
from phi3v_dist.survive.live_goodput import GoodputTracker


def problems(settings: Settings) -> list[str]:
    """What keeps a sink that was asked for from working; one message each."""
    if settings.observe.tensorboard and (lacking := why_not()):
        return [f"`observe.tensorboard` is true, but {lacking}"]
    return []


def build(settings: Settings, attempt: Attempt, num_steps: int) -> Tracker:
    """Nothing is opened before `start`."""
    observe, data, folder = settings.observe, settings.data, settings.run.folder
    mirrors: list[Tracker] = [
        ConsoleTracker(num_steps, observe.log_every_steps),
        StarvationWatch(observe.log_every_steps, data.num_workers, data.prefetch_rows),
    ]
    if observe.wandb != "disabled":
        where = observe.wandb_project, observe.wandb_entity, observe.wandb_name
        mirrors.append(WandbTracker(folder, observe.wandb, *where))
    if observe.tensorboard:
        mirrors.append(TensorBoardTracker(folder))
    every = AllOf(JsonlTracker(folder, attempt.number), mirrors)
    return GoodputTracker(every, folder, attempt, observe.log_every_steps)
