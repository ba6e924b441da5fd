"""Whole runs through the real launchers, as a person would start them."""

import os
import secrets
import socket
import subprocess
import sys

from conftest import REPOSITORY, environment

from phi3v_dist.observe.tracker import read_metrics

TIMEOUT_S = 240
PORTS = range(12_000, 32_000)  # below those of Linux for outgoing connections


def launcher(name: str, port: int, ranks: int) -> list[str]:
    return {
        "single": [sys.executable],
        "torchrun": ["torchrun", "--nproc_per_node", str(ranks), "--master_port", str(port)],
        "deepspeed": ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(port)],
    }[name]


def free_port() -> int:
    """None of those that the kernel gives to whoever asks for any, nor one that another of pytest's workers is given:
    until a launcher has started and opened it, nobody else may take it."""
    worker, num_workers = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    ports = range(PORTS.start + int(worker.removeprefix("gw")), PORTS.stop, int(num_workers))
    while True:
        port = ports[secrets.randbelow(len(ports))]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


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
