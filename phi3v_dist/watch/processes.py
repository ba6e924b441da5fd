"""/proc → what a process is doing, as far as the kernel tells.

What comes in: a pid. What goes out: whether it lives, its state, memory, and signs that the kernel killed somebody.

Note: pids are reused, so a process is named by its pid and its start in ticks since boot, everywhere in this project.
psutil compares the same two for its own objects, but its public `create_time()` adds the boot time by the wall clock
and moves when that clock is set.
"""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a device or a file system"}


def start_ticks(pid: int) -> int | None:
    """When a process began, in the kernel's ticks since boot; None when it is gone or only a body (zombie)."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def is_alive(pid: int, started: int) -> bool:
    """Whether it is still that process."""
    return start_ticks(pid) == started


def state(pid: int) -> str:
    """One letter (proc(5)): R, S, T stopped, D in the kernel; empty when it is gone."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def waits_in(pid: int) -> str:
    """The kernel function in which it waits; empty where the kernel does not say."""
    where = _read(PROC / str(pid) / "wchan").strip()
    return "" if where == "0" else where


def threads(pid: int) -> dict[int, str]:
    """Names of its threads by the kernel's numbers; empty when it is gone."""
    tasks = PROC / str(pid) / "task"
    try:
        numbers = [int(path.name) for path in tasks.iterdir()]
    except OSError:
        return {}
    return {number: _read(tasks / str(number) / "comm").strip() for number in numbers}


def active_s(pid: int, thread: int) -> float:
    """How long a thread has run, or was ready to run and waited for a processor; 0 when it is gone.

    The second part tells a thread that gets little of a busy machine, or of a limited control group, from one that
    sleeps. A kernel without scheduler statistics tells only the first.
    """
    task = PROC / str(pid) / "task" / str(thread)
    if found := _read(task / "schedstat").split():
        return (int(found[0]) + int(found[1])) / 1e9
    fields = _fields(task / "stat")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def page_reads(pid: int, thread: int) -> int:
    """How often a thread had to wait for memory that was read from a disk (major faults)."""
    fields = _fields(PROC / str(pid) / "task" / str(thread) / "stat")
    return int(fields[9]) if fields else 0


def programs_of(pid: int, since_ticks: int) -> Iterator[int]:
    """Programs that a process has started since then, and those that they have started, such as a compiler."""
    for thread in threads(pid):
        for child in map(int, _read(PROC / str(pid) / "task" / str(thread) / "children").split()):
            if (start_ticks(child) or 0) >= since_ticks:
                yield child
                yield from programs_of(child, since_ticks)


def now_ticks() -> int:
    """The kernel's ticks since boot, as `start_ticks` counts them."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def peak_memory_bytes(pid: int) -> int:
    """The most memory it ever held (resident); 0 when it is gone."""
    match = re.search(r"^VmHWM:\s+(\d+) kB", _read(PROC / str(pid) / "status"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def machine_memory_bytes() -> int:
    """Of the whole machine; 0 where the kernel does not say. A container or a job may be given less."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", _read(PROC / "meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def out_of_memory_kills(pid: int) -> dict[str, int]:
    """How often the kernel has killed for want of memory: counters of the process's control group and of the machine.

    They are read while the process lives and again when it is gone; one that rose says why.
    """
    counters = {"machine": _count(PROC / "vmstat")}
    for line in _read(PROC / str(pid) / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            places = (CGROUPS, CGROUPS / "unified")
            counters |= {str(place / path[1:]): _count(place / path[1:] / "memory.events") for place in places}
        elif "memory" in controllers.split(","):
            place = CGROUPS / "memory" / path[1:]
            counters[str(place)] = _count(place / "memory.oom_control")
    return counters


def kills_again(counters: dict[str, int]) -> bool:
    """Whether any of them has risen since they were read."""
    now = {place: _count(PROC / "vmstat") for place in counters if place == "machine"}
    for place in counters.keys() - now.keys():
        now[place] = _count(Path(place) / "memory.events") or _count(Path(place) / "memory.oom_control")
    return any(now[place] > count for place, count in counters.items())


def namespace() -> int:
    """Of this process's pids: elsewhere the same number is another process."""
    return os.stat("/proc/self/ns/pid").st_ino


def mapped_files() -> set[str]:
    """Paths that any process which we may look at has in its memory."""
    found = set()
    for maps in PROC.glob("[0-9]*/maps"):
        found |= {line.split(maxsplit=5)[-1].strip() for line in _read(maps).splitlines()}
    return found


def _stat(pid: int) -> list[str]:
    return _fields(PROC / str(pid) / "stat")


def _fields(path: Path) -> list[str]:
    """A stat file from the state on (proc(5), field 3); empty when there is no such process or thread."""
    return _read(path).rpartition(")")[2].split()


def _count(path: Path) -> int:
    match = re.search(r"^oom_kill (\d+)", _read(path), re.MULTILINE)
    return int(match[1]) if match else 0


def _read(path: Path) -> str:
    """Empty when there is no such file, or it is not for us."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
