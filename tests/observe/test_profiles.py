"""What may be written into RUN/PROFILE, what goes wrong without ending a run, and the flame graph's arithmetic."""

import json
import logging
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.attempt.requests import Requests
from phi3v_dist.errors import ConfigError
from phi3v_dist.observe.flame import Box, Call, draw, fold
from phi3v_dist.observe.profiles import Profiles, Wish, parse, slowest_rank
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.watch import heartbeat


@pytest.mark.parametrize(
    ("text", "slowest", "wish"),
    [
        ("", None, Wish(3, (0, 7))),
        (" \n", 5, Wish(3, (0, 5))),
        ("", 0, Wish(3, (0, 7))),
        ("", 9, Wish(3, (0, 7))),  # of an attempt with more ranks
        ("steps=5", None, Wish(5, (0, 7))),
        ("ranks=5,0,5\nsteps=1\n", None, Wish(1, (0, 5))),
    ],
)
def test_a_wish_says_how_many_steps_and_which_ranks(text: str, slowest: int | None, wish: Wish) -> None:
    assert parse(text, world_size=8, slowest=slowest) == wish


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps=0", "`steps=0`"), ("steps=21", "`steps=21`"), ("steps=", "`steps=`"), ("steps=-1", "`steps=-1`"),
        ("steps=" + "9" * 5000, "not a number from 1 to 20"), ("ranks=8", "no rank `8`"), ("ranks=", "no rank ``"),
        ("ranks=0-3", "no rank `0-3`"), ("rank=1", "`rank=1` is not known"), ("3", "`3` is not known"),
        ("steps=1 steps=2", "`steps=2` is there twice"), ("\0\ufffd", "is not known"),
    ],
)  # fmt: skip
def test_any_other_wish_is_refused_with_what_is_allowed(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text, world_size=8)
    assert told in str(raised.value) and "`ranks=N,N,…` (0 to 7)" in str(raised.value)
    assert len(str(raised.value)) < 300


def test_the_slowest_rank_is_that_of_the_records_last_window(tmp_path: Path) -> None:
    assert slowest_rank(tmp_path) is None
    rows = [{"health/slowest_rank": 3}, {"health/slowest_rank": 1.0}, {"train/loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"health/slowest_r')
    assert slowest_rank(tmp_path) == 1


@pytest.fixture
def profiles(tmp_path: Path) -> Profiles:
    """Of a run of one rank and 10 steps."""
    requests = Requests()
    requests.opened(tmp_path, Attempt(1, tmp_path / "attempts/0001"), grace_s=60.0)
    return Profiles(tmp_path, Topology(), requests, num_steps=10)


def go(profiles: Profiles, steps: range) -> None:
    """Steps with some work in them, and the wait of the run's end for the files."""
    for step in steps:
        profiles.requests._looked_s = -1e9  # as if a second had gone by
        profiles.requests.agreed(profiles.topology)
        with profiles.around(step):
            heartbeat.enter("forward", step)
            torch.ones(4, 4) @ torch.ones(4, 4)
    for thread in threading.enumerate():
        if thread.name == "profile":
            thread.join()


def files(profiles: Profiles) -> list[str]:
    return sorted(str(path.relative_to(profiles.run_folder)) for path in profiles.run_folder.glob("profiles/*/*"))


def test_an_evaluation_ends_a_recording_before_its_time(profiles: Profiles, caplog: pytest.LogCaptureFixture) -> None:
    profiles.requests.profile_path.touch()
    go(profiles, range(4, 5))
    heartbeat.enter("evaluate", 0)
    go(profiles, range(5, 7))
    kinds = ("flame.svg", "memory.txt", "ops.txt", "trace.json.gz")
    assert files(profiles) == [f"profiles/step-000004/rank-00000.{kind}" for kind in kinds]
    assert "ends before step 6 is done" in caplog.text and not profiles.requests.profile_path.exists()
    assert "aten::mm" in (profiles.run_folder / "profiles/step-000004/rank-00000.ops.txt").read_text()


def test_a_disk_that_fails_is_a_warning(profiles: Profiles, caplog: pytest.LogCaptureFixture) -> None:
    (profiles.run_folder / "profiles").write_text("in the way")
    profiles.requests.profile_path.write_text("steps=1")
    go(profiles, range(1, 3))
    assert "the profile of rank 0 is not whole" in caplog.text and "training goes on" in caplog.text


def test_a_profiler_that_fails_is_a_warning(
    profiles: Profiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUPTI is used by another")

    monkeypatch.setattr("phi3v_dist.observe.profiles.profile", broken)
    profiles.requests.profile_path.touch()
    go(profiles, range(1, 6))
    assert caplog.text.count("CUPTI is used by another") == 1 and files(profiles) == []
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_file_that_cannot_be_read_or_removed_is_named_once(
    profiles: Profiles, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    profiles.requests.profile_path.mkdir()
    with caplog.at_level(logging.WARNING):
        go(profiles, range(1, 5))
    assert caplog.text.count("asks for a profile that cannot be made") == 1
    assert caplog.text.count("cannot be removed") == 1


# --- the flame graph ------------------------------------------------------------------------------------------------


def totals(box: Box) -> dict:
    return {name: (inner.total, inner.count, totals(inner)) for name, inner in box.inside.items()}


def test_calls_are_nested_by_their_times_and_added_up_by_their_callers() -> None:
    calls = [
        Call("a", "mul", 12, 3), Call("a", "f", 10, 20), Call("a", "mul", 20, 4), Call("a", "g", 30, 5),
        Call("a", "late", 33, 100),  # sticks out of g, and is cut
        Call("b", "mul", 0, 7),
    ]  # fmt: skip
    root = fold(calls)
    assert totals(root) == {
        "a": (25, 1, {"f": (20, 1, {"mul": (7, 2, {})}), "g": (5, 1, {"late": (2, 1, {})})}),
        "b": (7, 1, {"mul": (7, 1, {})}),
    }
    assert root.total == 32


def test_what_is_around_the_steps_is_left_out_and_steps_are_added_up() -> None:
    calls = [
        Call("a", "main", 0, 100), Call("a", "step 7", 10, 20), Call("a", "mul", 12, 3), Call("a", "step 8", 40, 30),
        Call("a", "log", 80, 5),
    ]  # fmt: skip
    assert totals(fold(calls, top="step")) == {"a": (50, 1, {"step": (50, 2, {"mul": (3, 1, {})})})}


def test_the_picture_shows_names_as_text_whatever_is_in_them() -> None:
    name = '<script>alert("x")</script> & more'
    picture = ElementTree.fromstring(draw(fold([Call("a", name, 0, 1_000_000)]), "of <b>"))
    titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert f"{name}: 1.000 ms, 100.0 %, 1 calls" in titles
    assert not list(picture.iter("{http://www.w3.org/2000/svg}script"))
    assert ElementTree.fromstring(draw(fold([]), "nothing")) is not None
