"""All of ds_configs/ train the same model, and a checkpoint of one goes on under another: real ZeRO-3, gloo ranks."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

from phi3v_dist.attempt.build_cache import is_built

RANKS = Path(__file__).parent / "offload_ranks.py"
DISK_REASON = "DeepSpeed's async_io is not built here; see ds_configs/README.md"
TOLERANCE = 2e-6  # relative; measured on 2 CPU cores: 0 for hpZ, 1e-7 for a step on the host
BUILT_WITH = {  # file → what DeepSpeed itself must say of the engine
    "zero3": {},
    "zero3_lean": {},
    "zero3_hpz": {"hpz": 2},
    "zero3_offload": {"optimizer": True, "fused": True},
    "zero3_hpz_offload": {"hpz": 2, "optimizer": True, "fused": True},
    "zero3_offload_all": {"optimizer": True, "fused": True, "weights": True},
    "zero3_nvme": {"optimizer": True, "fused": True, "disk": True},
}
SHORT = ["2:train:zero3", "2:train:zero3_offload_all", "2:resume:zero3_offload_all:zero3_hpz"]


def run(folder: Path, trials: list[str], timeout_s: int) -> Path:
    command = [sys.executable, str(RANKS), str(folder), *trials]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def notes(folder: Path, trial: str) -> list[dict]:
    return json.loads((folder / f"{trial}.json").read_text())


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("short"), SHORT, 200)


def assert_trains_as_zero3(folder: Path, file: str) -> None:
    expected, seen = notes(folder, "2:train:zero3")[0], notes(folder, f"2:train:{file}")
    built_with = {"optimizer": False, "disk": False, "weights": False, "hpz": 1, "fused": False}
    for rank in seen:
        assert rank["built with"] == built_with | BUILT_WITH[file]
        skipped = rank["losses"].pop(1)
        assert skipped == ["its gradient is not finite, although its loss is", True], "nothing may change then"
        assert rank["was busy"], "the save must still have had everything to write"
        assert rank["written as it was"], "steps after a save began changed what it wrote"
    for step, (here, there) in enumerate(zip(seen[0]["losses"], without_skipped(expected), strict=True)):
        assert here == pytest.approx(there, rel=TOLERANCE), step
    assert seen[0]["evaluated"] == pytest.approx(expected["evaluated"], rel=TOLERANCE)


def without_skipped(rank: dict) -> list:
    return [seen for seen in rank["losses"] if not isinstance(seen[0], str)]


def assert_goes_on(folder: Path, world_size: int, source: str, file: str) -> None:
    saved, resumed = notes(folder, f"2:train:{source}"), notes(folder, f"{world_size}:resume:{source}:{file}")
    expected = saved[0]["losses"][-10:]
    for step, (here, there) in enumerate(zip(resumed[0]["losses"], expected, strict=True)):
        assert here == pytest.approx(there, rel=TOLERANCE), step
    assert resumed[0]["rolled back"] == resumed[0]["losses"][:2]
    if world_size == 2:
        assert [rank["loaded"] for rank in resumed] == [rank["saved"] for rank in saved], "every bit of every state"
        if source == file:
            assert resumed[0]["losses"] == expected
            assert [rank["end"] for rank in resumed] == [rank["end"] for rank in saved]
    assert resumed[0]["evaluated"] == pytest.approx(saved[0]["evaluated"], rel=TOLERANCE)


@pytest.mark.supports("zero3", "zero3_offload_all", on="2 ranks")
def test_weights_and_states_on_the_host_give_the_same_losses_skip_the_same_step_and_save_beside_training(short):
    assert_trains_as_zero3(short, "zero3")
    assert_trains_as_zero3(short, "zero3_offload_all")


@pytest.mark.supports("zero3_hpz", "resume json", on="2 ranks")
def test_a_checkpoint_from_the_host_goes_on_on_the_device_with_copies_in_each_node(short):
    assert_goes_on(short, 2, "zero3_offload_all", "zero3_hpz")


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """Every file; each checkpoint under the next file, and some at one and four ranks, two to a node."""
    files = [file for file in BUILT_WITH if file != "zero3_nvme"]
    trials = [f"2:train:{file}" for file in files] + [f"2:resume:{file}:{file}" for file in files]
    trials += [f"2:resume:{source}:{file}" for source, file in ring(files)]
    trials += [f"{world_size}:resume:{source}:{file}" for world_size, source, file in RESHARDED]
    return run(tmp_path_factory.mktemp("long"), trials, 1800)


def ring(files: list[str]) -> list[tuple[str, str]]:
    return [*itertools.pairwise(files), (files[-1], files[0])]


RESHARDED = [
    (1, "zero3_hpz", "zero3_offload"),
    (4, "zero3_offload", "zero3_hpz"),
    (4, "zero3_offload_all", "zero3_hpz_offload"),
    (4, "zero3_hpz", "zero3_offload_all"),
]


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.supports(*(file for file in BUILT_WITH if file != "zero3_nvme"), "resume json", on="2 ranks")
@pytest.mark.supports("zero3_hpz", "zero3_hpz_offload", "zero3_offload_all", "resume json", on="more ranks")
def test_every_file_trains_resumes_and_passes_its_checkpoint_on(long):
    files = [file for file in BUILT_WITH if file != "zero3_nvme"]
    for file in files:
        assert_trains_as_zero3(long, file)
        assert_goes_on(long, 2, file, file)
    for source, file in ring(files):
        assert_goes_on(long, 2, source, file)
    for trial in RESHARDED:
        assert_goes_on(long, *trial)


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.supports("zero3_nvme", on="2 ranks")
def test_states_on_a_disk_train_resume_and_pass_their_checkpoint_on(tmp_path):
    if not is_built("async_io"):
        pytest.skip(DISK_REASON)
    passed = [("zero3_nvme", "zero3_nvme"), ("zero3_nvme", "zero3_offload"), ("zero3", "zero3_nvme")]
    trials = ["2:train:zero3", "2:train:zero3_nvme", *(f"2:resume:{source}:{file}" for source, file in passed)]
    run(tmp_path, [*trials, "1:resume:zero3_nvme:zero3"], 600)
    assert_trains_as_zero3(tmp_path, "zero3_nvme")
    for source, file in passed:
        assert_goes_on(tmp_path, 2, source, file)
    assert_goes_on(tmp_path, 1, "zero3_nvme", "zero3")
