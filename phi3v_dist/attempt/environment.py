"""The machines under a run → an error before the first step when they are not what a run can stand on.

What comes in: the topology, the resolved settings, the run folder. What goes out: nothing, or an error with the ranks,
hosts and paths that are wrong. Surprise: none of these faults shows by itself. Ranks with different code or settings
train on without a word, and a folder that cannot be written is noticed at the first save, hours later.
"""

import errno
import getpass
import hashlib
import json
import logging
import os
import platform
import secrets
import stat
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from phi3v_dist import resources
from phi3v_dist.attempt.build_cache import leftover_locks
from phi3v_dist.config_file import flattened
from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.parallel.variables import host_name

PACKAGE = Path(__file__).parents[1]
VERSIONS = ("torch", "deepspeed", "transformers", "phi3v-dist")  # those that change numbers or what ranks exchange
ON_EACH_NODE = ("data.cache.path", "checkpoint.local")  # folders on a node's own disk may have a name of its own
MOST_CLOCK_SKEW_S = 5.0
CLOCK_ROUNDS = 3  # the smallest of some differences is the clocks'; the others hold the waiting of a busy machine
SHOWN = 4  # names in a line, values of a setting
WHAT_TO_DO = {
    errno.EROFS: "it is mounted read-only: mount it for writing, or set run.root to another place",
    errno.EDQUOT: "your quota is used up: delete something there, ask for more, or set run.root to another place",
    errno.ENOSPC: "there is no space left: delete something there, or set run.root to another place",
    errno.EIO: "the disk or file server fails: look at the kernel's log of that host, or leave the host out",
    errno.EACCES: "its permissions forbid it: chown or chmod it, or set run.root to a folder of your own",
    errno.EPERM: "its permissions forbid it: chown or chmod it, or set run.root to a folder of your own",
    errno.ELOOP: "there is a symbolic link where a file belongs: remove it",
}

log = logging.getLogger(__name__)


def require_alike(topology: Topology, resolved: dict[str, Any]) -> None:
    """Every rank must run the same code with the same settings on the same kind of device. Collective.

    Raises:
        LaunchError: on every rank, with a table of what differs and where.
    """
    of_all = shared_settings(resolved)
    ours = facts(of_all)
    everybody = topology.gather((topology.host, ours))
    differing = [name for name in ours if len({its[name] for _, its in everybody}) > 1]
    hosts = [host for host, _ in everybody]
    lines = [line for name in differing for line in _table(name, [its[name] for _, its in everybody], hosts)]
    if "settings" in differing:  # the digest says that they differ; which ones is worth a second look
        trees = topology.gather(of_all)
        for key in dict.fromkeys(key for tree in trees for key in tree):
            values = [repr(tree.get(key)) for tree in trees]
            if len(set(values)) > 1:
                lines += _table(f"  {key}", values, hosts)
    if differing:
        raise LaunchError(
            "the ranks are not alike: "
            + "\n".join([f"{', '.join(differing)} must be the same on all of them, and found was", *lines])
            + "\nInstall and copy the same everywhere, or leave these hosts out"
        )
    warn_of_devices(topology)
    warn_of_clocks(topology)
    if topology.local_rank == 0:
        for message in leftover_locks():
            log.warning("%s", message)


def shared_settings(resolved: dict[str, Any]) -> dict[str, Any]:
    """By dotted key, those that have to be the same on all nodes."""
    return {key: value for key, value in flattened(resolved).items() if key not in ON_EACH_NODE}


def facts(settings: dict[str, Any]) -> dict[str, str]:
    """What has to be the same on all ranks, as short texts. settings: by dotted key."""
    found = {"python": platform.python_version()} | versions(VERSIONS)
    found["source files"] = digest_of_files(PACKAGE)
    found["settings"] = _digest(json.dumps(settings, sort_keys=True).encode())
    deepspeed = resources.find(Path(settings.get("parallel.deepspeed", "")), "ds_configs")
    found["DeepSpeed JSON"] = _digest(deepspeed.read_bytes()) if deepspeed.is_file() else "missing"
    found["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["CUDA"] = str(torch.version.cuda)
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    return found


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The git commit of the code, `unknown` where it is no checkout."""
    if not (PACKAGE.resolve().parent / ".git").exists():
        return "unknown"  # an installation may lie in a repository of its user, whose commit says nothing about us
    words = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(words, capture_output=True, text=True, cwd=PACKAGE, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return git.stdout.strip() or "unknown"


def digest_of_files(folder: Path) -> str:
    """Of names and bytes of all source files and templates of a package."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".j2")):
        digest.update(f"{path.relative_to(folder)}\0{_digest(path.read_bytes())}\n".encode())
    return digest.hexdigest()[:12]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _table(name: str, values: Sequence[str], hosts: Sequence[str]) -> list[str]:
    """One line per value, the most frequent first, however many ranks have it."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        ranks[value].append(rank)
    ordered = sorted(ranks.items(), key=lambda entry: (-len(entry[1]), entry[1]))
    left_out = len(ordered) - SHOWN
    lines = [
        f"  {name if number == 0 else '':16} {value} on {_few('rank', [str(rank) for rank in its])} "
        f"({_few('host', list(dict.fromkeys(hosts[rank] for rank in its)))})"
        for number, (value, its) in enumerate(ordered[:SHOWN])
    ]
    return lines + ([f"  {'':16} and {left_out} other values"] if left_out > 0 else [])


def _few(what: str, names: Sequence[str]) -> str:
    """`rank 3`, or `510 ranks: 0, 1, 2, 4 …`."""
    if len(names) == 1:
        return f"{what} {names[0]}"
    return f"{len(names)} {what}s: {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}"


def warn_of_devices(topology: Topology) -> None:
    """Nodes with other numbers of devices are allowed; often one of them has lost a device."""
    counts = topology.gather(str(torch.cuda.device_count()) if torch.cuda.is_available() else "0")
    hosts = topology.gather(topology.host)
    if topology.is_main and len(set(counts)) > 1:
        table = "\n".join(_table("devices seen", counts, hosts))
        log.warning("the nodes do not see the same number of devices; is one of them broken?\n%s", table)


def warn_of_clocks(topology: Topology, clock: Callable[[], float] = time.time) -> float:
    """Differences of the hosts' clocks are said, since logs are read side by side; nothing here depends on them.

    Returns the largest difference, in seconds.
    """
    spreads = []
    for _ in range(CLOCK_ROUNDS):
        topology.barrier()
        readings = topology.gather((clock(), topology.host))
        spreads.append((max(readings)[0] - min(readings)[0], min(readings), max(readings)))
    spread, slow, fast = min(spreads)
    if topology.is_main and spread > MOST_CLOCK_SKEW_S:
        log.warning(
            "the clock of %s is %.0f s ahead of that of %s: times in their logs cannot be compared (is NTP running?); "
            "training does not depend on it", fast[1], spread, slow[1],
        )  # fmt: skip
    return spread


def require_writable(folder: Path, topology: Topology) -> None:
    """One process of each node writes a small file into the run folder and reads it back. Collective.

    Raises:
        LaunchError: on every rank, naming path, user and hosts, and what to do.
    """
    ours = why_not_writable(folder) if topology.local_rank == 0 else None
    hosts: dict[str, list[str]] = defaultdict(list)
    for host, why in topology.gather((topology.host, ours)):
        if why:
            hosts[why].append(host)
    if hosts:
        raise LaunchError([f"on {_few('host', its)}: {why}" for why, its in hosts.items()])
    if topology.is_main and (exposed := exposure(folder)):
        log.warning("%s", exposed)


def why_not_writable(folder: Path, what: str = "the run folder", setting: str = "run.root") -> str | None:
    """What goes wrong in writing there; None when nothing does. what, setting: how a message calls the folder."""
    path = folder / f".write-test-{host_name()}-{secrets.token_hex(4)}"
    content = secrets.token_bytes(64)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
            found = os.pread(descriptor, len(content) + 1, 0)
        finally:
            os.close(descriptor)
            os.unlink(path)
    except OSError as error:
        reason = error.strerror or str(error)
        advice = WHAT_TO_DO.get(error.errno or 0, "set run.root to a place that takes it").replace("run.root", setting)
        return f"{what} {folder} cannot be written by {_user()}: {reason}; {advice}"
    if found != content:
        return f"{what} {folder} gives back other bytes than were written: {WHAT_TO_DO[errno.EIO]}"
    return None


def _user() -> str:
    try:
        return f"user {getpass.getuser()}"
    except (KeyError, OSError):  # a container without an entry for this number
        return f"user {os.getuid()}"


def exposure(folder: Path) -> str | None:
    """Why others could exchange the run folder under the run; None when they cannot."""
    try:
        mode = folder.resolve().parent.stat().st_mode
    except OSError:
        return None
    if not mode & stat.S_IWOTH or mode & stat.S_ISVTX:
        return None
    return (
        f"{folder.resolve().parent} can be written by everybody, so anybody may remove {folder.name} or put another "
        "folder in its place: chmod o-w, or set run.root to a folder of your own"
    )


def links_out(folder: Path) -> list[str]:
    """One message for each symbolic link that leads out of a run folder: what a run writes would land, and what it
    deletes be lost, elsewhere. The folder above, `run.root`, may be a link."""
    if folder.is_symlink():
        return [
            f"the run folder {folder} is a symbolic link to {os.readlink(folder)}: runs do not follow links; set "
            "run.root to the place where the folder really is"
        ]
    inside = folder.resolve()
    found = []
    for place, folders, files in os.walk(folder):  # which follows no links
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                found.append(
                    f"{path} is a symbolic link that leads out of the run folder, to {os.readlink(path)}: remove it if "
                    "you did not make it; if you did, move what it points to into the folder"
                )
    return found
