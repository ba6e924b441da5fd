"""A few bytes per rank in this node's shared memory: where it is, and how it ended.

What comes in: the state of a rank's lanes. What goes out: the same, read by another process. Surprise: there is no
lock between the two. Each part carries a number that is odd while it is being written, so a reader knows a torn read
and reads again; a rank that is killed in the middle of a write must not block whoever looks for its body.
"""

import fcntl
import hashlib
import mmap
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from phi3v_dist.watch.processes import is_alive, mapped_files, namespace, start_ticks

MAGIC = b"P3VBEAT2"
WHAT_BYTES, MESSAGE_BYTES, HOST_BYTES, DEVICE_BYTES, PHASE_BYTES = 200, 2048, 64, 64, 16
# Magic, pid, its start in kernel ticks, its pid namespace, rank, host, UUID of its GPU.
HEAD = struct.Struct(f"<8sIQQI{HOST_BYTES}s{DEVICE_BYTES}s")
END = struct.Struct(f"<Q{PHASE_BYTES}sid{MESSAGE_BYTES}s")  # number, outcome, exit code, monotonic time, message
LANE = struct.Struct(f"<Q{PHASE_BYTES}sqqQQdQd{WHAT_BYTES}s{PHASE_BYTES}sqQd")  # number, then the fields of `Lane`
PULSE = struct.Struct("<QQd")  # number, then the fields of `Pulse`
LANES = ("train", "save")
END_AT = HEAD.size
LANE_AT = {name: END_AT + END.size + i * LANE.size for i, name in enumerate(LANES)}
PULSE_AT = END_AT + END.size + len(LANES) * LANE.size
PARTS_AT = {"end": END_AT, **LANE_AT, "pulse": PULSE_AT}
SIZE_BYTES = PULSE_AT + PULSE.size
NO_STEP = -1
TRIES = 50  # a torn read is over in microseconds, unless the writer was stopped or killed in it
DEEPSPEED_BUFFERS = "deepspeed_allreduce_buffer_*"  # of its CPU all-reduce, named by user, address and port
HELD_NAME = "watcher.lock"
FOLDER = re.compile(r"phi3v-(\d+)-.+")


@dataclass
class Lane:
    """One line of work of a rank.

    step: as it was given; base_step: the optimizer step that it belongs to, and entries: phases entered within it, by
        which ranks are compared.
    beats: signs of life so far; since_s: monotonic time of the last one.
    thread: `threading.get_ident` of who entered; bound_s: longer silence is a hang.
    kind, work: of what it does until the next sign of life, see `heartbeat.enter`.
    native_thread: the kernel's number of `thread`; slow_bound_s: as bound_s, of a rank that makes progress.
    """

    phase: str = ""
    step: int | None = None
    base_step: int | None = None
    entries: int = 0
    beats: int = 0
    since_s: float = 0.0
    thread: int = 0
    bound_s: float = float("inf")
    what: str = ""
    kind: str = ""
    work: int = 0
    native_thread: int = 0
    slow_bound_s: float = float("inf")

    @property
    def position(self) -> tuple[int, int]:
        """Greater is further."""
        return NO_STEP if self.base_step is None else self.base_step, self.entries


@dataclass
class Pulse:
    """Waits for other ranks that have ended, and since when the accelerator is in one (monotonic time, 0: in none)."""

    num_waits: int = 0
    waits_since_s: float = 0.0


@dataclass(frozen=True)
class Beats:
    """What a rank's file says. outcome: empty while it has not said how it ended; ended_s: monotonic."""

    pid: int
    started: int
    namespace: int
    rank: int
    host: str
    outcome: str
    exit_code: int
    ended_s: float
    message: str
    lanes: dict[str, Lane]
    pulse: Pulse = field(default_factory=Pulse)
    device: str = ""


class BeatFile:
    """The writing side, mapped into memory. One thread at a time for each lane."""

    def __init__(self, memory: mmap.mmap):
        self._memory = memory
        self._numbers = dict.fromkeys(PARTS_AT, 0)

    @classmethod
    def create(cls, folder: Path, rank: int, host: str, device: str = "") -> "BeatFile":
        """For this process. Raises OSError."""
        partial = beats_path(folder, rank).with_suffix(".new")
        content = bytearray(SIZE_BYTES)
        pid = os.getpid()
        HEAD.pack_into(
            content, 0, MAGIC, pid, start_ticks(pid) or 0, namespace(), rank, _cut(host, HOST_BYTES),
            _cut(device, DEVICE_BYTES),
        )  # fmt: skip
        partial.write_bytes(content)
        with partial.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), SIZE_BYTES)
        partial.rename(beats_path(folder, rank))
        return cls(memory)

    def write(self, name: str, lane: Lane) -> None:
        at = LANE_AT[name]
        number = self._begin(name, at)
        LANE.pack_into(
            self._memory, at, number, lane.phase.encode(), NO_STEP if lane.step is None else lane.step,
            NO_STEP if lane.base_step is None else lane.base_step, lane.entries, lane.beats, lane.since_s, lane.thread,
            lane.bound_s, _cut(lane.what, WHAT_BYTES), lane.kind.encode(), lane.work, lane.native_thread,
            lane.slow_bound_s,
        )  # fmt: skip
        self._finish(name, at)

    def write_pulse(self, pulse: Pulse) -> None:
        number = self._begin("pulse", PULSE_AT)
        PULSE.pack_into(self._memory, PULSE_AT, number, pulse.num_waits, pulse.waits_since_s)
        self._finish("pulse", PULSE_AT)

    def close(self, outcome: str, message: str, exit_code: int) -> None:
        number = self._begin("end", END_AT)
        END.pack_into(
            self._memory, END_AT, number, outcome.encode(), exit_code, time.monotonic(), _cut(message, MESSAGE_BYTES)
        )
        self._finish("end", END_AT)

    def _begin(self, name: str, at: int) -> int:
        self._numbers[name] += 1
        struct.pack_into("<Q", self._memory, at, self._numbers[name])
        return self._numbers[name]

    def _finish(self, name: str, at: int) -> None:
        self._numbers[name] += 1
        struct.pack_into("<Q", self._memory, at, self._numbers[name])


def read_beats(path: Path) -> Beats | None:
    """What a rank's file says; None when it is none of ours."""
    content = b""
    for _ in range(TRIES):
        content = path.read_bytes()
        again = path.read_bytes()
        if len(content) != SIZE_BYTES or content[: len(MAGIC)] != MAGIC:
            return None
        numbers = [struct.unpack_from("<Q", content, at)[0] for at in PARTS_AT.values()]
        if not any(number % 2 for number in numbers) and all(
            struct.unpack_from("<Q", again, at)[0] == number
            for at, number in zip(PARTS_AT.values(), numbers, strict=True)
        ):
            break
        time.sleep(0.0005)
    _, pid, started, pid_namespace, rank, host, device = HEAD.unpack_from(content, 0)
    _, outcome, exit_code, ended_s, message = END.unpack_from(content, END_AT)
    lanes = {}
    for name, at in LANE_AT.items():
        _, phase, step, base_step, entries, beats, since_s, thread, bound_s, what, kind, work, native_thread, slow_s = (
            LANE.unpack_from(content, at)
        )
        lanes[name] = Lane(
            _text(phase), None if step == NO_STEP else step, None if base_step == NO_STEP else base_step, entries,
            beats, since_s, thread, bound_s, _text(what), _text(kind), work, native_thread, slow_s,
        )  # fmt: skip
    _, num_waits, waits_since_s = PULSE.unpack_from(content, PULSE_AT)
    return Beats(
        pid, started, pid_namespace, rank, _text(host), _text(outcome), exit_code, ended_s, _text(message), lanes,
        Pulse(num_waits, waits_since_s), _text(device),
    )  # fmt: skip


def beats_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.beats"


def stacks_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.stacks"


def shared_memory() -> Path:
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def folder_of(attempt_folder: Path, host: str) -> Path:
    """The folder of one attempt (`RUN/attempts/NNNN`) on this node, made if need be, for this user's eyes only."""
    path = _place_of(attempt_folder, host)
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o077:
        raise PermissionError(f"{path} belongs to somebody else, or others may read it: remove it")
    return path


def is_watched(attempt_folder: Path, host: str) -> bool:
    """Whether the watcher of this attempt still works here; it removes the folder once it has written its report."""
    return _place_of(attempt_folder, host).is_dir()


def _place_of(attempt_folder: Path, host: str) -> Path:
    run = attempt_folder.resolve().parents[1]
    digest = hashlib.sha256(str(run).encode()).hexdigest()[:8]
    return shared_memory() / f"phi3v-{os.getuid()}-{run.name[:40]}-{digest}-{attempt_folder.name}-{host}"


def hold(folder: Path) -> IO[bytes]:
    """Keep this folder from `remove_leftovers` as long as this process, or one that inherits the file, has it open.

    Its watcher does so, since it has yet to read the last words of ranks that are gone.
    """
    file = (folder / HELD_NAME).open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _is_held(folder: Path) -> bool:
    try:
        with (folder / HELD_NAME).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def remove_leftovers(keep: Path) -> int:
    """Remove what processes of this user that are gone left in shared memory; returns how many folders and files."""
    num_removed = 0
    for folder in _own_folders():
        found = [beats for beats in map(read_beats, folder.glob("rank-*.beats")) if beats]
        if folder == keep or not found or _is_held(folder):
            continue  # one without files may be about to get its first
        if not any(beats.namespace != namespace() or is_alive(beats.pid, beats.started) for beats in found):
            shutil.rmtree(folder, ignore_errors=True)
            num_removed += 1
    buffers = [path for path in shared_memory().glob(DEEPSPEED_BUFFERS) if path.stat().st_uid == os.getuid()]
    if buffers:
        mapped = mapped_files()
        for path in buffers:
            if str(path) not in mapped:
                path.unlink(missing_ok=True)
                num_removed += 1
    return num_removed


def remove_own(folder: Path) -> None:
    """At the end of an attempt."""
    shutil.rmtree(folder, ignore_errors=True)


def _own_folders() -> Iterator[Path]:
    for path in shared_memory().iterdir():
        match = FOLDER.fullmatch(path.name)
        if match and int(match[1]) == os.getuid() and path.is_dir() and not path.is_symlink():
            yield path


def _cut(text: str, size_bytes: int) -> bytes:
    """UTF-8, at most so many bytes, never half a letter."""
    content = text.encode("utf-8", "backslashreplace")
    return content if len(content) <= size_bytes else content[:size_bytes].decode("utf-8", "ignore").encode()


def _text(content: bytes) -> str:
    return content.rstrip(b"\0").decode("utf-8", "replace")
