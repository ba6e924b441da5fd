"""Tars as people write them → an index, the bytes it promises, and messages for tars that are not whole."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.samples import BadSample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import DataError

JPEG = picture("red", 8, 6)
WORDS = [(f"{n:03d}.txt", b"%d" % n * 300) for n in range(5)]  # each a header and one block of data: 1024 bytes


def tar_of(members: list[tuple[str, bytes]], tar_format: int = tarfile.DEFAULT_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.write_bytes(tar_of(members))
    return path


def open_table(*patterns: Path | str, indexed: list[tuple[int, int]] | None = None) -> ShardTable:
    source = SourceSettings(shards=[str(pattern) for pattern in patterns])
    on_progress = None if indexed is None else lambda *numbers: indexed.append(numbers)
    return ShardTable.open([source], on_progress=on_progress)


def contents(table: ShardTable) -> dict[str, dict[str, bytes]]:
    """Key → members of every sample, read through the index."""
    fetcher = Fetcher(table)
    places = map(table.locate, range(len(table)))
    return {table.index(shard).key(number): fetcher.fetch(i) for i, (shard, number) in enumerate(places)}


def problems(*patterns: Path | str) -> list[str]:
    with pytest.raises(DataError) as error:
        open_table(*patterns)
    return error.value.problems


def test_the_index_is_made_once_and_then_read(tmp_path: Path) -> None:
    shard, indexed = write(tmp_path / "a.tar", WORDS), []
    first, second = open_table(shard, indexed=indexed), open_table(shard, indexed=indexed)
    assert indexed == [(1, 1)]
    assert contents(first) == contents(second) == {name[:3]: {"txt": data} for name, data in WORDS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.index.safetensors"]


def test_the_index_of_a_tar_of_another_size_is_made_anew(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", WORDS[:2])
    assert list(contents(open_table(shard))) == ["000", "001"]
    write(shard, [*WORDS, ("long.txt", b"x" * 20_000)])
    assert list(contents(open_table(shard))) == ["000", "001", "002", "003", "004", "long"]


@pytest.mark.parametrize("size_bytes", [0, 5, 200])
def test_an_index_that_is_cut_off_is_made_anew(tmp_path: Path, size_bytes: int) -> None:
    shard = write(tmp_path / "a.tar", WORDS)
    before = contents(open_table(shard))
    os.truncate(tmp_path / "a.tar.index.safetensors", size_bytes)
    assert contents(open_table(shard)) == before


def test_changed_bytes_of_equal_size_are_named_when_they_are_read(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", WORDS)
    open_table(shard)
    shard.write_bytes(shard.read_bytes().replace(b"222", b"922", 1))
    fetcher = Fetcher(open_table(shard))
    with pytest.raises(BadSample, match=r"a\.tar: sample '002': the bytes of txt are not .* delete .*a\.tar\.index"):
        fetcher.fetch(2)
    assert fetcher.fetch(1)["txt"] == WORDS[1][1]


@pytest.mark.fault(50)
@pytest.mark.parametrize("index_too", [False, True])
def test_a_shard_that_goes_away_under_a_run_is_bad_by_name(tmp_path: Path, index_too: bool) -> None:
    shard = write(tmp_path / "a.tar", WORDS)
    table = open_table(shard)
    shard.unlink()
    if index_too:
        (tmp_path / "a.tar.index.safetensors").unlink()
    with pytest.raises(BadSample, match=r"a\.tar: sample '(000|number 0)': .*(cannot be read|is not now)"):
        Fetcher(table).fetch(0)


def test_a_shard_that_is_replaced_under_a_run_is_bad_by_name(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", WORDS)
    table = open_table(shard)
    open_table(write(shard, [*WORDS[:4], ("new.txt", b"n" * 20_000)]))
    with pytest.raises(BadSample, match="the shard changed since the run began"):
        Fetcher(table).fetch(4)


@pytest.mark.fault(50)
def test_all_missing_shards_are_named_at_once(tmp_path: Path) -> None:
    for name in ("000", "001", "002"):
        write(tmp_path / f"{name}.tar", WORDS)
    found = problems(tmp_path / "{000..004}.tar", tmp_path / "other.tar")
    assert len(found) == 2
    assert "2 of 5 shards missing" in found[0] and "003.tar" in found[0] and "004.tar" in found[0]
    assert "other.tar: no such shard" in found[1]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{000..002}.tar", ["000", "001", "002"]),
        ("{00,01}{0..1}.tar", ["000", "001", "010", "011"]),
        ("0*.tar", ["000", "001", "002", "010", "011"]),
        ("*", ["000", "001", "002", "010", "011", "[x]"]),
        ("[x].tar", ["[x]"]),
    ],
)
def test_patterns_name_shards_and_never_their_indexes(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("000", "001", "002", "010", "011", "[x]"):
        write(tmp_path / f"{name}.tar", WORDS[:1])
    (tmp_path / "folder").mkdir()
    for _ in range(2):  # the second time there are indexes beside them
        assert [Path(shard).stem for shard in open_table(tmp_path / pattern).shards] == expected


def test_a_pattern_that_names_nothing_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path / "5.tar", WORDS)
    for pattern in ("{9..7}.tar", "train-*.tar", "{a,b}.tar"):
        (problem,) = problems(tmp_path / pattern)
        assert f"{pattern}: no such shard" in problem


def test_a_shard_named_twice_by_one_source_is_a_problem_and_by_two_sources_is_not(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", WORDS)
    (problem,) = problems(tmp_path / "*.tar", shard)
    assert "a.tar: named more than once" in problem
    two = ShardTable.open([SourceSettings(shards=[str(shard)], name=name) for name in ("this", "that")])
    assert [two.source_name(0), two.source_name(1), len(two)] == ["this", "that", 2 * len(WORDS)]


@pytest.mark.parametrize(("file", "name"), [("train-000.tar", "train"), ("000.tar", "000"), ("big_set.tar", "big_set")])
def test_a_source_without_a_name_takes_its_first_shards(tmp_path: Path, file: str, name: str) -> None:
    assert open_table(write(tmp_path / file, WORDS)).source_name(0) == name


def test_sizes_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(turned, "JPEG", exif=exif)
    index = open_table(write(tmp_path / "a.tar", [("0.b.jpg", turned.getvalue()), ("0.a.jpg", JPEG)])).index(0)
    assert list(index.image_sizes(0).items()) == [("b.jpg", (6, 8)), ("a.jpg", (8, 6))]


def test_an_unreadable_picture_spoils_its_own_sample_only(tmp_path: Path) -> None:
    bad = {"1": b"", "2": b"<svg/>", "3": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "5": JPEG[:20]}
    members = [
        (f"{n}.{name}", data) for n in range(7) for name, data in (("jpg", bad.get(str(n), JPEG)), ("txt", b"x"))
    ]
    table = open_table(write(tmp_path / "a.tar", members))
    assert {table.index(0).key(n): why for n, why in table.index(0).bad.items()}.keys() == bad.keys()
    for number in range(7):
        if str(number) in bad:
            with pytest.raises(BadSample, match=rf"a\.tar: sample '{number}': jpg is not a readable picture: \w+"):
                Fetcher(table).fetch(number)
        else:
            assert Fetcher(table).fetch(number) == {"jpg": JPEG, "txt": b"x"}


def test_tars_of_the_webdataset_library_read_as_it_reads_them(tmp_path: Path) -> None:
    path = str(tmp_path / "a.tar")
    with webdataset.TarWriter(path) as tar:
        tar.write({"__key__": "some/folder/one", "jpg": JPEG, "txt": "a caption"})
        tar.write({"__key__": "some/folder/two", "0.png": picture("red", 3, 2, "PNG"), "json": {"price": 3}})
    theirs = [dict(sample) for sample in webdataset.WebDataset(path, shardshuffle=False)]
    ours = contents(open_table(path))
    assert list(ours) == [sample["__key__"] for sample in theirs]
    assert list(ours.values()) == [{k: v for k, v in sample.items() if k[0] != "_"} for sample in theirs]


def test_members_that_belong_to_no_sample_are_passed_over(tmp_path: Path) -> None:
    others = [
        "._000.jpg",
        "a/.hidden.txt",
        "README",
        "a/LICENSE",
        "__index__.json",
        "__meta__/notes.txt",
        "ends_in_dot.",
    ]
    members = [(name, b"?") for name in others]
    assert contents(open_table(write(tmp_path / "a.tar", [*members[:3], *WORDS, *members[3:]]))).keys() == {
        name[:3] for name, _ in WORDS
    }


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.tuples(
            st.text("ab/é漢 ", min_size=1, max_size=6).filter(lambda key: key[-1] != "/" and key[0] != "/"),
            st.sampled_from(["txt", "json", "0.txt", "1.TXT", "npy"]),
        ),
        st.binary(max_size=1500), min_size=1, max_size=12,
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.randoms(),
)  # fmt: skip
def test_members_in_any_order_come_back_under_their_key(tmp_path_factory, files, tar_format, random) -> None:
    members = [(f"{key}.{name}", data) for (key, name), data in files.items()]
    random.shuffle(members)
    shard = tmp_path_factory.mktemp("any") / "a.tar"
    shard.write_bytes(tar_of(members, tar_format))
    expected: dict[str, dict[str, bytes]] = {}
    for (key, name), data in files.items():
        expected.setdefault(key, {})[name.lower()] = data
    assert contents(open_table(shard)) == expected


def test_keys_that_are_not_unicode_can_be_printed(tmp_path: Path) -> None:
    latin = "caf\udce9"  # how Python spells the byte e9 in a file name
    table = open_table(write(tmp_path / "a.tar", [(f"{latin}.txt", b"1"), ("漢字.txt", b"2"), (f"{latin}.jpg", b"")]))
    assert [table.index(0).key(n) for n in range(2)] == ["caf\\xe9", "漢字"]
    with pytest.raises(BadSample, match="caf") as error:
        Fetcher(table).fetch(0)
    str(error.value).encode()


def test_offsets_beyond_4_gib_are_read(tmp_path: Path) -> None:
    shard, hole_bytes = tmp_path / "a.tar", 5 << 30
    with shard.open("wb") as file:
        padding = tarfile.TarInfo("padding")  # no sample, so never read; a hole on the disk
        padding.size = hole_bytes
        file.write(padding.tobuf(tarfile.GNU_FORMAT))
        file.seek(hole_bytes, os.SEEK_CUR)
        file.write(tar_of(WORDS))
    table = open_table(shard)
    assert min(member.offset for member in table.index(0).members(0)) > hole_bytes
    assert contents(table) == {name[:3]: {"txt": data} for name, data in WORDS}


def test_an_index_goes_to_the_cache_when_the_folder_is_read_only(tmp_path: Path, monkeypatch) -> None:
    folder, cache, indexed = tmp_path / "shards", tmp_path / "cache", []
    folder.mkdir()
    shard = write(folder / "a.tar", WORDS)
    open_table(shard, indexed=indexed)
    write(shard, [*WORDS, ("long.txt", b"x" * 20_000)])  # the index beside it is stale from here on
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(folder))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    tables = [open_table(shard, indexed=indexed) for _ in range(3)]
    assert indexed == [(1, 1)] * 2
    assert all(len(contents(table)) == len(WORDS) + 1 for table in tables)
    assert [path.name for path in cache.rglob("*.*")] == ["a.tar.index.safetensors"]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_index_that_cannot_be_written_anywhere_is_a_problem_that_says_what_to_do(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (problem,) = problems(write(tmp_path / "a.tar", WORDS))
    assert "a.tar.index.safetensors: cannot be written" in problem and "XDG_CACHE_HOME" in problem
