"""Whole preflights, a process for each node: good ones, and each way in which a node is bad."""

import dataclasses
import os
import resource
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from preflight_nodes import PATIENCE, place_of, preflight_of
from torch.distributed import TCPStore

from phi3v_dist.attempt import environment
from phi3v_dist.cluster import checking, devices, machine, network, preflight, ring, storage
from phi3v_dist.cluster.checking import Notes
from phi3v_dist.cluster.meeting import announce, invitation, meet
from phi3v_dist.cluster.report import path_of, read_report
from phi3v_dist.cluster.talk import Patience, Talk
from phi3v_dist.config import Settings


@pytest.fixture
def settings(settings_tree) -> Settings:
    return Settings.model_validate(settings_tree)


@pytest.fixture
def folder(settings):
    return settings.run.folder / "preflight"


def fault(text: str):
    """What a node's process does first, so that this goes wrong in it."""
    return lambda: os.environ.update(PHI3V_FAULT=text)


@pytest.mark.fault(20)
def test_a_node_with_another_version_is_left_out_and_the_others_are_fit(settings, folder, tmp_path):
    stub = tmp_path / "stub" / "transformers-0.0.1.dist-info"
    stub.mkdir(parents=True)
    (stub / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    found = preflight_of(settings, folder, {"n1": None, "n2": None, "n3": lambda: sys.path.insert(0, str(stub.parent))})
    assert found.good == ["n1", "n2"] and found.exit_code == 5
    (reason,) = found.bad["n3"]
    version = environment.versions(["transformers"])["transformers"]
    assert f"transformers is 0.0.1, but {version} on 2 of 3 nodes" in reason
    reports = [read_report(path_of(folder, host)) for host in ("n1", "n2", "n3")]
    assert all(report.is_complete and len(report.edges) == 2 and all(report.edges.values()) for report in reports)
    assert [check.detail for report in reports for check in report.checks if check.name == "sum"] == [
        "a sum over 3 nodes is right"
    ] * 3


@pytest.mark.fault(8, 24)
def test_wrong_numbers_a_death_in_the_probe_and_an_absent_node_are_told_apart_and_remembered(settings, folder):
    wrong = {"n1": fault("*:gemm:*:nan"), "n2": fault("*:network:1:kill9"), "n3": None, "n4": None}
    found = preflight_of(settings, folder, wrong, absent=1)
    assert found.good == ["n3", "n4"] and found.exit_code == 5 and not found.common
    assert "multiplies wrong" in found.bad["n1"][0] and len(found.bad["n1"]) == 1
    assert "fell silent after examining itself" in found.bad["n2"][0]
    assert "no report in time" in found.bad["absent0"][0]
    place = place_of(settings, "n1", folder)
    again = preflight.probe(preflight.examine(place, "7.1.1"), place, PATIENCE)
    (failure,) = again.earlier
    assert failure.token == "7.0.1" and "multiplies wrong" in failure.problems[0] and not again.problems


@pytest.mark.slow
def test_a_first_node_that_freezes_in_the_probe_costs_only_itself(settings, folder):
    wrong = {"n1": fault("*:network:0:stop"), "n2": None, "n3": None}
    found = preflight_of(settings, folder, wrong, stopped=["n1"])
    assert found.good == ["n2", "n3"] and "fell silent" in found.bad["n1"][0]
    assert any("n1 held it" in warning for warning in found.warnings)
    edges = {host: read_report(path_of(folder, host)).edges for host in ("n2", "n3")}
    assert edges["n2"]["n3"] > 0 < edges["n3"]["n2"], "the others met again without it"


def test_what_one_node_cannot_read_is_its_fault_and_what_none_can_read_is_no_ones(
    settings_tree, shards, tmp_path, monkeypatch
):
    monkeypatch.chdir(shards)
    settings_tree["data"]["train"] = [{"shards": "train-*.tar"}]
    settings_tree["data"]["validation"] = []
    settings = Settings.model_validate(settings_tree)
    folder = settings.run.folder / "preflight"
    unmounted = tmp_path / "unmounted"
    unmounted.mkdir()

    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))

    one = preflight_of(settings, folder, {"n1": few_files, "n2": lambda: os.chdir(unmounted), "n3": None})
    assert one.good == ["n3"] and one.exit_code == 5
    assert "shards: data: train-*.tar: no such shard" in one.bad["n2"][0]
    assert "at most 1,000 files may be open" in one.bad["n1"][0]
    monkeypatch.chdir(unmounted)
    none = preflight_of(settings, folder, {"n1": None, "n2": None}, token="7.0.2")
    assert none.good == ["n1", "n2"] and not none.bad and none.exit_code == 3
    assert none.common[0].check == "shards" and "all nodes have such a problem" in none.common[0].text


def test_nodes_are_waited_for_as_long_as_further_ones_come_and_a_later_one_is_fit(folder):
    patience = dataclasses.replace(PATIENCE, pause=2.0, come=30.0)
    meeting = announce(folder, "7.0.1", "n0")
    with ThreadPoolExecutor() as pool:
        opened = pool.submit(meet, meeting, "7.0.1", "n0", 4, patience)
        for host in ("n1", "n2"):  # both come later than a pause after the first node
            time.sleep(1.2)
            announce(folder, "7.0.1", host)
        store = opened.result(30)
    assert store is not None and invitation(meeting).come == ["n0", "n1", "n2"]
    result = Talk()
    network.talk(announce(folder, "7.0.1", "n3"), "7.0.1", "n3", 4, patience, result)
    assert not result.notes.problems and not result.edges
    assert "came too late for the network probe: 3 nodes had begun without it" in result.notes.warnings[0]


@pytest.mark.slow
def test_a_node_that_comes_after_the_others_met_is_fit(settings, folder):
    late = {"n0": None, "n1": None, "n2": lambda: time.sleep(PATIENCE.pause + 4)}
    found = preflight_of(settings, folder, late)
    assert not found.bad and [text for text in found.warnings if "n2: network: came too late" in text]


def test_the_waits_of_a_probe_grow_with_the_nodes_and_end_in_time():
    few, many = (Patience.of(count, True, pause=20.0, come=60.0, whole=1000.0) for count in (2, 400))
    assert many.edge > few.edge and many.reduce > 2 * few.reduce and many.join > 2 * few.join
    for whole in (5.0, 84.0):
        brief = Patience.of(400, True, pause=20.0, come=60.0, whole=whole)
        assert 2 * brief.join + 3 * brief.edge + 2 * brief.reduce < whole


def test_a_sum_that_does_not_end_in_time_is_a_warning_and_a_wrong_one_is_a_problem(monkeypatch):
    def late(*_):
        raise RuntimeError("Timed out waiting 10000ms for recv operation to complete")

    def wrong(*_):
        raise ring.WrongSum("a sum over n1, n2 came out wrong")

    for reduce, problems, warnings in ((late, 0, 1), (wrong, 1, 0)):
        monkeypatch.setattr(ring, "reduce", reduce)
        result = Talk()
        ring.sum_over_all(TCPStore("127.0.0.1", 0, is_master=True), ["n1", "n2"], "n1", 10.0, result)
        assert (len(result.total.problems), len(result.total.warnings)) == (problems, warnings)


def test_looks_that_hang_end_together_with_their_part_of_the_time(settings, folder):
    """A file server that is gone: every look that asks it hangs, and all of them end in time."""
    place = dataclasses.replace(place_of(settings, "n1", folder), limit_s=1.0, began_s=time.monotonic())
    began_s = time.monotonic()
    found = [checking.check(f"look {number}", lambda *_: time.sleep(600), place) for number in range(5)]
    assert time.monotonic() - began_s < 200
    assert "hangs" in found[0].problems[0] and not found[1].problems and "not looked at" in found[1].warnings[0]


def test_a_look_that_hangs_or_breaks_is_a_problem_and_stops_no_other(settings, folder):
    def hang(place, notes):
        time.sleep(30)

    def break_down(place, notes):
        raise ZeroDivisionError("by a broken machine")

    place = place_of(settings, "n1", folder)
    assert "no answer within 0 s" in checking.check("x", hang, place, limit_s=0.2).problems[0]
    assert "ZeroDivisionError: by a broken machine" in checking.check("x", break_down, place).problems[0]
    many = checking.check("x", lambda place, notes: notes.problems.extend(map(str, range(9))), place)
    assert many.problems == ("0", "1", "2", "3", "and 5 more of this kind")


def test_little_shared_memory_is_a_problem(settings, folder, monkeypatch):
    class Small:
        f_bavail, f_blocks, f_frsize = 32, 64, 1 << 20

    monkeypatch.setattr(machine.os, "statvfs", lambda path: Small)
    notes = Notes()
    machine.shared_memory(place_of(settings, "n1", folder), notes)
    assert "/dev/shm has 33.6 MB free of 67.1 MB" in notes.problems[0] and "--shm-size" in notes.problems[0]


@pytest.mark.fault(21)
def test_a_wrong_clock_is_a_warning_with_its_direction(settings, folder, monkeypatch):
    real = time.time
    for ahead_s, words in ((3600, "3600 s ahead of"), (-3600, "3600 s behind"), (0, None)):
        monkeypatch.setattr(time, "time", lambda ahead_s=ahead_s: real() + ahead_s)
        notes = Notes()
        machine.clock(place_of(settings, "n1", folder), notes)
        assert not notes.problems and (words in notes.warnings[0] if words else not notes.warnings)
    assert list(folder.iterdir()) == [], "nothing is left"


def test_too_little_space_for_two_checkpoints_says_how_much_is_needed(settings, folder, monkeypatch):
    place = place_of(settings, "n1", folder)
    whole = storage.checkpoint_bytes(settings)
    assert 12 * 100_000 < whole < 12 * 1_000_000, "the tiny model has 0.2 million weights"
    monkeypatch.setattr(storage, "free_bytes", lambda path: 2 * whole - 1)
    notes = Notes()
    storage.space(place, notes)
    assert "lower checkpoint.keep" in notes.problems[0]
    (settings.run.folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    notes = Notes()
    storage.space(place, notes)
    assert not notes.problems, "one of the two is there"


def test_a_model_folder_without_weights_and_empty_files_are_named(settings_tree, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    settings_tree["model"]["path"] = str(model)
    settings = Settings.model_validate(settings_tree)
    place = place_of(settings, "n1", tmp_path)
    (model / "config.json").write_text("")
    assert "config.json is empty" in checking.check("x", storage.model_folder, place).problems[0]
    shutil.copy(tiny_model / "config.json", model)
    assert not checking.check("x", storage.model_folder, place).problems
    (model / "model.safetensors").unlink()
    assert "no model.safetensors" in checking.check("x", storage.model_folder, place).problems[0]


def test_nodes_read_other_shards_but_the_same_ones_each_time():
    names = [f"{number}.tar" for number in range(1000)]
    first, second = storage.sample(names, "n1"), storage.sample(names, "n2")
    assert len(set(first)) == 16 and first == storage.sample(names, "n1") and set(first) != set(second)
    assert storage.sample(names[:3], "n1") != [] and len(storage.sample(names[:3], "n1")) == 3


def test_flash_attention_asked_for_by_name_is_required(settings_tree, folder):
    settings_tree["model"]["attention"] = "flash_attention_2"
    place = place_of(Settings.model_validate(settings_tree), "n1", folder)
    assert (
        "`model.attention` is flash_attention_2, but" in checking.check("x", devices.flash_attention, place).problems[0]
    )
