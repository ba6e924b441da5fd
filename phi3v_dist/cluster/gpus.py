"""Finds the GPUs of this node that are missing, in use or worn out, by asking the driver (NVML).

Note: a GPU in use may be fine a moment later. The ranks of an earlier start, killed, take up to half a minute to give
back what they hold, so it is asked again first.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from phi3v_dist import nvml
from phi3v_dist.cluster.checking import LOOKS_FRAC, Notes, Place
from phi3v_dist.nvml import NvmlError, open_nvml

MIB = 2**20
FREE_MIB = 1024  # what drivers and idle services may hold
FREE_WAIT_S, FREE_LOOK_S = 40.0, 2.0  # ranks of an earlier start may need that long to end
MPS_SERVER = "nvidia-cuda-mps-server"  # holds what its clients use, and stays
UNKNOWN = (  # errors of a question that this GPU or driver does not know, may not answer, or that is out of date
    "NVMLError_NotSupported", "NVMLError_FunctionNotFound", "NVMLError_ArgumentVersionMismatch",
    "NVMLError_InvalidArgument", "NVMLError_NoPermission", "NVMLError_NotFound", "NVMLLibraryMismatchError",
)  # fmt: skip
RESET = "; reset it, and replace it if that comes back"
AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use. handle: NVML's, which it takes with every question."""

    handle: Any
    index: int
    uuid: str
    name: str
    total_mib: int
    used_mib: int
    has_mig: bool

    @property
    def is_free(self) -> bool:
        """A GPU that is cut into instances (MIG) tells what all of them hold, those of others too."""
        return self.has_mig or self.used_mib <= FREE_MIB


def gpus(place: Place, notes: Notes) -> None:
    """Asked before this process touches a GPU, so that what is in use is used by others."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        notes.detail = "hidden (CUDA_VISIBLE_DEVICES is empty)"
        return
    listed: list[Gpu] = []
    try:
        if pynvml := open_nvml():
            listed = _once_free(pynvml, min(FREE_WAIT_S, place.left_s(LOOKS_FRAC) / 2))
            _note_state(pynvml, listed, notes)
    except NvmlError as error:
        notes.problem(f"{error}: a GPU or its driver is broken, or the driver was updated without a restart")
        return
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not listed and not seen:
        notes.detail = "none"
        return
    if not nvml.is_installed():
        notes.warn(f"memory in use, memory errors and heat of the GPUs were not looked at: {nvml.INSTALL}")
    notes.detail = f"{seen} x {torch.cuda.get_device_name(0)}" if seen else ""
    expected = expected_gpus(place.ranks_per_node, os.environ, len(listed) or seen)
    counts = [(seen, f"torch {torch.__version__}")]
    if any(gpu.has_mig for gpu in listed):
        expected = 1  # a process sees one instance, and NVML does not count them as GPUs
    elif listed:
        counts.insert(0, (len(listed), "NVML"))
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


def _once_free(pynvml: Any, wait_s: float) -> list[Gpu]:
    """The GPUs of this process, as soon as they are free or the time is over. Raises NvmlError."""
    end_s = time.monotonic() + wait_s
    while True:
        found = _listed(pynvml)
        if all(gpu.is_free for gpu in found) or time.monotonic() + FREE_LOOK_S > end_s:
            return found
        time.sleep(FREE_LOOK_S)


def _listed(pynvml: Any) -> list[Gpu]:
    """Raises NvmlError."""
    try:
        found = [_look_at(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise NvmlError(f"NVML fails: {error}") from error
    words = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    prefixes = tuple(word for word in words if word.startswith("GPU-"))
    named = [gpu for gpu in found if str(gpu.index) in words or gpu.uuid.startswith(prefixes)]
    return named or found  # what is named otherwise, such as an instance, may be on any


def _look_at(pynvml: Any, index: int) -> Gpu:
    """Raises NvmlError."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        # Version 2 leaves out what the driver keeps for itself, on large GPUs more than a GiB. Old drivers lack it.
        memory = _if_known(pynvml, pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
        memory = memory or pynvml.nvmlDeviceGetMemoryInfo(handle)
        mig, _ = _if_known(pynvml, pynvml.nvmlDeviceGetMigMode, handle) or (None, None)
        return Gpu(
            handle, index, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), memory.total // MIB,
            memory.used // MIB, mig == pynvml.NVML_DEVICE_MIG_ENABLE,
        )  # fmt: skip
    except pynvml.NVMLError as error:
        raise NvmlError(f"GPU {index} does not answer ({error})") from error


def _note_state(pynvml: Any, listed: list[Gpu], notes: Notes) -> None:
    """What each has against being used."""
    for gpu in listed:
        try:
            if not gpu.is_free:
                _note_use(pynvml, gpu, notes)
            if _if_known(pynvml, pynvml.nvmlDeviceGetComputeMode, gpu.handle) == pynvml.NVML_COMPUTEMODE_PROHIBITED:
                notes.problem(f"GPU {gpu.index}: its compute mode lets nobody compute: nvidia-smi --compute-mode=0")
            _note_memory_errors(pynvml, gpu, notes)
            _note_slowdown(pynvml, gpu, notes)
        except pynvml.NVMLError as error:
            notes.problem(f"GPU {gpu.index} does not answer ({error}){RESET}")


def _note_use(pynvml: Any, gpu: Gpu, notes: Notes) -> None:
    """Who holds its memory. No command lines, which may hold secrets."""
    processes = _if_known(pynvml, pynvml.nvmlDeviceGetComputeRunningProcesses, gpu.handle) or []
    names = {each.pid: _if_known(pynvml, pynvml.nvmlSystemGetProcessName, each.pid) or "" for each in processes}
    pids = [str(pid) for pid, name in names.items() if MPS_SERVER not in name]
    by = f", by process {', '.join(pids[:4])}" if pids else ""
    text = f"GPU {gpu.index} ({gpu.name}) is not free: {gpu.used_mib:,} of {gpu.total_mib:,} MiB are in use{by}"
    if names and not pids:
        notes.warn(f"{text}, by the MPS server alone")
    else:
        notes.problem(f"{text}; end what uses it, or reset it")


def _note_memory_errors(pynvml: Any, gpu: Gpu, notes: Notes) -> None:
    uncorrected = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    count = _if_known(pynvml, pynvml.nvmlDeviceGetTotalEccErrors, gpu.handle, uncorrected, pynvml.NVML_VOLATILE_ECC)
    if count:
        notes.problem(
            f"GPU {gpu.index}: {count} memory errors that could not be corrected since the driver was loaded{RESET}"
        )
    if count is None:  # a driver without that counter
        ever = _if_known(pynvml, pynvml.nvmlDeviceGetTotalEccErrors, gpu.handle, uncorrected, pynvml.NVML_AGGREGATE_ECC)
        if ever:
            notes.warn(f"GPU {gpu.index}: {ever} memory errors that could not be corrected, some perhaps long ago")
    if _if_known(pynvml, pynvml.nvmlDeviceGetRetiredPagesPendingStatus, gpu.handle) == pynvml.NVML_FEATURE_ENABLED:
        notes.problem(f"GPU {gpu.index}: memory pages wait to be retired at the next reset{RESET}")
    *_, pending, failed = _if_known(pynvml, pynvml.nvmlDeviceGetRemappedRows, gpu.handle) or (0, 0)
    if pending:
        notes.problem(f"GPU {gpu.index}: memory rows wait to be remapped at the next reset{RESET}")
    if failed:
        notes.problem(f"GPU {gpu.index}: memory rows could not be remapped{RESET}")


def _note_slowdown(pynvml: Any, gpu: Gpu, notes: Notes) -> None:
    reasons = _if_known(pynvml, pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu.handle)
    if reasons is None:  # the name in older drivers
        reasons = _if_known(pynvml, pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu.handle) or 0
    for bit, text in (
        (pynvml.nvmlClocksEventReasonHwSlowdown, "the hardware slows it down (heat or power)"),
        (pynvml.nvmlClocksEventReasonHwThermalSlowdown, "it is too hot"),
        (pynvml.nvmlClocksEventReasonSwThermalSlowdown, "the driver slows it down for heat"),
    ):
        if reasons & bit:
            notes.warn(f"GPU {gpu.index}: {text}")


def _if_known(pynvml: Any, ask: Callable[..., AnswerT], *arguments: Any) -> AnswerT | None:
    """The answer; None where this GPU or its driver does not know the question. Raises other errors of NVML."""
    try:
        return ask(*arguments)
    except tuple(getattr(pynvml, name) for name in UNKNOWN):
        return None
