"""Checkpoints of real ZeRO-3 engines, written and read by groups of 1, 2 and 3 processes in checkpoint_ranks.py."""

import itertools
import json
import logging
import os
import pickletools
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from phi3v_dist import versions
from phi3v_dist.errors import CheckpointError
from phi3v_dist.parallel import partitions
from phi3v_dist.parallel.fingerprint import fingerprint
from phi3v_dist.survive import random_state, rank_files
from phi3v_dist.survive.checkpoint import Checkpoints, read_tensors
from phi3v_dist.survive.manifest import read_manifest, write_manifest

RANKS = Path(__file__).parent / "checkpoint_ranks.py"
STEP = "step-00000003"
both_dtypes = pytest.mark.parametrize("dtype", ["fp32", "bf16"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folder with the checkpoints and notes of every group of ranks."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(RANKS.parents[2])}
    command = [sys.executable, str(RANKS), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def notes(runs: Path, group: str) -> dict:
    return json.loads((runs / f"{group}.json").read_text())


@pytest.fixture
def two_checkpoints(runs, tmp_path) -> Path:
    """Steps 3 and 6 of a run, to be damaged."""
    for name in (STEP, "step-00000006"):
        shutil.copytree(runs / "train-2" / "fp32" / STEP, tmp_path / name)
    return tmp_path


@both_dtypes
@pytest.mark.supports("resume", "bf16", on="2 ranks")
def test_resume_in_new_processes_equals_the_uninterrupted_run_bit_for_bit(runs, dtype):
    trained, resumed = notes(runs, "train-2"), notes(runs, "resumed-2")
    assert resumed[f"{dtype} continued"] == trained[f"{dtype} uninterrupted"][1]
    assert resumed[f"{dtype} end"] == trained[f"{dtype} end"]
    assert resumed[f"{dtype} position"]


@both_dtypes
def test_saving_does_not_change_the_run(runs, dtype):
    trained = notes(runs, "train-2")
    assert trained[f"{dtype} with a save"] == trained[f"{dtype} uninterrupted"]


@both_dtypes
def test_a_save_beside_training_holds_the_step_it_was_begun_at_bit_for_bit(runs, dtype):
    seen = notes(runs, "train-2")[f"{dtype} beside a save"]
    assert seen["was busy"] == [True, True], "the writer must still have had everything to write"
    assert seen["losses"] == notes(runs, "train-2")[f"{dtype} uninterrupted"][1]
    at_once, beside = (runs / "train-2" / name / STEP for name in (dtype, f"{dtype} beside"))
    files = sorted(path.name for path in at_once.iterdir())
    for name in files:
        assert (beside / name).read_bytes() == (at_once / name).read_bytes(), name
    size_bytes = sum((at_once / name).stat().st_size for name in files if name != "manifest.json")
    assert seen["saved"] == [STEP, 3, size_bytes]


@pytest.mark.parametrize("when", ["fp32 rolled back", "bf16 rolled back", "bf16 rolled back inside a window"])
def test_a_live_engine_rolled_back_repeats_its_losses(runs, when):
    trained = notes(runs, "train-2")
    assert trained[when] == trained[f"{when.split()[0]} uninterrupted"][1]


@both_dtypes
@pytest.mark.parametrize("group", ["resumed-2", "reshard-1", "reshard-3", "reshard-2"])
@pytest.mark.supports("resume elsewhere", on="more ranks")
def test_every_master_moment_and_weight_is_equal_at_every_world_size(runs, dtype, group):
    assert notes(runs, group)[f"{dtype} loaded"] == notes(runs, "train-2")[f"{dtype} saved"]


@both_dtypes
@pytest.mark.parametrize("group", ["reshard-1", "reshard-3"])
def test_losses_at_another_world_size_differ_by_rounding_only(runs, dtype, group):
    tolerance = {"fp32": 1e-6, "bf16": 1e-3}[dtype]  # measured on 2 CPU cores: 0 and 1.7e-4
    name = f"{dtype} step losses without dropout"
    expected = notes(runs, "resumed-2")[name]
    np.testing.assert_allclose(notes(runs, group)[name], expected, rtol=0, atol=tolerance)


def test_generators_are_restored_at_the_same_world_size_and_reseeded_for_each_rank_at_another(runs):
    at = {group: notes(runs, group)["fp32 draws"] for group in ("resumed-2", "reshard-3", "reshard-2")}
    draws = [tuple(rank) for ranks in at.values() for rank in ranks]
    assert len(set(draws)) == len(draws) - 2, "ranks 0 and 1 of two reseeded groups are alike, all others differ"
    assert at["reshard-3"][:2] == at["reshard-2"]


def test_reseeding_repeats_itself_and_depends_on_seed_step_and_rank():
    def draw(*key):
        random_state.reseed(*key)
        return random.random(), np.random.rand(), float(torch.rand(1))

    assert draw(7, 3, 0) == draw(7, 3, 0)
    assert len({draw(7, 3, 0), draw(7, 3, 1), draw(7, 4, 0), draw(8, 3, 0)}) == 4


def test_captured_generators_continue_after_a_passage_through_json():
    tensors, numbers = random_state.capture()
    expected = [random.gauss(0, 1), np.random.randn(), float(torch.rand(1))]
    random_state.restore(tensors, json.loads(json.dumps(numbers)))
    assert [random.gauss(0, 1), np.random.randn(), float(torch.rand(1))] == expected


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"])
def test_one_flipped_bit_passes_a_checkpoint_over_and_names_it(two_checkpoints, caplog, file):
    damaged = two_checkpoints / "step-00000006" / file
    content = bytearray(damaged.read_bytes())
    content[content.rindex(b"7" if file == "manifest.json" else content[-40:])] ^= 1
    damaged.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(two_checkpoints, keep=1).newest() == two_checkpoints / STEP
    assert "step-00000006" in caplog.text and file in caplog.text
    with pytest.raises(CheckpointError, match=file):
        read_tensors(two_checkpoints / "step-00000006")


def test_a_missing_file_or_manifest_passes_a_checkpoint_over(two_checkpoints, caplog):
    (two_checkpoints / "step-00000006" / "manifest.json").unlink()
    assert Checkpoints(two_checkpoints, keep=1).newest() == two_checkpoints / STEP
    (two_checkpoints / STEP / "rank-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        Checkpoints(two_checkpoints, keep=1).newest()
    assert "step-00000006/manifest.json is missing" in str(caught.value)
    assert "rank-00001.safetensors: missing" in str(caught.value) and "start at step 0" in str(caught.value)


def test_a_save_that_never_finished_is_no_checkpoint(two_checkpoints):
    (two_checkpoints / "step-00000006").rename(two_checkpoints / ".tmp-step-00000006-0123abcd")
    assert Checkpoints(two_checkpoints, keep=1).newest() == two_checkpoints / STEP
    assert Checkpoints(two_checkpoints / "none yet", keep=1).newest() is None


def test_a_checkpoint_interrupted_while_being_replaced_is_still_found(two_checkpoints):
    replaced = two_checkpoints / "step-00000006.replaced"
    (two_checkpoints / "step-00000006").rename(replaced)
    assert Checkpoints(two_checkpoints, keep=1).newest() == replaced


def test_a_format_of_the_future_is_refused_with_its_own_advice(two_checkpoints):
    newest = two_checkpoints / "step-00000006"
    write_manifest(newest, read_manifest(newest) | {"version": 3, "upgrade": "run the converter"})
    with pytest.raises(CheckpointError, match="format version 3.*run the converter"):
        Checkpoints(two_checkpoints, keep=1).newest()


def test_a_manifest_cannot_name_files_elsewhere(two_checkpoints):
    newest = two_checkpoints / "step-00000006"
    manifest = read_manifest(newest)
    entry = manifest["files"].pop("rank-00001.safetensors")
    write_manifest(newest, manifest | {"files": manifest["files"] | {f"../{STEP}/rank-00001.safetensors": entry}})
    assert Checkpoints(two_checkpoints, keep=1).newest() == two_checkpoints / STEP


@pytest.mark.parametrize("moment", ["in window, 1 done", "in window, 2 done", "in window, before the step"])
def test_saving_inside_an_accumulation_window_is_refused(runs, moment):
    reports = notes(runs, "train-2")[moment]
    assert len(reports) == 2 and all("gradients of the next step are already accumulated" in text for text in reports)


def test_another_model_is_refused_with_every_difference_at_once(runs):
    reports = notes(runs, "train-2")["other model"]
    assert reports[0] == reports[1]
    lines = {line.split(":")[0].removeprefix("  - "): line for line in reports[0].splitlines()[2:]}
    # frozen.bias: the checkpoint is of a run in bf16, this model computes in fp32
    different = {"embed.weight", "frozen.weight", "frozen.bias", "extra.weight", "extra.bias", "norm.bias", "offset"}
    assert lines.keys() == different
    assert "shape (37, 13) in the checkpoint, (37, 17) in the model" in lines["embed.weight"]


def test_state_that_is_not_json_is_refused_before_anything_is_written(runs):
    assert all("not JSON serializable" in text for text in notes(runs, "train-2")["not JSON"])


def test_pruning_keeps_the_newest_whole_checkpoints(runs):
    seen = notes(runs, "train-2")
    assert seen["pruned"] == ["step-00000002", STEP]
    # Step 3 was cut short after it was saved: step 2 stays in its place.
    assert seen["pruned beside a damaged one"] == ["step-00000002", STEP, "step-00000004"]


def test_only_a_writer_sweeps_what_killed_saves_left(runs):
    seen = notes(runs, "train-2")
    assert seen["a reader leaves"] == [".tmp-step-00000009-killed"]
    assert not [name for name in seen["pruned"] if name.startswith(".tmp")]


def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_leaves_the_older_checkpoints(runs):
    seen = notes(runs, "train-2")
    for report in seen["disk full"]:
        assert "rank 1 on " in report and "step-00000005" in report and "File too large" in report
    assert seen["after disk full"] == seen["pruned beside a damaged one"]
    assert seen["newest after disk full"] == "step-00000004"


def test_saving_a_step_again_replaces_it(runs):
    seen = notes(runs, "train-2")
    assert seen["saved again"] == seen["after disk full"]
    assert read_manifest(runs / "train-2" / "pruned" / "step-00000004")["attempt"] == 3


def test_a_parameter_frozen_after_the_start_keeps_its_optimizer_state(runs):
    assert notes(runs, "train-2")["role of a parameter frozen later"] == "trained"


@pytest.mark.parametrize("group", ["train-2", "reshard-1", "reshard-3"])
def test_tensors_are_read_whole_without_an_engine(runs, group):
    reader = read_tensors(runs / group / "bf16" / STEP)
    assert reader.shapes["embed.weight"] == (37, 13) and reader.dtypes["embed.weight"] == "float32"
    assert reader.get("embed.weight").dtype == torch.float32
    assert reader.aliases == {"wte.weight": "embed.weight"} and "wte.weight" not in reader.names
    assert torch.equal(reader.get("wte.weight"), reader.get("embed.weight"))
    saved = notes(runs, "train-2")["bf16 saved"]
    stored = [name for name in reader.names if reader.specs[name].role != "frozen"]
    assert set(reader.names) - set(stored) == {"frozen.weight", "frozen.bias"}
    for name in stored:
        for state in reader.specs[name].dtypes:
            elements = reader.read(name, state, 0, reader.specs[name].numel).view(torch.uint8).numpy()
            recorded = {"buffer": f"buffer/{name}", "trained": f"{state}/{name}"}
            assert xxhash.xxh3_128_hexdigest(elements) == saved[recorded[reader.specs[name].role]]


def test_frozen_weights_are_not_stored_and_must_be_what_they_were(runs):
    files = [path.read_bytes() for path in (runs / "train-2" / "fp32" / STEP).glob("rank-*")]
    assert all(b"up.weight" in content and b"frozen.weight" not in content for content in files)
    fingerprints = {
        read_manifest(runs / group / "fp32" / STEP)["tensors"]["frozen.weight"]["fingerprint"]
        for group in ("train-2", "reshard-1", "reshard-3")
    }
    assert len(fingerprints) == 1, "the same however many ranks held it"
    for report in notes(runs, "train-2")["other frozen weights"]:
        assert "frozen.weight: frozen, and not the weights it was saved with" in report
        assert f"{fingerprints}"[2:-2] in report
        assert "`model.path`, `model.init_from` or `model.dtype` changed" in report


def test_an_engine_without_an_optimizer_saves_its_weights_and_cannot_be_continued(runs):
    reader = read_tensors(runs / "train-2" / "weights-only" / STEP)
    seen = notes(runs, "train-2")
    stored = {name: reader.stored(name) for name in reader.names if reader.specs[name].role == "trained"}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    found = {name: xxhash.xxh3_128_hexdigest(t.view(-1).view(torch.uint8).numpy()) for name, t in stored.items()}
    assert found == seen["weights only"] and "frozen.weight" in found
    assert all("has no optimizer, so there is nothing to continue" in report for report in seen["weights only loaded"])


@given(st.integers(0, 40), st.lists(st.integers(0, 40), max_size=3))
def test_fingerprints_of_pieces_add_up_and_any_change_shows(num_elements, cuts):
    whole = torch.arange(num_elements, dtype=torch.float32).sin()
    borders = [0, *sorted(min(cut, num_elements) for cut in cuts), num_elements]
    pieces = [fingerprint(whole[a:b], a) for a, b in itertools.pairwise(borders)]
    assert torch.stack(pieces).sum() == fingerprint(whole)
    if num_elements > 1:
        swapped = whole[[1, 0, *range(2, num_elements)]]
        assert fingerprint(swapped) != fingerprint(whole)


def test_the_documented_layout_is_enough_to_read_a_checkpoint(runs):
    """docs/checkpoint-format.md, followed with json and numpy alone."""
    folder = runs / "reshard-3" / "fp32" / STEP
    manifest = json.loads((folder / "manifest.json").read_text())
    shape = manifest["tensors"]["embed.weight"]["shape"]
    embedding = np.full(np.prod(shape), np.nan, dtype="<f4")
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert (len(content), xxhash.xxh3_128_hexdigest(content)) == (entry["size_bytes"], entry["xxh3_128"])
        header_bytes = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_bytes])
        start, length = json.loads(header["__metadata__"]["pieces"])["embed.weight"]
        begin, end = header["weight/embed.weight"]["data_offsets"]
        piece = content[8 + header_bytes + begin : 8 + header_bytes + end]
        embedding[start : start + length] = np.frombuffer(piece, dtype="<f4")
    assert np.array_equal(embedding.reshape(shape), read_tensors(folder).get("embed.weight").numpy())


def test_a_rank_that_owns_nothing_of_a_tensor_still_has_an_empty_piece(runs):
    header = (runs / "reshard-3" / "fp32" / STEP / "rank-00002.safetensors").read_bytes()[:20_000]
    assert b'"weight/temperature": {"dtype": "F32", "shape": [0]' in header


def test_nothing_in_a_checkpoint_is_a_pickle(runs):
    files = [path for path in runs.glob("*/fp32/step-*/*")]
    assert len(files) == 2 + 1 + 3 + 2 + 2 + 5
    for path in files:
        assert path.suffix in (".json", ".safetensors")
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))


def test_a_disk_that_returns_other_bytes_than_were_written_fails_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_files, "hash_file", lambda path, on_block: "other bytes")
    with pytest.raises(OSError, match="other bytes than were written"):
        rank_files.write_rank_file(tmp_path / "rank-00000.safetensors", {"weight/a": torch.ones(3)}, {})


def test_an_untested_deepspeed_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "0.20.0")
    with pytest.raises(CheckpointError, match="deepspeed 0.20.0 is installed, phi3v-dist needs deepspeed==0.19.8"):
        partitions.Partitions(engine=None)
