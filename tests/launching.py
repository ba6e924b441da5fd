"""Whole runs through the real launchers, as a person would start them."""

import socket
import subprocess
import sys

from conftest import REPOSITORY, environment

from phi3v_dist.observe.tracker import read_metrics

TIMEOUT_S = 240


def launcher(name: str, port: int, ranks: int) -> list[str]:
    return {
        "single": [sys.executable],
        "torchrun": ["torchrun", "--nproc_per_node", str(ranks), "--master_port", str(port)],
        "deepspeed": ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(port)],
    }[name]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(name: str, config, *overrides: str, ranks: int = 2) -> list[str]:
    return [*launcher(name, free_port(), ranks), "launch/train.py", "--config", str(config), *overrides]


def launch(name: str, config, *overrides: str, ranks: int = 2, fault: str = "") -> subprocess.CompletedProcess[str]:
    """fault: what goes wrong in this attempt, as `PHI3V_FAULT` says it."""
    asked = {"PHI3V_FAULT": fault} if fault else {}
    return subprocess.run(
        command(name, config, *overrides, ranks=ranks), cwd=REPOSITORY, env=environment(**asked),
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip


def losses(folder) -> dict[int, float]:
    return {int(row["train/step"]): row["train/loss"] for row in read_metrics(folder) if "train/loss" in row}
