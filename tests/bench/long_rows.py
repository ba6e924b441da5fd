"""Long rows: memory and time of a forward and backward pass, beside transformers' stock path with the same weights.

What comes in: nothing; the model is hidden 256, 4 layers, the official vocabulary. What goes out: `Figure`s. Every
measurement runs in processes of its own (long_row_process.py), one thread each, fp32.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from figures import Figure

from phi3v_dist.memory import MIB

PROCESS = Path(__file__).parent / "long_row_process.py"
GIB = 2**30
LIMIT_BYTES = 3 * GIB // 2  # above weights, gradients and optimizer
STEP_TOKENS = 512
SAME_LOSS = 1e-5  # relative: sums over 32,768 tokens in fp32


class Measured(NamedTuple):
    """Of the process with the highest peak. loss: sum over all processes."""

    peak_bytes: int
    seconds: float
    loss: float


def measure(kind: str, num_tokens: int, num_ranks: int = 1) -> Measured:
    """Run `num_ranks` processes that share a row of so many tokens. Raises CalledProcessError with what they wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    fixed |= {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
    processes = []
    for rank in range(num_ranks):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_PORT": port}
        ranks |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, str(PROCESS), kind, str(num_tokens)]
        env = os.environ | fixed | (ranks if num_ranks > 1 else {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=env, text=True, **pipes))
    found = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=3600)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, stdout, stderr)
        found.append(json.loads(stdout.splitlines()[-1]))
    peaks, seconds, losses = zip(*((one["peak_bytes"], one["seconds"], one["loss"]) for one in found), strict=True)
    return Measured(max(peaks), max(seconds), sum(losses))


def longest(kind: str, num_ranks: int = 1) -> tuple[int, Measured]:
    """The most tokens whose peak is within the limit: peaks grow linearly, so two tell where to look, and the answer is
    measured."""
    few, more = (STEP_TOKENS * 4 * num_ranks, STEP_TOKENS * 8 * num_ranks)
    low, high = measure(kind, few, num_ranks).peak_bytes, measure(kind, more, num_ranks).peak_bytes
    per_token = (high - low) / (more - few)
    tokens = int((LIMIT_BYTES - low) / per_token + few)
    while True:
        tokens = tokens // STEP_TOKENS * STEP_TOKENS
        found = measure(kind, tokens, num_ranks)
        if found.peak_bytes <= LIMIT_BYTES:
            return tokens, found
        tokens = min(tokens - STEP_TOKENS, int(tokens * LIMIT_BYTES / found.peak_bytes))


def figures(folder: Path) -> list[Figure]:
    """Head and loss; three lengths; the longest rows."""
    found = [_head()]
    for num_tokens in (4096, 16384, 32768):
        found += _lengths(num_tokens)
    (stock, _), (ours, alone), (shared, each) = longest("stock"), longest("ours"), longest("ours", num_ranks=2)
    within = f"within {LIMIT_BYTES / GIB:.1f} GiB above weights and gradients"
    detail = f"{ours:,} against {stock:,} tokens {within}; {alone.peak_bytes / GIB:.2f} GiB, {alone.seconds:.0f} s"
    found.append(Figure("longest row, one process", f"{ours / stock:.1f} x", "≥ 8 x stock", detail))
    detail = f"{shared:,} against {ours:,} tokens {within} each; {each.peak_bytes / GIB:.2f} GiB, {each.seconds:.0f} s"
    found.append(Figure("longest row, two share it", f"{shared / ours:.2f} x", "≥ 1.7 x ours alone", detail))
    return found


def _head() -> Figure:
    stock, ours = measure("head-stock", 32768), measure("head-ours", 32768)
    _require_equal(stock, ours)
    peaks, times = ours.peak_bytes / stock.peak_bytes, ours.seconds / stock.seconds
    detail = f"{ours.peak_bytes / GIB:.2f} against {stock.peak_bytes / GIB:.2f} GiB, "
    detail += f"{ours.seconds:.0f} against {stock.seconds:.0f} s"
    return Figure(
        "head and loss, 32,768 tokens", f"{peaks:.3f} x memory, {times:.2f} x time", "≤ 0.05 x, ≤ 1.5 x", detail
    )


def _lengths(num_tokens: int) -> list[Figure]:
    stock, ours, shared = measure("stock", num_tokens), measure("ours", num_tokens), measure("ours", num_tokens, 2)
    _require_equal(stock, ours)
    _require_equal(stock, shared)
    rows = []
    for name, one in (("ours", ours), ("ours, two share it", shared)):
        ratios = f"{one.peak_bytes / stock.peak_bytes:.3f} x memory, {one.seconds / stock.seconds:.2f} x time"
        detail = f"{one.peak_bytes / GIB:.2f} against {stock.peak_bytes / GIB:.2f} GiB, "
        detail += f"{one.seconds:.0f} against {stock.seconds:.0f} s"
        rows.append(Figure(f"model, {num_tokens:,} tokens, {name}", ratios, "", detail))
    return rows


def _require_equal(stock: Measured, ours: Measured) -> None:
    """It must be the same computation, or the comparison is of no worth."""
    assert abs(ours.loss - stock.loss) <= SAME_LOSS * stock.loss, (stock, ours)
