"""One node's arithmetic → which devices are wrong or slow, and which attention they get.

What comes in: a product of two matrices. What goes out: notes, and speeds to compare between nodes. Surprise: a broken
GPU often multiplies as fast as ever. Factors and sums here are small whole numbers, exact in bfloat16 in whatever order
they are added, so a single wrong bit shows.
"""

import time

import torch
from torch import Tensor

from phi3v_dist.cluster.checking import Notes, Place
from phi3v_dist.model import backends
from phi3v_dist.watch import faults

GPU_SIZE, CPU_SIZE = 8192, 1024  # rows and columns of the product
GPU_ROUNDS, CPU_ROUNDS = 50, 3
NONZERO_EVERY = 32  # keeps sums within ±256, which bfloat16 holds exactly


def flash_attention(place: Place, notes: Notes) -> None:
    """Whether `model.attention` will find its kernel. Raises ConfigError where it is asked for by name."""
    wanted = place.settings.model.attention
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and place.settings.model.dtype != "fp32" else torch.float32
    backend = backends.choose(wanted, device, dtype, head_dim=backends.HEAD_DIM_STEP)
    notes.detail = f"{backend.name} ({backend.why})" if backend.why == "asked for" else backend.name
    if wanted == "auto" and device.type == "cuda" and backend.kernel is None:
        notes.warn(f"attention runs without flash-attn: {backend.why}")


def arithmetic(notes: Notes) -> tuple[float, ...]:
    """TFLOP/s of each device; notes those whose product is wrong."""
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", index) for index in range(number)] or [torch.device("cpu")]
    left, right = factors(GPU_SIZE if number else CPU_SIZE)
    expected = left.sum(0).double() @ right.double()  # column sums of the product
    speeds = []
    for device in devices:
        product, speed = multiply(left, right, device)
        speeds.append(round(speed, 4))
        if not torch.equal(product.double().sum(0).cpu(), expected):
            what = f"GPU {device.index}" if device.type == "cuda" else "the CPU"
            notes.problem(f"{what} multiplies wrong: a product of known sums came out different; replace it")
    notes.detail = "exact"
    return tuple(speeds)


def multiply(left: Tensor, right: Tensor, device: torch.device) -> tuple[Tensor, float]:
    """The product of two square matrices, and TFLOP/s."""
    on_gpu = device.type == "cuda"
    dtype, rounds = (torch.bfloat16, GPU_ROUNDS) if on_gpu else (torch.float32, CPU_ROUNDS)
    left, right = left.to(device, dtype), right.to(device, dtype)
    product = left @ right  # the first one loads kernels
    _wait(device)
    began_s = time.perf_counter()
    for _ in range(rounds):
        torch.mm(left, right, out=product)
    _wait(device)
    seconds = time.perf_counter() - began_s
    if faults.fire("gemm", None) == "nan":
        product[0, 0] += 1
    return product, 2e-12 * len(left) ** 3 * rounds / seconds


def factors(size: int) -> tuple[Tensor, Tensor]:
    """Two square matrices of -1, 0 and 1, the first one mostly 0, on the CPU."""
    numbers = torch.arange(size, dtype=torch.int32)
    row, column = numbers[:, None], numbers[None, :]
    sign = 1 - 2 * ((3 * row + 5 * column) % 7 % 2)
    left = torch.where((row + column) % NONZERO_EVERY == 0, sign, 0).float()
    right = ((2 * row + 3 * column + row * column) % 3 - 1).float()
    return left, right


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
