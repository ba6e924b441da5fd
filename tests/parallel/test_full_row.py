"""A row of the model's whole context really trains, shared by two ranks; a shorter one in `make test`.

Measured (docs/results.md): two cores, 131,072 tokens, hidden 64, 2 layers.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

RANKS = Path(__file__).parent / "full_row_ranks.py"
GIB = 2**30


def train_twice(folder: Path, num_tokens: int, num_pictures: int, timeout_s: int) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
               "--master_port", port, str(RANKS), str(folder), str(num_tokens), str(num_pictures)]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def assert_learned(found: list[dict], num_tokens: int, num_pictures: int) -> None:
    for rank in found:
        first, second = rank["steps"]
        assert first["own_tokens"] == num_tokens // 2 and sum(first["documents"]) == num_tokens
        assert first["images"] == num_pictures and first["labels"] > num_tokens // 2
        assert second["loss"] < first["loss"] - 0.01
    assert found[0]["steps"][1]["loss"] == found[1]["steps"][1]["loss"]


@pytest.mark.slow
def test_a_row_far_beyond_the_original_length_trains(tmp_path):
    found = train_twice(tmp_path, 9000, 6, timeout_s=280)
    assert_learned(found, 9000, 6)
    assert found[0]["steps"][0]["documents"][0] > 4096


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.supports("rows of 131072", on="2 ranks")
def test_a_row_of_131072_tokens_with_44_pictures_trains(tmp_path):
    found = train_twice(tmp_path, 131072, 44, timeout_s=3500)
    assert_learned(found, 131072, 44)
    assert found[0]["steps"][0]["documents"][0] >= 100_000
    for number, rank in enumerate(found):
        seconds = [round(step["seconds"]) for step in rank["steps"]]
        losses = [round(step["loss"], 4) for step in rank["steps"]]
        print(f"rank {number}: losses {losses}, {seconds} s a step, peak {rank['peak_bytes'] / GIB:.2f} GiB, "
              f"{rank['before_bytes'] / GIB:.2f} before the first step")  # fmt: skip
