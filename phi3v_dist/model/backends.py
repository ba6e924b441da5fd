"""`model.attention`, a device and a type → the one backend that attends, and why.

What comes in: the setting's name and where and in what the model computes. What goes out: a `Backend`, decided once;
`attention.py` runs it. Surprise: an installed flash-attn is no usable one. It is bound to the torch it was built for,
so the kernel is imported here, and what its import says is part of the answer.

A name is used or refused, with all reasons in one line; `auto` takes the first of flash-attn 3, flash-attn 2 and sdpa
that has no reason against it. Sources of the limits: flash-attn's README (Ampere or newer, head size up to 256, half
types; "3" is compiled for Hopper alone) and the argument checks of its kernels.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch

from phi3v_dist.config import AttentionName
from phi3v_dist.errors import ConfigError

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8
HALF_TYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """Who attends.

    name: `flash_attention_3`, `flash_attention_2`, `sdpa` or `eager`.
    why: one clause for the log.
    kernel: flash-attn's `flash_attn_varlen_func`; None for torch's own.
    """

    name: str
    why: str = "asked for"
    kernel: Callable[..., object] | None = None


@dataclass(frozen=True)
class FlashPackage:
    """One generation of flash-attn: the module that holds its kernel, and the GPUs it is made for."""

    title: str
    module: str
    install: str
    architecture: str
    min_capability: tuple[int, int]
    end_capability: tuple[int, int] | None  # the first that it does not run on

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether it is made for GPUs of this compute capability."""
        return self.min_capability <= capability and (self.end_capability is None or capability < self.end_capability)


FLASH = {
    "flash_attention_3": FlashPackage(
        title="flash-attn 3", module="flash_attn_interface",
        install="python setup.py install, in hopper/ of the flash-attention repository",
        architecture="Hopper (9.x)", min_capability=(9, 0), end_capability=(10, 0),
    ),
    "flash_attention_2": FlashPackage(
        title="flash-attn", module="flash_attn", install="pip install --no-build-isolation --no-cache-dir flash-attn",
        architecture="Ampere (8.0) or newer", min_capability=(8, 0), end_capability=None,
    ),
}  # fmt: skip


def check_name(name: str) -> None:
    """Raises ConfigError for what is no value of `model.attention`."""
    if name not in get_args(AttentionName):
        names = ", ".join(get_args(AttentionName))
        raise ConfigError(f"`model.attention` is {name!r}, which is no attention backend: choose one of {names}")


def choose(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend for a setting.

    Raises:
        ConfigError: the one asked for cannot run here; all reasons, and what to change, in one line.
    """
    check_name(wanted)
    if wanted in ("sdpa", "eager"):
        return Backend(wanted)
    if wanted == "auto":
        if device.type != "cuda":
            return Backend("sdpa", f"chosen by auto: flash-attn needs a GPU, this is {device.type}")
        against: list[str] = []
        for name, package in FLASH.items():
            kernel, reasons = _look(package, device, dtype, head_dim)
            if kernel is not None:
                return Backend(name, "; ".join(["chosen by auto", *against]), kernel)
            against.append(f"not {name}, for {' and '.join(reasons)}")
        return Backend("sdpa", "; ".join(["chosen by auto", *against]))
    kernel, reasons = _look(FLASH[wanted], device, dtype, head_dim)
    if kernel is None:
        raise ConfigError(
            f"`model.attention` is {wanted}, but {' and '.join(reasons)}; model.attention=auto takes what runs here"
        )
    return Backend(wanted, kernel=kernel)


def _look(
    package: FlashPackage, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[Callable[..., object] | None, list[str]]:
    """The kernel, or every reason against it."""
    reasons = []
    if device.type != "cuda":
        reasons.append(f"there is no GPU (the device is {device.type})")
    else:
        found = torch.cuda.get_device_capability(device)
        if not package.runs_on(found):
            number = ".".join(map(str, found))
            reasons.append(f"the GPU's compute capability is {number} and it is made for {package.architecture}")
        if dtype not in HALF_TYPES:
            name = str(dtype).removeprefix("torch.")
            reasons.append(f"compute is {name}, which it does not know (model.dtype=bf16)")
    if head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_STEP:
        reasons.append(f"the model's head_dim is {head_dim}, not a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}")
    try:
        kernel = _load(package)
    except _NoKernel as error:
        return None, [*reasons, str(error)]
    return (None if reasons else kernel), reasons


class _NoKernel(Exception):
    """Not installed, or installed and of no use; the message is a reason."""


def _load(package: FlashPackage) -> Callable[..., object]:
    try:
        kernel: Callable[..., object] = importlib.import_module(package.module).flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if error.name == package.module:
            raise _NoKernel(f"{package.title} is not installed ({package.install})") from error
        raise _NoKernel(_broken(package, error)) from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # another torch's symbols, a missing library
        raise _NoKernel(_broken(package, error)) from error
    return kernel


def _broken(package: FlashPackage, error: Exception) -> str:
    cause = " ".join(str(error).split())
    return (
        f"the installed {package.title} cannot be used with torch {torch.__version__}: {type(error).__name__}: {cause} "
        f"(build it again for this torch: pip uninstall {package.title.replace(' ', '-')}, then {package.install})"
    )
