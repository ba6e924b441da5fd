"""This process and its device → what they say of themselves: memory, heat, power, the speed of a fixed small product.

What comes in: nothing. What goes out: `{base name of the registry: number}`. Surprise: nothing here is asked for within
a step. The product is timed before the first step, and again when a thousand times its cost has passed.
"""

import functools
import logging
import time
from typing import Any

import psutil
import torch

from phi3v_dist import nvml

log = logging.getLogger(__name__)

GIB = 2**30
SIZE = {"cpu": 256, "cuda": 4096}  # of the square matrices: about a millisecond
MOST_SHARE = 1e-3  # of the time


def measured(device: torch.device) -> dict[str, float]:
    """From any thread; some milliseconds."""
    found = {"mem/host_rss_gib": psutil.Process().memory_info().rss / GIB}
    if device.type == "cuda":
        memory = torch.cuda.memory_stats(device)
        found |= {
            "mem/alloc_peak_gib": memory.get("allocated_bytes.all.peak", 0) / GIB,
            "mem/reserved_peak_gib": memory.get("reserved_bytes.all.peak", 0) / GIB,
            "mem/alloc_retries": float(memory.get("num_alloc_retries", 0)),
        }
        found |= _by_nvml(device)
    return found


def _by_nvml(device: torch.device) -> dict[str, float]:
    """What the driver tells of a GPU. What is missing is named once."""
    if not nvml.is_installed():
        _say_missing("GPU utilization, temperature and power are", nvml.INSTALL)
        return {}
    import pynvml

    asked = {
        "gpu/util_pct": lambda: float(torch.cuda.utilization(device)),
        "gpu/temp_c": lambda: float(torch.cuda.temperature(device)),
        "gpu/power_w": lambda: torch.cuda.power_draw(device) / 1000,
    }
    found = {}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except (pynvml.NVMLError, RuntimeError) as error:  # not every driver and GPU has all three
            _say_missing(f"{name} is", str(error))
    return found


@functools.cache  # once each
def _say_missing(what: str, why: str) -> None:
    log.info("%s not logged: %s", what, why)


class Probe:
    """A product of two fixed matrices, in the type that the hardware is made for."""

    def __init__(self, device: torch.device):
        self._size = SIZE[device.type]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._matrix = torch.ones(self._size, self._size, dtype=dtype, device=device)
        self._device = device
        self._cost_s = 0.0
        self._last_s = -float("inf")
        self._events: Any = None
        torch.mm(self._matrix, self._matrix)  # the first one sets up the library
        self._found: float | None = None
        self.start()

    def start(self) -> None:
        """Measure, if it is time to. From the main thread, between steps; on a GPU it only queues."""
        began = time.perf_counter()
        if self._cost_s > MOST_SHARE * (began - self._last_s):
            return
        if self._device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        torch.mm(self._matrix, self._matrix)
        self._last_s = time.perf_counter()
        self._cost_s = self._last_s - began
        if self._events:
            self._events[1].record()
        else:
            self._found = self._tflops(self._cost_s)

    def take(self) -> float | None:
        """TFLOP/s, once for each time that it was measured."""
        if self._events and self._events[1].query():
            self._found = self._tflops(self._events[0].elapsed_time(self._events[1]) / 1000)
            self._events = None
        found, self._found = self._found, None
        return found

    def _tflops(self, seconds: float) -> float:
        return 2 * self._size**3 / max(seconds, 1e-9) / 1e12
