"""Tars that are not as they should be → what is used, what is bad by name, and what is never done (rows 46 to 59)."""

import gzip
import io
import logging
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import open_table, problems, tar_of, write

from phi3v_dist.config import SourceSettings
from phi3v_dist.data import index as index_module
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.index import ShardIndex
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.plan import PlannedRow, PlannedStep, accumulation, assign
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import BadSample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import DataError

BLOCK = 512
JPEG = picture("red", 8, 6)
PAIRS = [(f"{n:03d}.{name}", data) for n in range(10) for name, data in (("jpg", JPEG), ("txt", b"%d" % n * 300))]
TAR = tar_of(PAIRS)
KEYS = [f"{n:03d}" for n in range(10)]


def place_of(name: str, data: bytes = TAR) -> int:
    """Where a member's header begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember(name).offset


def with_bytes(place: int, new: bytes, data: bytes = TAR) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def indexed(folder: Path, data: bytes) -> ShardIndex:
    (folder / "a.tar").write_bytes(data)
    return open_table(folder / "a.tar").index(0)


def bad(index: ShardIndex) -> dict[str, str]:
    return {index.key(number): reason for number, reason in index.bad.items()}


def good(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key → members of every sample that can be read."""
    table = open_table(folder / "a.tar")
    fetcher, found = Fetcher(table), {}
    for sample_id in range(len(table)):
        shard, number = table.locate(sample_id)
        try:
            found[table.index(shard).key(number)] = fetcher.fetch(sample_id)
        except BadSample:
            assert number in table.index(shard).bad
    return found


WHOLE = {key: {"jpg": JPEG, "txt": b"%d" % int(key) * 300} for key in KEYS}


def all_but(*keys: str) -> dict[str, dict[str, bytes]]:
    return {key: members for key, members in WHOLE.items() if key not in keys}


# --- damage in the middle (48, 49) -----------------------------------------------------------------------------------


@pytest.mark.fault(48)
@pytest.mark.parametrize("name", ["004.jpg", "004.txt"])
@pytest.mark.parametrize("what", ["checksum", "padding", "name", "zeros", "noise"])
def test_a_damaged_header_costs_its_own_sample_only(tmp_path: Path, name: str, what: str) -> None:
    place = place_of(name)
    new = {
        "checksum": (148, b"777777"), "padding": (76, b"\xff"), "name": (1, b"\xff"), "zeros": (0, bytes(BLOCK)),
        "noise": (0, np.random.default_rng(0).bytes(BLOCK)),
    }[what]  # fmt: skip
    index = indexed(tmp_path, with_bytes(place + new[0], new[1]))
    assert bad(index).keys() == {"004"} and f"byte {place:,}" in bad(index)["004"]
    (damage,) = index.damage
    assert (damage.begin, damage.begin < damage.end <= place + 2048) == (place, True)
    assert good(tmp_path) == all_but("004")


@pytest.mark.fault(48)
def test_where_samples_differ_in_kind_a_neighbour_that_may_have_lost_a_picture_is_not_trusted(tmp_path: Path) -> None:
    data = tar_of([*PAIRS[:8], ("004.0.jpg", JPEG), ("004.txt", b"4"), ("005.txt", b"5"), ("006.txt", b"6")])
    index = indexed(tmp_path, with_bytes(place_of("004.0.jpg", data), bytes(BLOCK), data))
    assert index.key(4) == "004" and bad(index).keys() == {"003", "004"}
    assert all("may have lost a member" in reason for reason in bad(index).values())


@pytest.mark.fault(48)
def test_a_hole_over_several_samples_is_skipped(tmp_path: Path) -> None:
    begin, end = place_of("003.txt"), place_of("006.jpg")
    index = indexed(tmp_path, with_bytes(begin, bytes(end - begin)))
    assert good(tmp_path) == all_but("003", "004", "005")
    assert [(d.begin, d.end) for d in index.damage] == [(begin, end)] and "zeros" in index.damage[0].reason


@pytest.mark.fault(48)
@settings(deadline=None, max_examples=80)
@given(st.integers(0, len(TAR) - 1), st.integers(1, 255))
def test_a_flipped_byte_costs_one_sample_at_most(tmp_path_factory: pytest.TempPathFactory, place: int, by: int) -> None:
    folder = tmp_path_factory.mktemp("flip")
    indexed(folder, with_bytes(place, bytes([TAR[place] ^ by])))
    found = good(folder)
    wrong = [key for key in KEYS if found.get(key) != WHOLE[key]]
    assert len(wrong) <= 1


@pytest.mark.fault(49)
@pytest.mark.timeout(20)
@pytest.mark.parametrize("size_bytes", [1 << 45, 1 << 62, -512])
def test_a_header_that_claims_anything_costs_its_own_sample(tmp_path: Path, size_bytes: int) -> None:
    entry = tarfile.TarInfo("004.txt")
    entry.size = size_bytes
    index = indexed(tmp_path, with_bytes(place_of("004.txt"), entry.tobuf(tarfile.GNU_FORMAT)))
    assert bad(index).keys() == {"004"} and f"its header says {size_bytes:,} bytes" in bad(index)["004"]
    assert good(tmp_path) == all_but("004")


@pytest.mark.fault(49)
@pytest.mark.timeout(20)
def test_a_long_name_that_claims_32_tebibytes_is_damage(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 1 << 45
    place = place_of("005.jpg")
    index = indexed(tmp_path, TAR[:place] + entry.tobuf(tarfile.GNU_FORMAT) + TAR[place:])
    assert len(index.damage) == 1
    assert good(tmp_path).items() <= WHOLE.items() and len(good(tmp_path)) >= 8


def test_a_tar_inside_a_member_is_not_searched(tmp_path: Path) -> None:
    inner = tar_of([("900.txt", b"nested")])
    data = tar_of([*PAIRS[:2], ("000.bin", inner), *PAIRS[2:]])
    assert len(indexed(tmp_path, with_bytes(place_of("006.txt", data), bytes(BLOCK), data))) == 10
    assert "900" not in good(tmp_path)


# --- cut, empty, no tar (46, 47) -------------------------------------------------------------------------------------


@pytest.mark.fault(46)
@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(TAR)))
def test_no_cut_loses_samples_without_a_word(tmp_path_factory: pytest.TempPathFactory, size_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "a.tar").write_bytes(TAR[:size_bytes])
    try:
        index = open_table(folder / "a.tar").index(0)
    except DataError as error:
        assert size_bytes < BLOCK and "no shard holds a sample" in str(error)
        return
    found = good(folder)
    assert found.items() <= WHOLE.items()
    assert index.damage or found == WHOLE
    whole_pairs = sum(place_of(f"{key}.txt") + 2 * BLOCK <= size_bytes for key in KEYS)
    assert len(found) >= whole_pairs - (whole_pairs == 1)  # one alone cannot show that it is whole


@pytest.mark.fault(46)
@pytest.mark.parametrize("at", [0, 700, 5000, len(TAR) - 12_000])
def test_a_tar_that_was_cut_after_it_was_indexed_keeps_its_numbers(tmp_path: Path, at: int) -> None:
    before = indexed(tmp_path, TAR)
    os.truncate(tmp_path / "a.tar", at)
    if 0 < at < 1024:  # not one whole member is left to tell by
        assert bad(open_table(tmp_path / "a.tar").index(0)).keys() == {"000"}
        return
    table = open_table(tmp_path / "a.tar")
    after = table.index(0)
    assert after.digest == before.digest and len(after) == 10
    assert set(bad(after).values()) == {f"the tar was cut off: it has {at:,} of {len(TAR):,} bytes"}
    kept = {key for key in KEYS if place_of(f"{key}.txt") + BLOCK + 300 <= at}
    assert good(tmp_path) == {key: WHOLE[key] for key in kept}
    (tmp_path / "a.tar").write_bytes(TAR)
    assert good(tmp_path) == WHOLE  # mended


@pytest.mark.fault(46)
def test_another_smaller_tar_is_not_taken_for_a_cut_one(tmp_path: Path) -> None:
    indexed(tmp_path, TAR)
    index = indexed(tmp_path, tar_of([("new.txt", b"n" * 300), *PAIRS[:2]]))
    assert [index.key(n) for n in range(len(index))] == ["new", "000"] and not index.bad


NOT_TARS = {
    "empty": (b"", "the file is empty"),
    "words": (b"words, not a tar " * 100, "not a tar file: it begins with"),
    "gzip": (gzip.compress(TAR), "not a plain tar, but gzip.*unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(5000), "but zstd"),
    "zeros": (bytes(10240), "holds no samples"),
    "without-samples": (tar_of([("README", b"words")]), "holds no samples; a sample is files such as"),
    "cut-in-its-first-header": (TAR[:300], "not a tar file|cut off in a header"),
}


@pytest.mark.fault(47)
@pytest.mark.parametrize("kind", NOT_TARS)
def test_a_shard_that_is_no_tar_is_named_and_counted_while_others_go_on(tmp_path: Path, kind: str, caplog) -> None:
    data, message = NOT_TARS[kind]
    write(tmp_path / "000.tar", PAIRS)
    (tmp_path / "001.tar").write_bytes(data)
    write(tmp_path / "002.tar", PAIRS)
    with caplog.at_level(logging.WARNING):
        table = open_table(tmp_path / "*.tar")
    assert len(table) == 20 and table.locate(10) == (2, 0)
    assert table.bad_counts.empty_shards == 1 and table.bad_counts.damaged_places == 1
    ((shard, key, why),) = table.faults()
    assert shard.endswith("001.tar") and key == "" and re.search(message, why)
    assert re.search(rf"001\.tar: .*({message})", caplog.text)


@pytest.mark.fault(47)
def test_a_shard_without_samples_has_no_lengths_and_stops_nothing(tmp_path: Path, tiny_model: Path) -> None:
    write(tmp_path / "000.tar", PAIRS)
    (tmp_path / "001.tar").write_bytes(b"")
    source = SourceSettings(shards=[str(tmp_path / "*.tar")], prompt="What is it?", answer="{{ text }}")
    lengths = measure(ShardTable.open([source]), Phi3VProcessor.from_pretrained(tiny_model))
    assert len(lengths) == 10 and (lengths.tokens > 0).all()


@pytest.mark.fault(47)
def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "000.tar").write_bytes(b"")
    (tmp_path / "001.tar").write_bytes(gzip.compress(TAR))
    (problem,) = problems(tmp_path / "{000..001}.tar")
    assert "no shard holds a sample" in problem and "the file is empty" in problem


def test_two_joined_tars_are_one(tmp_path: Path) -> None:
    other = tar_of([(f"1{name}", data) for name, data in PAIRS])
    assert len(indexed(tmp_path, TAR + other)) == 20
    assert len(good(tmp_path)) == 20


# --- names and kinds of members (51 to 57) ---------------------------------------------------------------------------


@pytest.mark.fault(54)
@pytest.mark.fault(55)
def test_a_text_whose_only_picture_is_of_a_kind_nobody_reads_is_named(tmp_path: Path) -> None:
    both = [("both.txt", b"words"), ("both.svg", b"<svg/>"), ("both.jpg", JPEG)]
    drawing = [("drawing.txt", b"words"), ("drawing.svg", b"<svg/>")]
    index = indexed(tmp_path, tar_of([*both, *drawing, ("v1.2.txt", b"words"), ("v1.2.jpg", JPEG)]))
    assert bad(index).keys() == {"drawing", "v1"}
    assert "svg is a picture of a kind that is not read" in bad(index)["drawing"]
    assert "a key ends at the first dot" in bad(index)["v1"]


@pytest.mark.fault(51)
def test_names_that_lead_elsewhere_are_keys_and_nothing_else(tmp_path: Path) -> None:
    names = ["../../up", "/etc/absolute", "a/../b", "C:\\dos", "$(id)", "-rf"]
    folder = tmp_path / "shards"
    folder.mkdir()
    index = indexed(folder, tar_of([(f"{name}.txt", b"x") for name in names]))
    assert sorted(good(folder)) == sorted(names) and not index.bad
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert {path.name for path in folder.iterdir()} == {"a.tar", "a.tar.index.safetensors"}


@pytest.mark.fault(52)
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_a_link_or_device_in_place_of_a_file_spoils_its_sample(tmp_path: Path, kind: bytes) -> None:
    link = tarfile.TarInfo("004.0.jpg")
    link.type, link.linkname = kind, "000.jpg"
    place = place_of("004.txt")
    index = indexed(tmp_path, TAR[:place] + link.tobuf() + TAR[place:])
    assert bad(index).keys() == {"004"} and "0.jpg is a link or a device" in bad(index)["004"]
    assert good(tmp_path) == all_but("004")


@pytest.mark.fault(52)
def test_a_file_stored_without_its_holes_spoils_its_sample(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("004.npy")
    entry.size, entry.pax_headers = 512, {"GNU.sparse.map": "0,512", "GNU.sparse.size": "512"}
    place = place_of("004.txt")
    index = indexed(tmp_path, TAR[:place] + entry.tobuf(tarfile.PAX_FORMAT) + bytes(512) + TAR[place:])
    assert bad(index).keys() == {"004"} and "--sparse" in bad(index)["004"]
    assert good(tmp_path) == all_but("004")


@pytest.mark.fault(53)
@pytest.mark.parametrize("apart", [False, True])
def test_of_two_members_of_one_name_the_first_is_used_once_and_it_is_noted(tmp_path: Path, apart: bool) -> None:
    again = [("003.txt", b"again"), ("003.JPG", b"again")]
    index = indexed(tmp_path, tar_of([*PAIRS, *again] if apart else [*PAIRS[:8], *again, *PAIRS[8:]]))
    assert good(tmp_path) == WHOLE and not index.bad
    assert index.notes.keys() == {3} and "the first is used" in index.notes[3]
    assert open_table(tmp_path / "a.tar").bad_counts.notes == 1


@pytest.mark.fault(54)
def test_members_apart_are_joined_and_a_picture_without_text_is_bad(tmp_path: Path) -> None:
    pictures, texts = PAIRS[0::2], PAIRS[1::2]
    index = indexed(tmp_path, tar_of([*pictures, ("orphan.jpg", JPEG), *texts]))
    assert bad(index) == {"orphan": "it has no .json and no .txt beside its pictures (members: jpg)"}
    assert good(tmp_path) == WHOLE


@pytest.mark.fault(55)
def test_a_key_ends_at_the_first_dot_of_the_file_name_as_in_webdataset(tmp_path: Path) -> None:
    indexed(tmp_path, tar_of([("v1.2/photo.txt", b"1"), ("photo.v2.txt", b"2"), ("photo.v3.txt", b"3")]))
    assert good(tmp_path) == {"v1.2/photo": {"txt": b"1"}, "photo": {"v2.txt": b"2", "v3.txt": b"3"}}


@pytest.mark.fault(56)
def test_a_member_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_MEMBER_BYTES", 1000)
    asked: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: asked.append(size) or pread(file, size, offset))
    index = indexed(tmp_path, tar_of([*PAIRS, ("big.txt", bytes(100_000)), ("big.jpg", JPEG)]))
    assert bad(index).keys() == {"big"} and "100,000 bytes, over the limit of 1,000" in bad(index)["big"]
    assert max(asked) <= 1000


@pytest.mark.fault(56)
def test_compressed_members_are_handed_on_as_they_are(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    indexed(tmp_path, tar_of([("a.txt", b"words"), ("a.json.gz", bomb)]))
    assert good(tmp_path) == {"a": {"txt": b"words", "json.gz": bomb}}


class _Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.fault(57)
@pytest.mark.parametrize("name", ["pyd", "pkl", "pickle", "0.pth", "pt", "PKL"])
def test_a_pickle_is_never_opened_and_its_sample_is_bad(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    index = indexed(tmp_path, tar_of([*PAIRS, (f"004.{name}", pickle.dumps(_Canary(canary)))]))
    assert bad(index).keys() == {"004"} and "is a pickle" in bad(index)["004"]
    assert good(tmp_path) == all_but("004") and not canary.exists()


# --- addresses and ranks (58, 59) ------------------------------------------------------------------------------------


@pytest.mark.fault(58)
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("pipe:touch {canary}", "`pipe:` would run a command"), ("PIPE:touch {canary}", "would run a command"),
        ("file:///etc/passwd", "write a local path without"), ("ssh://host/a.tar", "`ssh://` cannot be read"),
        ("memory://a.tar", "`memory://` cannot be read"),
    ],
)  # fmt: skip
def test_addresses_that_run_or_mean_something_else_are_refused(tmp_path: Path, address: str, message: str) -> None:
    canary = tmp_path / "canary"
    (problem,) = problems(address.format(canary=canary))
    assert message in problem and not canary.exists()


@pytest.mark.fault(59)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_fewer_shards_than_ranks_still_split_exactly(tmp_path: Path, num_ranks: int) -> None:
    for n in range(3):
        write(tmp_path / f"{n}.tar", [(f"{n}{name}", data) for name, data in PAIRS])
    table = open_table(tmp_path / "*.tar")
    rows = tuple(
        PlannedRow((i,), tokens=10 + i, squared_tokens=(10 + i) ** 2, label_tokens=5, crops=0)
        for i in range(len(table))
    )
    micro_steps = accumulation(len(rows), num_ranks)
    dealt = assign(PlannedStep(1, rows, 1, 1, {}), num_ranks, micro_steps)
    assert {len(micro_step) for micro_step in dealt} == {num_ranks}
    assert sorted(row.sample_ids[0] for step in dealt for row in step if row) == list(range(len(table)))


@pytest.mark.fault(59)
def test_a_shard_given_twice_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", PAIRS)
    with pytest.raises(DataError, match="named more than once"):
        ShardTable.open([SourceSettings(shards=[str(tmp_path / "a.tar"), str(tmp_path / "*.tar")])])
