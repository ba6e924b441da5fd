"""One node's memory, limits and clock → what training there would trip over.

What comes in: what the kernel says. What goes out: notes. Surprise: Slurm hands the limits of the shell that submitted
the job to its processes, so the same job has other limits when somebody else submits it.
"""

import os
import resource
import secrets
import time
from pathlib import Path

import psutil
import torch

from phi3v_dist.cluster.checking import Notes, Place
from phi3v_dist.cluster.storage import checkpoint_bytes
from phi3v_dist.survive.space import size

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_BYTES = 64 << 20  # heartbeats, and NCCL or gloo between the ranks of a node
WANTED_SHARED_BYTES = 1 << 30  # NCCL takes some 10 MB a pair of GPUs
LEAST_FILES = 4096
INFINIBAND = Path("/sys/class/infiniband")
MOST_CLOCK_SKEW_S = 5.0


def shared_memory(_: Place, notes: Notes) -> None:
    """Raises OSError where there is none."""
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    notes.detail = f"{size(free)} free"
    if free < LEAST_SHARED_BYTES:
        notes.problem(
            f"{SHARED_MEMORY} has {size(free)} free of {size(status.f_blocks * status.f_frsize)}, and a node needs "
            f"{size(LEAST_SHARED_BYTES)}: remove what earlier jobs left there, or give the container more (--shm-size)"
        )
    elif free < WANTED_SHARED_BYTES and torch.cuda.is_available():
        notes.warn(f"{SHARED_MEMORY} has only {size(free)} free: with several GPUs, NCCL may want more")


def limits(_: Place, notes: Notes) -> None:
    """Open files are raised as far as the node allows, for this process; training does the same or is told here."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    notes.detail = f"{files} open files"
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        notes.problem(
            f"at most {files} files may be open (ulimit -Hn), and {LEAST_FILES:,} are needed for shards and "
            "connections: raise it in /etc/security/limits.conf or Slurm's PropagateResourceLimits"
        )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked != resource.RLIM_INFINITY and (torch.cuda.is_available() or _has_infiniband()):
        notes.warn(
            f"only {size(locked)} of memory may be locked (ulimit -l), so InfiniBand may refuse to work: make it "
            "unlimited for slurmd"
        )


def host_memory(place: Place, notes: Notes) -> None:
    """What training will hold in the host's memory, roughly, against what is there."""
    available = psutil.virtual_memory().available
    notes.detail = f"{size(available)} free"
    share = checkpoint_bytes(place.settings) // place.num_nodes
    needed = share if torch.cuda.is_available() else 3 * share  # a save's copy; on CPUs weights and gradients, too
    if available < needed:
        what = "a save's copy needs" if torch.cuda.is_available() else "weights, optimizer and a save's copy need"
        notes.warn(f"{size(available)} of memory are free, and {what} about {size(needed)} on each node")


def clock(place: Place, notes: Notes) -> None:
    """This node's clock against that of the file server. Nothing depends on it, but logs are read side by side."""
    path = place.folder / f".clock-{place.host}-{secrets.token_hex(4)}"
    place.folder.mkdir(parents=True, exist_ok=True)
    before_s = time.time()
    path.touch(exist_ok=False)
    try:
        written_s = path.stat().st_mtime
    finally:
        path.unlink()
    after_s = time.time()
    ahead_s = max(before_s - written_s, 0.0) or min(after_s - written_s, 0.0)  # 0 between the two readings
    notes.detail = "agrees with the file server's"
    if abs(ahead_s) > MOST_CLOCK_SKEW_S:
        notes.warn(
            f"the clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the file server's: times in "
            "logs cannot be compared (is NTP running?)"
        )


def _has_infiniband() -> bool:
    return INFINIBAND.is_dir() and any(INFINIBAND.iterdir())
