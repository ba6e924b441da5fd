"""Fast copies on each node's own disk: where saves go, which copy a resume takes, and why it passes one over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "local_ranks.py"
COPY, SHARED = "step-00000006", "step-00000004"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folder with the notes of every group of ranks."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(RANKS.parents[2])}
    command = [sys.executable, str(RANKS), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def notes(runs: Path, group: str) -> dict:
    return json.loads((runs / f"{group}.json").read_text())


def test_the_first_save_and_every_third_go_to_the_run_folder_and_each_node_keeps_its_newest_copy(runs):
    seen = notes(runs, "saved")
    assert seen["places"] == ["shared", "local", "local", "shared", "local", "local"]
    assert seen["names"] == [[[SHARED, "step-00000001"], [COPY]]] * 2


def test_a_node_holds_the_files_of_its_own_ranks_and_a_manifest_of_all(runs):
    for node in range(2):
        copy = runs / "saved" / f"node-{node}" / "checkpoints" / COPY
        assert sorted(path.name for path in copy.iterdir()) == ["manifest.json", f"rank-0000{node}.safetensors"]
        assert list(json.loads((copy / "manifest.json").read_text())["files"]) == [
            "rank-00000.safetensors", "rank-00001.safetensors",
        ]  # fmt: skip


@pytest.mark.supports("checkpoint.local", on="more ranks")
def test_a_newer_copy_on_the_nodes_is_resumed_bit_for_bit_with_buffers_that_only_rank_0_has(runs):
    trained, resumed = notes(runs, "trained"), notes(runs, "resumed")
    local = [f"node-{rank}/checkpoints/{COPY}" for rank in range(2)]
    assert trained["paths"] == [["shared/step-00000003", path] for path in local]
    assert resumed["path"] == local and resumed["position"] == 6
    assert resumed["digests"] == trained["digests"] and "buffer/offset" in trained["digests"]
    assert resumed["losses"] == trained["losses"]


def test_a_finished_run_has_its_last_step_in_the_run_folder_and_leaves_nothing_on_the_nodes(runs):
    resumed = notes(runs, "resumed")
    assert resumed["last is shared"] and not resumed["left"]
    assert not (runs / "on one disk" / "node-both").exists()


def test_whole_copies_are_taken_and_nothing_is_said(runs):
    assert notes(runs, "whole") == {"newest": [["node-0", COPY], ["node-1", COPY]], "said": [[], []]}


@pytest.mark.fault(22)
@pytest.mark.fault(36)
@pytest.mark.fault(38)
@pytest.mark.fault(39)
@pytest.mark.parametrize(
    "group, why",
    [
        ("damaged", "rank 1 on {host}: rank-00001.safetensors: its bytes changed"),
        ("missing", "rank 1 on {host} has none where it runs now"),
        ("moved", "rank 0 on {host}: rank-00000.safetensors: missing"),
        ("three", "2 ranks saved it on their nodes, and now there are 3"),
        ("left behind", "attempt 1 made it, but attempt 2 went on from step 4"),
    ],
)
def test_a_copy_that_does_not_count_on_any_node_is_named_and_the_run_folder_is_resumed(runs, group, why):
    seen = notes(runs, group)
    assert seen["newest"] == [[group, SHARED]] * (3 if group == "three" else 2)
    [said] = seen["said"][0]
    assert f"{COPY} does not count: " in said and why.format(host=os.uname().nodename) in said
    assert not any(seen["said"][1:]), "rank 0 speaks for all"


@pytest.mark.fault(40)
def test_copies_that_do_not_count_are_never_a_reason_to_begin_again(runs):
    for said in notes(runs, "only copies")["newest"]:
        assert "none of the 1 checkpoints" in said and "does not count" in said


@pytest.mark.fault(5)
@pytest.mark.fault(6)
@pytest.mark.fault(45)
@pytest.mark.parametrize("phase", ["write", "commit"])
def test_a_kill_while_copies_are_saved_leaves_those_before(runs, phase):
    seen = notes(runs, f"after a kill in {phase}")
    assert seen["newest"] == [["node-0", "step-00000002"], ["node-1", "step-00000002"]]
    assert [len(said) for said in seen["said"]] == [phase == "commit", 0]


@pytest.mark.fault(33)
def test_a_full_disk_of_one_node_fails_that_save_and_the_next_goes_to_the_run_folder(runs):
    seen = notes(runs, "full")
    assert seen["places"][:2] + seen["places"][3:] == ["shared", "local", "shared", "local", "local"]
    assert "cannot save step 3" in seen["places"][2] and "rank 1 on " in seen["places"][2]


@pytest.mark.fault(35)
def test_a_node_that_cannot_keep_copies_costs_only_their_speed(runs):
    assert notes(runs, "not writable")["places"] == ["shared"] * 3


def test_ranks_that_see_one_folder_write_one_copy_together(runs):
    seen = notes(runs, "on one disk")
    assert seen["groups"] == [[0, 1]] and seen["step"] == 2
    assert seen["files"] == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
