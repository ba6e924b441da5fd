"""Brace expansion of shard patterns: what the documentation of braceexpand shows, and what names of files need."""

from pathlib import Path

import pytest
import webdataset.shardlists

from phi3v_dist.data import patterns

DOCUMENTED = [
    ("item{1..3}", ["item1", "item2", "item3"]),
    ("{a..c}", ["a", "b", "c"]),
    ("index.html{,.backup}", ["index.html", "index.html.backup"]),
    ("python{2.{5..7},3.{2,3}}", ["python2.5", "python2.6", "python2.7", "python3.2", "python3.3"]),
    ("{07..10}", ["07", "08", "09", "10"]),
    ("{a..g..2}", ["a", "c", "e", "g"]),
    ("{4..1}", ["4", "3", "2", "1"]),
    ("{2..-1}", ["2", "1", "0", "-1"]),
    (r"\{1,2}", [r"\1", r"\2"]),  # its examples escape=False
    ("{Z..a}", ["Z", "a"]),  # its stated difference from bash
    ("{1}", ["{1}"]),
    ("{1,2{}}", ["1", "2{}"]),
    ("a{b,c}d{e,f}", ["abde", "abdf", "acde", "acdf"]),
    ("a{b,{c,{d,e}}}", ["ab", "ac", "ad", "ae"]),
    ("{5..1..2}", ["5", "3", "1"]),
    ("{7..010}", ["007", "008", "009", "010"]),
    ("{1..a}", ["{1..a}"]),
]
SHARDS = [
    ("{a,b{1..2}}", ["a", "b1", "b2"]),
    ("{7..5}", ["7", "6", "5"]),
    ("{1..10..3}", ["1", "4", "7", "10"]),
    ("{a..c}", ["a", "b", "c"]),
    ("s3://bucket/{train,more}-{000..002}.tar",
     [f"s3://bucket/{name}-00{n}.tar" for name in ("train", "more") for n in range(3)]),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "names"), DOCUMENTED + SHARDS)
def test_braces_expand_as_documented_and_as_webdataset_does(pattern: str, names: list[str]) -> None:
    assert patterns.expand_braces(pattern) == names
    if "\\" not in pattern:  # webdataset takes a backslash as an escape
        assert webdataset.shardlists.expand_urls(pattern) == names


@pytest.mark.parametrize(
    "name", ["{1{2,3}", "{{1,2}", "{1,2}}", "}{1,2}", r"{1\{2,3}", "run {draft.tar", "a}b.tar", "plain.tar", ""]
)
def test_a_name_with_unbalanced_braces_stays_as_it_is(name: str) -> None:
    assert patterns.expand_braces(name) == [name]


def test_expanded_names_are_looked_up_in_their_order(tmp_path: Path) -> None:
    for name in ("a", "b1", "b2", "7", "6", "5", "odd {name"):
        (tmp_path / f"{name}.tar").touch()
    found, problems = patterns.expand([f"{tmp_path}/{{a,b{{1..2}}}}.tar", f"{tmp_path}/{{7..5}}.tar"])
    assert not problems
    assert [Path(shard).stem for shard in found] == ["a", "b1", "b2", "7", "6", "5"]

    found, problems = patterns.expand([f"{tmp_path}/odd {{name.tar"])
    assert not problems and [Path(shard).name for shard in found] == ["odd {name.tar"]

    found, problems = patterns.expand([f"{tmp_path}/{{7..1..2}}.tar"])
    assert [Path(shard).stem for shard in found] == ["7", "5"]
    assert "2 of 4 shards missing" in problems[0] and "3.tar" in problems[0] and "1.tar" in problems[0]
