"""Slurm's short form of host names, as Slurm itself reads it."""

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.hostlist import MAX_NAMES, expand


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[08-11],x,y[1]", ["n08", "n09", "n10", "n11", "x", "y1"]),
        ("rack[1-2]n[3-4]", ["rack1n3", "rack1n4", "rack2n3", "rack2n4"]),
        ("n[3,1],gpu-a.b_c", ["n3", "n1", "gpu-a.b_c"]),
    ],
)
def test_names_come_in_the_order_and_width_in_which_they_are_written(text, hosts):
    assert expand(text) == hosts


@pytest.mark.parametrize(
    "text",
    ["n[1", "n1]", "n[1-2]]", "n[]", "n[a-b]", "n[2-1]", "n[1-2-3]", "n[1,,2]", "n[[1]]", "a b", "n[-1]", "n[²]"],
)
def test_what_is_no_list_of_hosts_is_refused_with_its_text(text):
    with pytest.raises(LaunchError, match="not a list of hosts") as caught:
        expand(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["n[1-999999999999]", "n[1-999]m[1-999]", "a," * MAX_NAMES + "b"])
def test_a_slip_of_the_pen_does_not_fill_the_memory(text):
    with pytest.raises(LaunchError, match="more than 65536 hosts"):
        expand(text)


def _range(first: int, count: int, width: int) -> str:
    return f"{first:0{width}d}-{first + count}" if count else f"{first:0{width}d}"


RANGES = st.builds(_range, st.integers(0, 120), st.integers(0, 12), st.integers(1, 4))
BRACKETS = st.lists(RANGES, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
WORDS = st.from_regex(r"[a-z]([a-z0-9-]{0,3}[a-z])?", fullmatch=True)
NAMES = st.lists(st.tuples(WORDS, BRACKETS), max_size=2).flatmap(
    lambda parts: WORDS if not parts else st.just("".join(word + inside for word, inside in parts))
)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.lists(NAMES, min_size=1, max_size=4).map(",".join), min_size=40, max_size=40))
def test_it_agrees_with_slurm(tmp_path_factory, lists):
    if shutil.which("scontrol") is None:
        pytest.skip("Slurm is not installed")
    config = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    config.write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    script = 'for list; do echo "$(scontrol show hostnames "$list" | tr "\\n" " ")"; done'
    done = subprocess.run(
        ["bash", "-c", script, "-", *lists], env={"PATH": "/usr/bin:/bin", "SLURM_CONF": str(config)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert [line.split() for line in done.stdout.splitlines()] == [expand(text) for text in lists], done.stderr
