"""`touch RUN/PROFILE` → a few steps recorded by torch.profiler on some ranks, under `RUN/profiles/step-NNNNNN/`.

What comes in: the file, empty or with words such as `steps=3 ranks=0,5`. What goes out, of each of those ranks: a trace
for https://ui.perfetto.dev, a table of operators, a flame graph and a picture of memory. Surprise: nothing in here may
end a run. What goes wrong is a warning, and files are written by a thread while training goes on.

Operators are put under the module that called them. Python's own frames are left out: torch 2.13 gives some of them
names that are no text, over which it then stumbles itself, and they make a recording three times as heavy.

All ranks hear of the wish at the same step's edge (attempt/requests.py). The recording ends before its time when an
evaluation or the end of the run comes: their operators are no step's, and there are many.
"""

import gc
import json
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

from phi3v_dist.attempt.requests import Requests
from phi3v_dist.errors import ConfigError
from phi3v_dist.observe import flame
from phi3v_dist.observe.tracker import RECORD_NAME
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.watch import heartbeat

PROFILES_NAME = "profiles"
DEFAULT_STEPS, MOST_STEPS = 3, 20  # a step of a large model is hundreds of thousands of events
ALLOWED = f"nothing, or `steps=N` (1 to {MOST_STEPS}) and `ranks=N,N,…` (0 to {{last}}), for example `steps=3 ranks=0`"
STEP_RANGE = "train_step"
ENDED_BY = ("evaluate", "finish", "export")  # phases that are no step's
TABLE_ROWS = 60
MOST_BYTES = 1000  # of the file
LOOK_BACK_BYTES = 2**18  # of the record, for the slowest rank
MEMORY_EVENTS = 100_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """What to record: so many steps, on these ranks."""

    steps: int
    ranks: tuple[int, ...]


def parse(text: str, world_size: int, slowest: int | None = None) -> Wish:
    """What a person wrote. Raises ConfigError that names what is allowed."""
    allowed = ALLOWED.format(last=world_size - 1)
    found: dict[str, str] = {}
    for word in text.split():
        key, _, value = word.partition("=")
        if key not in ("steps", "ranks") or key in found:
            why = "is there twice" if key in found else "is not known"
            raise ConfigError(f"`{word[:40]}` {why}. Allowed: {allowed}")
        found[key] = value
    steps = found.get("steps", str(DEFAULT_STEPS))
    if not steps.isdecimal() or not 1 <= int(steps[:9]) <= MOST_STEPS:
        raise ConfigError(f"`steps={steps[:40]}`: not a number from 1 to {MOST_STEPS}. Allowed: {allowed}")
    if "ranks" not in found:
        other = slowest if slowest and slowest < world_size else world_size - 1
        return Wish(int(steps), tuple(sorted({0, other})))
    ranks = found["ranks"].split(",")
    if wrong := [rank for rank in ranks if not rank.isdecimal() or int(rank[:9]) >= world_size]:
        raise ConfigError(f"`ranks={found['ranks'][:40]}`: there is no rank `{wrong[0][:20]}`. Allowed: {allowed}")
    return Wish(int(steps), tuple(sorted({int(rank) for rank in ranks})))


class Profiles:
    """Of one process; all ranks go through `around` together."""

    def __init__(self, run_folder: Path, topology: Topology, requests: Requests, num_steps: int):
        self.run_folder, self.topology, self.requests, self.num_steps = run_folder, topology, requests, num_steps
        self._first_step = self._last_step = 0  # of the recording under way, on all ranks; 0: there is none
        self._recording: _Recording | None = None  # of this rank

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around a step, which is recorded if that is wished. Collective where a wish has just been heard of."""
        if self._last_step == 0 and self.requests.profile:
            self._take(step)
        if self._last_step == 0:
            yield
            return
        recording = self._recording
        if recording:
            self._safely(lambda: recording.step_begins(step))
        try:
            yield
        finally:
            if recording:
                self._safely(recording.step_ends)
            if step >= self._last_step:
                self._end(step)

    def _take(self, step: int) -> None:
        """From here on the wish is ours, and the file is gone."""
        wish = self.topology.broadcast(self._wish() if self.topology.is_main else None)
        self.requests.profile_taken()
        if wish is None:
            return
        self._first_step, self._last_step = step, min(step + wish.steps - 1, self.num_steps)
        heartbeat.listen(self._entered)
        if self.topology.is_main:
            log.info(
                "profile  of steps %d to %d on rank%s %s: %s", self._first_step, self._last_step,
                "s" * (len(wish.ranks) > 1), ", ".join(map(str, wish.ranks)), self._folder,
            )  # fmt: skip
        if self.topology.rank in wish.ranks:
            self._safely(self._begin)

    def _wish(self) -> Wish | None:
        """Rank 0 reads the file."""
        path = self.requests.profile_path
        try:
            with path.open("rb") as file:
                text = file.read(MOST_BYTES).decode("utf-8", "replace")
            return parse(text, self.topology.world_size, slowest_rank(self.run_folder))
        except (OSError, ConfigError) as error:
            log.warning("%s asks for a profile that cannot be made: %s", path, error)
            return None

    def _begin(self) -> None:
        self._recording = _Recording(self.topology.device.type == "cuda")

    def _entered(self, phase: str, step: int | None) -> None:
        if phase in ENDED_BY:
            self._end(None)
        elif self._recording:
            recording = self._recording
            self._safely(lambda: recording.phase(phase))

    def _end(self, step: int | None) -> None:
        """step: the last one; None: the recording ended before its time."""
        recording, folder, last_step = self._recording, self._folder, self._last_step
        self._recording, self._last_step = None, 0
        heartbeat.forget(self._entered)
        if recording is None:
            return
        if step is None:
            log.warning("the profile ends before step %d is done: an evaluation or the end of the run came", last_step)
        if not self._safely(recording.stop):
            return
        prefix = f"rank-{self.topology.rank:05d}"
        title = f"steps {self._first_step} to {last_step if step else 'the end'}, rank {self.topology.rank}"

        def write() -> None:
            if self._safely(lambda: recording.write(folder, prefix, title)) and self.topology.is_main:
                log.info("profile  written to %s", folder)

        threading.Thread(target=write, name="profile").start()  # no daemon: the end of the run waits for it

    @property
    def _folder(self) -> Path:
        return self.run_folder / PROFILES_NAME / f"step-{self._first_step:06d}"

    def _safely(self, do: Callable[[], object]) -> bool:
        """A profiler depends on drivers, disks and memory, and may raise anything: the run goes on without it."""
        try:
            do()
            return True
        except Exception as error:
            log.warning("the profile of rank %d is not whole (%r); training goes on", self.topology.rank, error)
            return False


class _Recording:
    """One torch.profiler session of this process, begun at once."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # its notes of start and stop go to stderr
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profile = profile(activities=activities, profile_memory=True)
        self._ranges: list[Any] = []
        self._memory: Any = None
        self._hooks = [
            register_module_forward_pre_hook(lambda module, _: self._open(type(module).__name__)),
            register_module_forward_hook(lambda module, *_: self._close(len(self._ranges) - 1), always_call=True),
        ]
        if on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profile.start()

    def step_begins(self, step: int) -> None:
        self._open(f"{STEP_RANGE} {step}")

    def phase(self, name: str) -> None:
        """Within a step: forward, backward and so on, each until the next."""
        if self._ranges:
            self._close(but=1)
            self._open(name)

    def step_ends(self) -> None:
        self._close(but=0)

    def stop(self) -> None:
        self._close(but=0)
        for hook in self._hooks:
            hook.remove()
        if self.on_gpu:
            torch.cuda.synchronize()
            self._memory = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile.stop()

    def write(self, folder: Path, prefix: str, title: str) -> None:
        """Every file is whole or not there. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)

        def place(name: str, write: Callable[[Path], object]) -> None:
            partial = folder / f".partial-{prefix}.{name}"
            try:
                write(partial)
                partial.replace(folder / f"{prefix}.{name}")
            finally:
                partial.unlink(missing_ok=True)

        table = self._profile.key_averages().table
        time_of, memory_of = ("self_device_time_total", "device") if self.on_gpu else ("self_cpu_time_total", "cpu")
        place("trace.json.gz", lambda path: self._profile.export_chrome_trace(str(path)))
        place("ops.txt", lambda path: path.write_text(table(sort_by=time_of, row_limit=TABLE_ROWS)))
        place("flame.svg", lambda path: path.write_text(flame.draw(flame.fold(self._calls(), STEP_RANGE), title)))
        if self._memory is not None:
            place("memory.pickle", lambda path: path.write_bytes(pickle.dumps(self._memory)))
        else:
            by_memory = table(sort_by=f"self_{memory_of}_memory_usage", row_limit=TABLE_ROWS)
            place("memory.txt", lambda path: path.write_text(by_memory))
        self._profile = None  # type: ignore[assignment]
        gc.collect()  # events refer to each other

    def _calls(self) -> Iterator[flame.Call]:
        """What the processor did; of the GPU, its kernels, one nest each stream."""
        results = self._profile.profiler and self._profile.profiler.kineto_results
        for event in results.events() if results else ():
            if event.duration_ns() <= 0 or event.is_hidden_event():
                continue
            on_cpu = event.device_type() == torch.autograd.DeviceType.CPU
            where = f"thread {event.start_thread_id()}" if on_cpu else f"GPU stream {event.device_resource_id()}"
            if on_cpu or not event.is_user_annotation():
                yield flame.Call(where, event.name(), event.start_ns(), event.duration_ns())

    def _open(self, name: str) -> None:
        """The steps and phases above, or a module; only within a step."""
        if not self._ranges and not name.startswith(STEP_RANGE):
            return
        opened = record_function(name)
        opened.__enter__()
        self._ranges.append(opened)

    def _close(self, but: int) -> None:
        while len(self._ranges) > max(0, but):
            self._ranges.pop().__exit__(None, None, None)


def slowest_rank(run_folder: Path) -> int | None:
    """As the last rows of the record say; None where they do not."""
    path = run_folder / RECORD_NAME
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOOK_BACK_BYTES))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        try:
            return int(json.loads(line)["health/slowest_rank"])
        except (ValueError, KeyError, TypeError):
            continue
    return None
