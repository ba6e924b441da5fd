"""Reports of all nodes → who is fit: majorities, slow nodes, links, what is nobody's fault, damaged files."""

import json
import os
import time
from dataclasses import replace

import pytest

from phi3v_dist.cluster.entries import folded
from phi3v_dist.cluster.findings import summarize
from phi3v_dist.cluster.report import DATA, KEPT_FAILURES, Check, Failure, Report, path_of, read_report, read_reports

FACTS = {"torch": "2.13.0", "settings": "a1"}


def report(host: str, **changes) -> Report:
    good = Report(
        host, "t", is_complete=True, facts=FACTS, settings={"train.steps": "10"}, checks=(Check("GPUs", "8 x H100"),),
        speeds=(600.0, 610.0), has_gpus=True, num_gpus=2,
    )  # fmt: skip
    return replace(good, **changes)


def ring(hosts: list[str], speed: dict[frozenset, float], usual: float = 100.0) -> dict[str, dict[str, float]]:
    edges: dict[str, dict[str, float]] = {host: {} for host in hosts}
    for one, other in zip(hosts, [*hosts[1:], hosts[0]], strict=True):
        edges[one][other] = edges[other][one] = speed.get(frozenset((one, other)), usual)
    return edges


def judged(reports, hosts=None):
    hosts = hosts or [each.host for each in reports]
    return summarize(reports, hosts, "t")


@pytest.mark.fault(20)
def test_the_table_of_differences_names_nodes_values_and_settings():
    odd = report("n3", facts=FACTS | {"settings": "b2"}, settings={"train.steps": "11"})
    found = judged([report("n1"), report("n2"), odd])
    (reason,) = found.bad["n3"]
    assert "settings is b2, but a1 on 2 of 3 nodes" in reason
    assert "train.steps:\n  10 on 2 nodes: n[1-2]\n  11 on 1 node: n3" in reason


@pytest.mark.fault(20)
def test_without_a_majority_nobody_is_excluded():
    found = judged([report("n1"), report("n2", facts=FACTS | {"torch": "2.12.0"})])
    assert found.good == ["n1", "n2"] and found.exit_code == 5
    assert (
        "torch must be the same on all nodes" in found.common[0].text and "2.12.0 on 1 node: n2" in found.common[0].text
    )
    assert "change the settings, the data or the launch" in found.lines()[-1]


def test_a_slow_gpu_is_a_problem_below_half_of_the_median_and_a_warning_below_seven_tenths():
    reports = [report(f"n{i}") for i in range(1, 6)]
    found = judged([*reports, report("n6", speeds=(600.0, 290.0)), report("n7", speeds=(400.0, 600.0))])
    assert list(found.bad) == ["n6"] and "GPU 1 multiplies at 290 TFLOP/s, 48 % of the median" in found.bad["n6"][0]
    assert len(found.warnings) == 1 and found.warnings[0].startswith("n7: speed: GPU 0 multiplies at 400")
    cores = [replace(each, has_gpus=False) for each in [*reports, report("n6", speeds=(1.0, 1.0))]]
    assert not judged(cores).bad and judged(cores).warnings[0].startswith("n6: speed: the CPU")


def test_a_node_whose_links_are_all_slow_is_named_and_its_neighbours_are_not():
    hosts = ["n1", "n2", "n3", "n4"]
    slow = {frozenset(("n1", "n2")): 30.0, frozenset(("n2", "n3")): 20.0}
    edges = ring(hosts, slow)
    found = judged([report(host, edges=edges[host]) for host in hosts])
    assert (
        list(found.bad) == ["n2"] and "30 MB/s on the best of its links, 30 % of the median 100" in found.bad["n2"][0]
    )


def test_a_node_that_nobody_could_talk_to_is_named_and_its_neighbours_are_not():
    hosts = ["n1", "n2", "n3", "n4"]
    edges = ring(hosts, {frozenset(("n3", "n4")): 0.0, frozenset(("n4", "n1")): 0.0})
    found = judged([report(host, edges=edges[host]) for host in hosts])
    assert list(found.bad) == ["n4"] and "did not answer n1, n3" in found.bad["n4"][0].replace("n[1,3]", "n1, n3")
    lost = judged([report("n1", edges={"n2": 0.0}), report("n2", is_complete=False), report("n3", edges={"n2": 0.0})])
    assert list(lost.bad) == ["n2"] and "fell silent" in lost.bad["n2"][0]


def test_when_no_two_nodes_can_talk_the_network_is_to_blame():
    hosts = ["n1", "n2", "n3"]
    edges = {"n1": {"n2": 0.0, "n3": 0.0}, "n2": {"n1": 0.0}, "n3": {"n1": 0.0}}
    found = judged([report(host, edges=edges[host]) for host in hosts])
    assert not found.bad and "no two nodes could talk" in found.common[0].text and found.exit_code == 5


def test_a_first_node_that_nobody_could_reach_is_named_when_the_others_could_meet():
    edges = {"n1": {}, "n2": {"n1": 0.0, "n3": 50.0}, "n3": {"n1": 0.0, "n2": 50.0}}
    found = judged([report(host, edges=its) for host, its in edges.items()])
    assert list(found.bad) == ["n1"] and not found.common


def test_a_wrong_sum_is_the_fault_of_the_link_that_gave_one_or_of_no_known_node():
    wrong = Check("sum", problems=("a sum over n1, n2, n3 came out wrong",))
    edges = {"n1": 50.0, "n2": 50.0}
    all_wrong = [report(host, checks=(wrong,), edges=edges) for host in ("n1", "n2", "n3")]
    assert not judged(all_wrong).bad and "came out wrong" in judged(all_wrong).common[0].text
    link = Check("network", problems=("a sum over n3, n1 came out wrong",))
    known = judged([*all_wrong[:2], report("n3", checks=(wrong, link))])
    assert list(known.bad) == ["n3"] and not known.common
    slow = Check("sum", warnings=("a sum over 3 nodes could not be tried in 10 s",))
    assert judged([report(host, checks=(slow,), edges=edges) for host in ("n1", "n2", "n3")]).exit_code == 0


@pytest.mark.parametrize("told, silent", [(1, 199), (100, 100), (1, 2)])
def test_when_half_of_the_nodes_are_silent_it_is_the_fault_of_none(told, silent):
    hosts = [f"n{number:03d}" for number in range(told + silent)]
    found = judged([report(host) for host in hosts[:told]], hosts)
    assert not found.bad and found.exit_code == 5
    assert f"{silent} of {told + silent} nodes gave no report in time" in found.common[0].text
    assert "PHI3V_EXAMINE_S" in found.common[0].text


def test_a_silent_node_is_told_apart_from_one_with_a_fault_of_its_own():
    worn = report("n2", checks=(Check("GPUs", problems=("GPU 3: memory errors",)),))
    found = judged([report("n1"), worn, report("n3"), report("n4", is_complete=False)], ["n1", "n2", "n3", "n4", "n5"])
    assert list(found.bad) == ["n2", "n4", "n5"] and not found.common
    assert [host for host, why in found.bad.items() if "no report in time" in why[0]] == ["n5"]
    assert list(judged([report("n1")], ["n1", "n2"]).bad) == ["n2"], "one node of two may be down"


def test_when_half_of_the_nodes_fell_silent_in_the_probe_it_is_the_fault_of_none():
    found = judged([report("n1"), report("n2"), report("n3", is_complete=False), report("n4", is_complete=False)])
    assert not found.bad and "fell silent" in found.common[0].text


def test_a_node_with_fewer_gpus_than_most_is_named_and_one_without_is_bad():
    found = judged([report("n1"), report("n2"), report("n3", num_gpus=1), report("n4", num_gpus=0)])
    assert list(found.bad) == ["n4"] and "no GPU is seen here, and others see 2" in found.bad["n4"][0]
    assert found.warnings == ["n3: number of GPUs: 1 GPUs are seen here, and 2 on 2 nodes"]
    assert not judged([report("n1", num_gpus=0), report("n2", num_gpus=0)]).bad


def test_links_that_merely_time_out_everywhere_are_a_warning():
    reports = [report("n1", edges={"n2": 0.0}, timed_out=("n2",)), report("n2", edges={"n1": 0.0}, timed_out=("n1",))]
    found = judged(reports)
    assert not found.bad and not found.common and "no two nodes could be tried in time" in found.warnings[0]


def test_a_node_that_came_too_late_for_the_probe_is_fit():
    late = Check("network", warnings=("came too late for the network probe",))
    edges = {"n1": {"n2": 50.0}, "n2": {"n1": 50.0}}
    found = judged([*(report(host, edges=its) for host, its in edges.items()), report("n3", checks=(late,))])
    assert not found.bad and found.warnings == ["n3: network: came too late for the network probe"]


def test_one_node_alone_with_a_missing_shard_is_not_excluded_and_with_a_bad_gpu_it_is():
    shard = Check("shards", problems=("x.tar: no such shard",), kind=DATA)
    assert judged([report("n1", checks=(shard,))]).exit_code == 3 and judged([report("n1", checks=(shard,))]).good == [
        "n1"
    ]
    worn = Check("GPUs", problems=("GPU 3: memory errors",))
    assert judged([report("n1", checks=(worn,))]).good == [] and judged([report("n1", checks=(worn,))]).exit_code == 5


def test_reports_of_other_starts_are_none():
    found = summarize([report("n1"), replace(report("n2"), token="earlier")], ["n1", "n2"], "t")
    assert list(found.bad) == ["n2"] and "no report in time" in found.bad["n2"][0]
    none = summarize([], ["n1", "n2"], "t")
    assert not none.bad and none.exit_code == 5 and "none of 2 nodes reported" in none.common[0].text


def test_a_report_comes_back_as_written_and_damaged_or_foreign_files_are_none(tmp_path):
    told = report("n1", edges={"n2": 12.5}, earlier=(Failure("s", ("hot",)),))
    told.write(tmp_path)
    assert read_report(path_of(tmp_path, "n1")) == told
    whole = path_of(tmp_path, "n1").read_text()
    tree = json.loads(whole)
    for number, text in enumerate([
        "", whole[:-20], "[]", "null", "[" * 100_000, whole.replace("phi3v-preflight-1", "phi3v-preflight-2"),
        json.dumps(tree | {"checks": "GPUs"}), json.dumps(tree | {"speeds": ["x"]}), json.dumps(tree | {"more": 1}),
        json.dumps(tree | {"speeds": [float("nan")]}), json.dumps(tree | {"token": None}), whole + " " * (1 << 20),
    ]):  # fmt: skip
        path_of(tmp_path, "n1").write_text(text)
        assert read_report(path_of(tmp_path, "n1")) is None, number
    path_of(tmp_path, "n1").write_text(whole.replace('"host": "n1"', '"host": "../n1"'))
    assert read_reports(tmp_path) == [], "it speaks for another host"
    path_of(tmp_path, "n1").unlink()
    os.symlink("/dev/zero", path_of(tmp_path, "n1"))
    assert read_reports(tmp_path) == [] == read_reports(tmp_path, ["n1", "n9"])


@pytest.mark.fault(24)
def test_the_history_keeps_what_failed_at_earlier_starts_and_ends_somewhere(tmp_path):
    previous = None
    for start in range(KEPT_FAILURES + 5):
        bad = (Check("GPUs", problems=(f"failure {start}",)),) if start % 2 == 0 else (Check("GPUs"),)
        previous = report("n1", token=f"7.{start}.1", checks=bad).after(previous)
        assert previous.after(previous).earlier == previous.earlier, "the second report of a start adds nothing"
    assert [failure.problems[0] for failure in previous.earlier] == [f"failure {n}" for n in range(0, 24, 2)]
    many = replace(previous, earlier=previous.earlier * 9)
    assert len(report("n1").after(many).earlier) == KEPT_FAILURES


def test_five_hundred_reports_are_read_and_judged_in_seconds_and_give_few_lines(tmp_path):
    hosts = [f"node{number:03d}" for number in range(500)]
    edges = ring(hosts, {})
    checks = tuple(Check(f"check {number}", "fine") for number in range(15))
    settings = {f"section.key{number}": "value" for number in range(150)}
    for host in hosts:
        odd = {"torch": "2.12.0"} if host in hosts[100:104] else {}
        its = report(host, facts=FACTS | odd, edges=edges[host], checks=checks, settings=settings)
        path_of(tmp_path, host).write_text(json.dumps({"format": "phi3v-preflight-1", **its.__dict__}, default=vars))
    began_s = time.process_time()
    found = summarize(read_reports(tmp_path, hosts), hosts, "t")
    assert time.process_time() - began_s < 10, "measured: below 1 s"
    assert list(found.bad) == hosts[100:104] and len(found.lines()) < 25
    assert found.lines()[-1] == "496 nodes of 500 fit to train on; not node[100-103]"


def test_names_are_folded_and_hostile_text_cannot_move_the_cursor():
    assert folded(["n3", "n1", "n2", "n10", "login"]) == "login, n[1-3,10]"
    assert folded([f"n{number:03d}" for number in (8, 9, 10, 99, 100)]) == "n[008-010,099-100]"
    assert folded(["gpu7"]) == "gpu7" and "…" in folded([f"n{2 * number}" for number in range(50)])
    evil = Check("GPUs", problems=("\x1b[2Jgone",))
    assert not any("\x1b" in line for line in judged([report("n1", checks=(evil,)), report("n2")]).lines())
