"""What a process measures of itself and its GPU, and what it says when it cannot."""

import logging

import pynvml
import pytest
import torch

from phi3v_dist import nvml
from phi3v_dist.observe import machine

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, caplog) -> pytest.LogCaptureFixture:
    """A GPU that is asked through torch; returns the log."""
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"allocated_bytes.all.peak": 2**30})
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 93)
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: 61)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 512_000)
    machine._say_missing.cache_clear()
    caplog.set_level(logging.INFO)
    return caplog


def test_a_gpu_tells_use_heat_and_power(gpu):
    found = machine.measured(GPU)
    assert (found["gpu/util_pct"], found["gpu/temp_c"], found["gpu/power_w"]) == (93.0, 61.0, 512.0)
    assert found["mem/alloc_peak_gib"] == 1.0 and not gpu.messages


def test_without_nvidia_ml_py_one_line_says_what_is_not_logged(gpu, monkeypatch):
    monkeypatch.setattr(nvml, "is_installed", lambda: False)
    for _ in range(3):
        assert not any(name.startswith("gpu/") for name in machine.measured(GPU))
    assert gpu.messages == [
        "GPU utilization, temperature and power are not logged: nvidia-ml-py is not installed: pip install nvidia-ml-py"
    ]


def test_what_one_gpu_does_not_tell_is_named_once_and_the_rest_is_logged(gpu, monkeypatch):
    def refuse(device):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(torch.cuda, "power_draw", refuse)
    for _ in range(3):
        found = machine.measured(GPU)
        assert found["gpu/util_pct"] == 93.0 and "gpu/power_w" not in found
    assert gpu.messages == ["gpu/power_w is not logged: Not Supported"]


def test_a_cpu_is_not_asked_for_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(nvml, "is_installed", lambda: False)
    assert machine.measured(torch.device("cpu")).keys() == {"mem/host_rss_gib"} and not gpu.messages
