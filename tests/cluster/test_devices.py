"""GPUs as the driver tells of them (a stand-in for NVML), and arithmetic that shows a single wrong number."""

import sys
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from preflight_nodes import place_of

from phi3v_dist.cluster import devices, gpus
from phi3v_dist.cluster.checking import check
from phi3v_dist.config import Settings

MIB = 2**20
HOT = pynvml.nvmlClocksEventReasonHwSlowdown
UNKNOWN = pynvml.NVML_ERROR_NOT_SUPPORTED


@dataclass(eq=False)
class Gpu:
    """Answers of NVML for one GPU; an `NVMLError` is raised."""

    used_mib: int = 4
    mig: Any = field(default_factory=lambda: pynvml.NVMLError(UNKNOWN))  # as most GPUs
    compute_mode: int = pynvml.NVML_COMPUTEMODE_DEFAULT
    volatile_errors: Any = 0
    errors_ever: int = 0
    pages_pending: Any = field(default_factory=lambda: pynvml.NVMLError(UNKNOWN))
    rows: Any = (0, 0, 0, 0)
    events: Any = 0
    throttles: Any = field(default_factory=lambda: pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND))
    memory_v2: Any = None  # that of `used_mib`
    handle: Any = "fine"
    holders: dict[int, str] = field(default_factory=dict)


class Nvml:
    """The functions of pynvml that are used here, on made-up GPUs; names and numbers are those of the real one."""

    def __init__(self, *gpus: Gpu, init: Exception | None = None):
        self.gpus, self.init = gpus, init

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvml") and callable(getattr(pynvml, name)):
            pytest.fail(f"the stand-in has no {name}")
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:
        if self.init:
            raise self.init

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        answer(self.gpus[index].handle)
        return self.gpus[index]

    def nvmlDeviceGetName(self, gpu: Gpu) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return f"GPU-{'abc'[self.gpus.index(gpu)]}{self.gpus.index(gpu) + 1}"

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu, version: int | None = None) -> SimpleNamespace:
        reserved = 0 if version == pynvml.nvmlMemory_v2 else 600
        if version:
            answer(gpu.memory_v2)
        return SimpleNamespace(total=81559 * MIB, used=(gpu.used_mib + reserved) * MIB)

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> list[int]:
        return [answer(gpu.mig), 0]

    def nvmlDeviceGetComputeMode(self, gpu: Gpu) -> int:
        return gpu.compute_mode

    def nvmlDeviceGetTotalEccErrors(self, gpu: Gpu, kind: int, counter: int) -> int:
        assert kind == pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        return answer(gpu.volatile_errors if counter == pynvml.NVML_VOLATILE_ECC else gpu.errors_ever)

    def nvmlDeviceGetRetiredPagesPendingStatus(self, gpu: Gpu) -> int:
        return answer(gpu.pages_pending)

    def nvmlDeviceGetRemappedRows(self, gpu: Gpu) -> tuple[int, int, int, int]:
        return answer(gpu.rows)

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: Gpu) -> int:
        return answer(gpu.events)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: Gpu) -> int:
        return answer(gpu.throttles)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in gpu.holders]

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        (name,) = (gpu.holders[pid] for gpu in self.gpus if pid in gpu.holders)
        return name


def answer(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


@pytest.fixture
def look(settings_tree, tmp_path, monkeypatch):
    """GPUs → the outcome of the look at them. `torch` sees as many as it is told."""
    place = place_of(Settings.model_validate(settings_tree), "n1", tmp_path, ranks=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "FREE_WAIT_S", 0.6)
    monkeypatch.setattr(gpus, "FREE_LOOK_S", 0.1)

    def run(nvml: Nvml, seen: int = 2, limit_s: float = 60.0):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
        return check("GPUs", gpus.gpus, place, limit_s=limit_s)

    return run


def test_gpus_that_are_there_and_free_are_fine(look):
    found = look(Nvml(Gpu(), Gpu(used_mib=521, pages_pending=pynvml.NVML_FEATURE_DISABLED)))
    assert not found.problems and not found.warnings and found.detail == "2 x H100"


@pytest.mark.parametrize(
    "nvml, seen, words",
    [
        (Nvml(Gpu()), 1, "NVML sees 1 GPU, expected 2"),
        (Nvml(Gpu(), Gpu()), 0, "sees 0 GPUs, expected 2"),
        (Nvml(Gpu(), Gpu(used_mib=70123, holders={4711: "python"})), 2,
         "GPU 1 (NVIDIA H100 80GB HBM3) is not free: 70,123 of 81,559 MiB are in use, by process 4711; end"),
        (Nvml(Gpu(), Gpu(volatile_errors=3)), 2, "GPU 1: 3 memory errors that could not be corrected since"),
        (Nvml(Gpu(pages_pending=pynvml.NVML_FEATURE_ENABLED), Gpu()), 2, "GPU 0: memory pages wait to be retired"),
        (Nvml(Gpu(rows=(1, 0, 1, 0)), Gpu()), 2, "GPU 0: memory rows wait to be remapped"),
        (Nvml(Gpu(), Gpu(rows=(0, 1, 0, 1))), 2, "GPU 1: memory rows could not be remapped"),
        (Nvml(init=pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)), 2,
         "NVML fails: RM has detected an NVML/RM version mismatch"),
        (Nvml(init=pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)), 0, "NVML fails: Driver Not Loaded"),
        (Nvml(Gpu(), Gpu(handle=pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST))), 1,
         "GPU 1 does not answer (GPU is lost)"),
        (Nvml(Gpu(), Gpu(events=pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST))), 2,
         "GPU 1 does not answer (GPU is lost)"),
        (Nvml(Gpu(), Gpu(compute_mode=pynvml.NVML_COMPUTEMODE_PROHIBITED)), 2, "GPU 1: its compute mode lets nobody"),
        (Nvml(Gpu(mig=1), Gpu(mig=1)), 0, "sees 0 GPUs, expected 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_gpus_is_a_problem_that_names_it(look, nvml, seen, words):
    found = look(nvml, seen)
    assert any(words in problem for problem in found.problems), found.problems


def test_a_driver_that_hangs_is_a_problem(look, monkeypatch):
    is_over = threading.Event()
    nvml = Nvml(Gpu())
    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", is_over.wait, raising=False)
    found = look(nvml, limit_s=0.5)
    is_over.set()
    assert found.problems == ("no answer within 0 s: a disk, file server or driver hangs",)


def test_memory_that_an_earlier_start_still_holds_is_waited_for_and_free_gpus_are_not(look, monkeypatch):
    monkeypatch.setattr(gpus, "FREE_WAIT_S", 30.0)
    held = Nvml(Gpu(), Gpu(used_mib=70123))
    real, looks = gpus._listed, []

    def listed(nvml):
        looks.append(real(nvml))
        held.gpus[1].used_mib = 521
        return looks[-1]

    monkeypatch.setattr(gpus, "_listed", listed)
    found = look(held)
    assert not found.problems and [gpu.used_mib for its in looks for gpu in its] == [4, 70123, 4, 521]
    looks.clear()
    assert not look(Nvml(Gpu(), Gpu())).problems and len(looks) == 1


@pytest.mark.parametrize(
    "nvml, seen, visible, num_warnings",
    [
        (Nvml(Gpu(mig=1), Gpu(mig=1, used_mib=70123)), 1, None, 0),
        (Nvml(Gpu(), Gpu(used_mib=1400, holders={77: "/usr/bin/nvidia-cuda-mps-server"})), 2, None, 1),
        (Nvml(*[Gpu(compute_mode=pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS) for _ in range(2)]), 2, None, 0),
        (Nvml(Gpu(), Gpu(), Gpu(used_mib=70123)), 2, "0,1", 0),
        (Nvml(Gpu(), Gpu(), Gpu(used_mib=70123)), 2, "GPU-a1,GPU-b2", 0),
        (Nvml(Gpu(), Gpu(), Gpu()), 3, None, 0),
        (Nvml(Gpu(), Gpu(volatile_errors=pynvml.NVMLError(UNKNOWN), errors_ever=3)), 2, None, 1),
        (Nvml(Gpu(), Gpu(errors_ever=3)), 2, None, 0),
        (Nvml(Gpu(), Gpu(events=pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND), throttles=HOT)), 2, None, 1),
        (Nvml(Gpu(), Gpu(used_mib=700)), 2, None, 0),
        (Nvml(Gpu(), Gpu(memory_v2=pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND))), 2, None, 0),
    ],
    ids=["instances", "MPS", "exclusive", "others' GPUs", "by UUID", "more than ranks", "no volatile errors",
         "old errors", "old names", "the driver's own memory", "memory as old drivers tell it"],
)  # fmt: skip
def test_healthy_gpus_in_unusual_modes_are_no_problem(look, monkeypatch, nvml, seen, visible, num_warnings):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = look(nvml, seen)
    assert not found.problems and len(found.warnings) == num_warnings, found


@pytest.mark.parametrize(
    "bit, words",
    [
        (pynvml.nvmlClocksEventReasonHwSlowdown, "the hardware slows it down"),
        (pynvml.nvmlClocksEventReasonHwThermalSlowdown, "it is too hot"),
        (pynvml.nvmlClocksEventReasonSwThermalSlowdown, "the driver slows it down for heat"),
    ],
)
def test_a_throttled_gpu_is_a_warning(look, bit, words):
    found = look(Nvml(Gpu(), Gpu(events=bit | pynvml.nvmlClocksEventReasonSwPowerCap)))
    (warning,) = found.warnings
    assert not found.problems and warning.startswith(f"GPU 1: {words}")
    assert not look(Nvml(Gpu(), Gpu(events=pynvml.nvmlClocksEventReasonSwPowerCap))).warnings


def test_without_nvidia_ml_py_the_gpus_of_torch_count_and_a_warning_says_what_was_not_looked_at(look, monkeypatch):
    monkeypatch.setattr(gpus.nvml.importlib.util, "find_spec", lambda name: None)
    found = look(Nvml(Gpu(volatile_errors=3)))
    assert not found.problems and found.detail == "2 x H100"
    assert "nvidia-ml-py is not installed: pip install nvidia-ml-py" in found.warnings[0]
    assert look(Nvml(Gpu()), seen=0).detail == "none"


def test_without_gpus_what_slurm_promised_does_not_count(settings_tree, tmp_path, monkeypatch):
    """A CPU cluster may offer generic resources called gpu."""
    nvml = Nvml(init=pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = check("GPUs", gpus.gpus, place_of(Settings.model_validate(settings_tree), "n1", tmp_path))
    assert not found.problems and not found.warnings and found.detail == "none"
    assert gpus.expected_gpus(None, {"SLURM_GPUS_ON_NODE": "4"}, 8) == 4
    assert gpus.expected_gpus(2, {"SLURM_GPUS_ON_NODE": "4"}, 8) == 2
    assert gpus.expected_gpus(None, {}, 8) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_exact_so_that_one_wrong_number_shows(dtype):
    left, right = devices.factors(256)
    expected = left.sum(0).double() @ right.double()
    product = left.to(dtype) @ right.to(dtype)
    assert torch.equal(product.double().sum(0), expected) and product.abs().max() <= 256 / devices.NONZERO_EVERY
    assert set(left.unique().tolist()) == set(right.unique().tolist()) == {-1.0, 0.0, 1.0}
    product[7, 9] += 1
    assert not torch.equal(product.double().sum(0), expected)
    assert torch.tensor(8192 / devices.NONZERO_EVERY, dtype=torch.bfloat16) == 256, "the largest sum on a GPU"
