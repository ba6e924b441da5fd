"""nvidia-smi's tables → which GPUs of this node are missing, taken or worn out.

What comes in: what the driver says. What goes out: notes. Surprise: a GPU in use may be fine a moment later. The ranks
of an earlier start, killed, take up to half a minute to give back what they hold, so it is asked again first.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from phi3v_dist.cluster.checking import LOOKS_FRAC, Notes, Place

SMI = "nvidia-smi"
SMI_LIMIT_S = 20.0
FREE_MIB = 1024  # what drivers and idle services may hold
FREE_WAIT_S, FREE_LOOK_S = 40.0, 2.0  # ranks of an earlier start may need that long to end
BASE_FIELDS = ("index", "name", "memory.total", "memory.used")
UUID, MIG_MODE, COMPUTE_MODE = "uuid", "mig.mode.current", "compute_mode"
MPS_SERVER = "nvidia-cuda-mps-server"  # holds what its clients use, and stays
ERROR_FIELDS = {  # nvidia-smi's name → what it means when it counts, or says Yes
    "ecc.errors.uncorrected.volatile.total": "memory errors that could not be corrected since the driver was loaded",
    "retired_pages.pending": "memory pages wait to be retired at the next reset",
}
ECC_SINCE_EVER = {  # of drivers that know no volatile counters
    "ecc.errors.uncorrected.aggregate.total": "memory errors that could not be corrected, some perhaps long ago",
}
REMAP_FIELDS = {
    "remapped_rows.pending": "memory rows wait to be remapped at the next reset",
    "remapped_rows.failure": "memory rows could not be remapped",
}
THROTTLE_FIELDS = {  # newer drivers call them clocks_event_reasons
    "clocks_throttle_reasons.hw_slowdown": "the hardware slows it down (heat or power)",
    "clocks_throttle_reasons.hw_thermal_slowdown": "it is too hot",
    "clocks_throttle_reasons.sw_thermal_slowdown": "the driver slows it down for heat",
}
Row = list[str]


class SmiError(Exception):
    """nvidia-smi did not answer, or not with a table; the message says which."""


class SmiHangs(SmiError):
    """It does not answer at all, and will not the next time."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that nvidia-smi lists and this process may use. number: its row there."""

    number: int
    index: str
    name: str
    total_mib: str
    used_mib: str
    has_mig: bool

    @property
    def is_free(self) -> bool:
        """Of one that is cut into instances (MIG) nvidia-smi tells what all of them hold, others' too."""
        return self.has_mig or not self.used_mib.isdecimal() or int(self.used_mib) <= FREE_MIB


def gpus(place: Place, notes: Notes) -> None:
    """Asked before this process touches a GPU, so that what is in use is used by others."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        notes.detail = "hidden (CUDA_VISIBLE_DEVICES is empty)"
        return
    listed: list[Gpu] = []
    if shutil.which(SMI):
        try:
            listed = _once_free(min(FREE_WAIT_S, place.left_s(LOOKS_FRAC) / 2))
            _note_state(listed, notes)
        except SmiError as error:
            notes.problem(str(error))
            return
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not listed and not seen:
        notes.detail = "none"
        return
    notes.detail = f"{seen} x {torch.cuda.get_device_name(0)}" if seen else ""
    expected = expected_gpus(place.ranks_per_node, os.environ, len(listed) or seen)
    counts = [(seen, f"torch {torch.__version__}")]
    if any(gpu.has_mig for gpu in listed):
        expected = 1  # a process sees one instance, and nvidia-smi does not list them here
    elif listed:
        counts.insert(0, (len(listed), SMI))
    for number, who in counts:
        if number < expected:
            notes.problem(
                f"{who} sees {number} GPU{'s' if number != 1 else ''}, expected {expected}: look for Xid errors in the "
                "kernel's log, at CUDA_VISIBLE_DEVICES, and whether torch was built for this driver's CUDA"
            )


def expected_gpus(ranks_per_node: int | None, env: Mapping[str, str], otherwise: int) -> int:
    """Ranks per node as given, else what Slurm gave this node, else all that there are. More are fine."""
    said = env.get("SLURM_GPUS_ON_NODE", "")
    return ranks_per_node or (int(said) if said.isdecimal() else otherwise)


def _once_free(wait_s: float) -> list[Gpu]:
    """The GPUs of this process, as soon as they are free or the time is over. Raises SmiError."""
    end_s = time.monotonic() + wait_s
    while True:
        found = _listed()
        if all(gpu.is_free for gpu in found) or time.monotonic() + FREE_LOOK_S > end_s:
            return found
        time.sleep(FREE_LOOK_S)


def _listed() -> list[Gpu]:
    """Raises SmiError."""
    rows = query("--query-gpu", BASE_FIELDS)
    modes = [row[0] for row in _query_if_known("--query-gpu", (MIG_MODE,))]
    uuids = {number: row[0] for number, row in enumerate(_query_if_known("--query-gpu", (UUID,)))}
    found = [
        Gpu(number, index, name, total, used, modes[number : number + 1] == ["Enabled"])
        for number, (index, name, total, used, *_) in enumerate(rows)
    ]
    words = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    prefixes = tuple(word for word in words if word.startswith("GPU-"))
    named = [gpu for gpu in found if gpu.index in words or uuids.get(gpu.number, "").startswith(prefixes)]
    return named or found  # what is named otherwise, such as an instance, may be on any


def _note_state(listed: list[Gpu], notes: Notes) -> None:
    """What nvidia-smi says against each. Raises SmiHangs."""
    busy = [gpu for gpu in listed if not gpu.is_free]
    pids, is_mps = _holders() if busy else ([], False)
    by = f", by process {', '.join(pids[:4])}" if pids else ""
    for gpu in busy:
        text = f"GPU {gpu.index} ({gpu.name}) is not free: {int(gpu.used_mib):,} of {gpu.total_mib} MiB are in use{by}"
        if is_mps and not pids:
            notes.warn(f"{text}, by the MPS server alone")
        else:
            notes.problem(f"{text}; end what uses it, or reset it")
    numbers = {gpu.number: gpu.index for gpu in listed}
    modes = _query_if_known("--query-gpu", (COMPUTE_MODE,))
    for number, (mode, *_) in enumerate(modes):
        if mode == "Prohibited" and number in numbers:
            notes.problem(f"GPU {numbers[number]}: its compute mode lets nobody compute: nvidia-smi --compute-mode=0")
    ecc, _ = next(iter(ERROR_FIELDS.items()))
    since_ever = {} if _query_if_known("--query-gpu", (ecc,)) else ECC_SINCE_EVER
    events = {name.replace("throttle", "event"): text for name, text in THROTTLE_FIELDS.items()}
    knows_throttle = any(_query_if_known("--query-gpu", (name,)) for name in THROTTLE_FIELDS)
    tables: list[tuple[str, dict[str, str], Callable[[str], None]]] = [
        ("--query-gpu", ERROR_FIELDS, notes.problem),
        ("--query-remapped-rows", REMAP_FIELDS, notes.problem),
        ("--query-gpu", since_ever, notes.warn),
        ("--query-gpu", THROTTLE_FIELDS if knows_throttle else events, notes.warn),
    ]
    for kind, fields, tell in tables:
        for number, field, value in _flags(kind, tuple(fields)) if fields else ():
            if number in numbers:
                advice = "" if tell == notes.warn else "; reset it, and replace it if that comes back"
                tell(f"GPU {numbers[number]}: {fields[field]} ({field} is {value}){advice}")


def query(kind: str, fields: tuple[str, ...]) -> list[Row]:
    """A table of nvidia-smi. Raises SmiError."""
    words = [SMI, f"{kind}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=SMI_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise SmiHangs(f"{SMI} did not answer within {SMI_LIMIT_S:.0f} s: a GPU or its driver hangs") from error
    except OSError as error:
        raise SmiError(f"{SMI} cannot be started: {error.strerror}") from error
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[:200]
        raise SmiError(f"{SMI} fails with {done.returncode}: {said or 'without a word'}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    if any(len(row) < len(fields) for row in rows):
        raise SmiError(f"{SMI} answers with something else than {', '.join(fields)}: {done.stdout[:200].strip()}")
    return rows


def _flags(kind: str, fields: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """(GPU, field, value) of what counts or says yes. Raises SmiError when nvidia-smi hangs."""
    found = []
    rows = _query_if_known(kind, fields)
    asked = [(fields, rows)] if rows else [((field,), _query_if_known(kind, (field,))) for field in fields]
    for names, its in asked:
        for number, row in enumerate(its):
            cells = zip(names, row, strict=False)
            found += [(number, name, cell) for name, cell in cells if _counts(cell)]
    return found


def _query_if_known(kind: str, fields: tuple[str, ...]) -> list[Row]:
    """Drivers know different fields, and say so with an error; then empty. Raises SmiError when nvidia-smi hangs."""
    try:
        return query(kind, fields)
    except SmiHangs:
        raise
    except SmiError:
        return []


def _counts(cell: str) -> bool:
    return (cell.isdecimal() and int(cell) > 0) or cell.lower() in ("yes", "active")


def _holders() -> tuple[list[str], bool]:
    """Processes that compute, for a message (no command lines: secrets), and whether MPS is among them."""
    rows = _query_if_known("--query-compute-apps", ("pid", "process_name"))
    pids = dict.fromkeys(row[0] for row in rows if MPS_SERVER not in row[1])
    return list(pids), any(MPS_SERVER in row[1] for row in rows)
