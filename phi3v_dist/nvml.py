"""NVIDIA's management library, through nvidia-ml-py: whether it can be asked, and why not."""

import importlib.util
from typing import Any

INSTALL = "nvidia-ml-py is not installed: pip install nvidia-ml-py"


class NvmlError(Exception):
    """NVML is there but does not work. The message says why."""


def is_installed() -> bool:
    return importlib.util.find_spec("pynvml") is not None


def open_nvml() -> Any | None:
    """The module `pynvml`, initialized. None on a machine without NVIDIA's driver, or without nvidia-ml-py.

    Raises:
        NvmlError: the driver does not answer as it should.
    """
    if not is_installed():
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return None
    except pynvml.NVMLError as error:
        raise NvmlError(f"NVML fails: {error}") from error
    return pynvml
