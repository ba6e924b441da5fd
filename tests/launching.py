"""Whole runs through the real launchers, as a person would start them."""

import socket
import subprocess
import sys

from conftest import REPOSITORY, environment

from phi3v_dist.observe.tracker import read_metrics

TIMEOUT_S = 240
TORCHRUN_2 = ["torchrun", "--nproc_per_node", "2", "--master_port"]


def launcher(name: str, port: int) -> list[str]:
    return {
        "single": [sys.executable],
        "torchrun": [*TORCHRUN_2, str(port)],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(port)],
    }[name]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(name: str, config, *overrides: str) -> list[str]:
    return [*launcher(name, free_port()), "launch/train.py", "--config", str(config), *overrides]


def launch(name: str, config, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, config, *overrides), cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip


def losses(folder) -> dict[int, float]:
    return {int(row["train/step"]): row["train/loss"] for row in read_metrics(folder) if "train/loss" in row}
