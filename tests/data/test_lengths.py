"""Lengths promised by the plan are those of the encoded samples, and are measured again when they may be others."""

import io
import json
import logging
import shutil
import tarfile
from pathlib import Path

import pytest
from conftest import picture, write_samples

from phi3v_dist.config import SourceSettings, load
from phi3v_dist.data import fetch
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.loader import Decoder
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import DataError
from phi3v_dist.run import Data


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_model, num_crops=1)


@pytest.fixture
def shard(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(shards / "train-000.tar", tmp_path / "a.tar"))


def open_table(shard: Path, **templates: str) -> ShardTable:
    return ShardTable.open([SourceSettings(shards=[str(shard)], **templates)])


def write_answers(path: Path, answers: list[object]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, answer in enumerate(answers):
            turns = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": answer}]
            files = {"json": json.dumps({"messages": turns}).encode(), "jpg": picture("red", 40, 30)}
            for name, data in files.items():
                entry = tarfile.TarInfo(f"{number}.{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def test_lengths_are_those_of_the_encoded_samples(shard: Path, processor: Phi3VProcessor) -> None:
    table = open_table(shard)
    lengths, decoder = measure(table, processor), Decoder(table, Fetcher(table), processor)
    assert len(lengths) == len(table) == 17 and not lengths.bad
    for i in range(len(table)):
        example = decoder.example(i, int(lengths.tokens[i]))
        assert (lengths.label_tokens[i], lengths.crops[i]) == (
            (example.labels != -100).sum(),
            len(example.pixel_values),
        )


def test_lengths_are_measured_once_and_again_for_other_crops_or_templates(
    shard: Path, processor: Phi3VProcessor, tiny_model: Path
) -> None:
    measured: list[tuple[int, int]] = []

    def count(done: int, total: int) -> None:
        measured.append((done, total))

    four_crops = Phi3VProcessor.from_pretrained(tiny_model, num_crops=4)
    asked = [(processor, {})] * 2 + [(four_crops, {})] * 2 + [(four_crops, {"prompt": "What is it?"})] * 2
    lengths = [measure(open_table(shard, **templates), by, on_progress=count) for by, templates in asked]
    assert len(measured) == 3
    assert lengths[0].tokens.tolist() == lengths[1].tokens.tolist() != lengths[2].tokens.tolist()


def test_measuring_reads_no_picture(shard: Path, processor: Phi3VProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_table(shard)
    sizes_bytes: list[int] = []
    pread = fetch.os.pread
    monkeypatch.setattr(
        fetch.os, "pread", lambda file, size, offset: sizes_bytes.append(size) or pread(file, size, offset)
    )
    measure(table, processor)
    texts = [member.size_bytes for i in range(17) for member in table.index(0).members(i) if member.name == "json"]
    assert sorted(sizes_bytes) == sorted(texts)


def test_a_shard_written_anew_in_the_same_size_is_measured_again(tmp_path: Path, processor: Phi3VProcessor) -> None:
    shard = write_answers(tmp_path / "a.tar", ["red", "red"])
    before = measure(open_table(shard), processor)
    size_bytes = shard.stat().st_size
    write_answers(shard, ["red", "red red red"])
    assert shard.stat().st_size == size_bytes
    (tmp_path / "a.tar.index.safetensors").unlink()
    after = measure(open_table(shard), processor)
    assert after.tokens[0] == before.tokens[0] and after.tokens[1] > before.tokens[1]


@pytest.mark.fault(76)
@pytest.mark.fault(80)
def test_samples_of_which_nothing_can_be_learned_are_left_out_with_a_reason(
    tmp_path: Path, processor: Phi3VProcessor
) -> None:
    shard = write_answers(tmp_path / "a.tar", ["red", None, "\ud800", [{"type": "image"}]])
    lengths = measure(open_table(shard), processor)
    assert (lengths.tokens > 0).tolist() == [True, False, False, False]
    assert list(lengths.bad) == [1, 2, 3]
    assert "neither text nor a list" in lengths.bad[1] and "not valid Unicode" in lengths.bad[2]
    assert "no assistant turn has words" in lengths.bad[3]
    templated = measure(open_table(shard, prompt="{{ messages[1].content }}"), processor)
    assert "nothing to learn" in templated.bad[0]


def test_damage_is_not_remembered_once_it_is_mended(shard: Path, processor: Phi3VProcessor) -> None:
    table = open_table(shard)
    whole = shard.read_bytes()
    (member,) = [member for member in table.index(0).members(5) if member.name == "json"]
    shard.write_bytes(whole[: member.offset] + b"?" + whole[member.offset + 1 :])
    assert "checksum" in measure(open_table(shard), processor).bad[5]
    shard.write_bytes(whole)
    assert not measure(open_table(shard), processor).bad


def test_a_disk_that_fails_stops_the_run_and_is_not_taken_for_bad_samples(
    shard: Path, processor: Phi3VProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    table = open_table(shard)
    with monkeypatch.context() as patch:
        patch.setattr(fetch.os, "pread", fail)
        with pytest.raises(DataError, match=r"a\.tar: sample '\d+': json cannot be read: .*Input/output error"):
            measure(table, processor)
    assert not measure(table, processor).bad


def test_a_damaged_lengths_file_is_made_anew(tmp_path: Path, processor: Phi3VProcessor) -> None:
    shard = write_samples(tmp_path / "a.tar", range(3))
    before = measure(open_table(shard), processor)
    (stored,) = tmp_path.glob("a.tar.lengths-*")
    stored.write_bytes(stored.read_bytes()[:50])
    assert measure(open_table(shard), processor).tokens.tolist() == before.tokens.tolist()


def test_the_log_has_a_line_for_each_source_and_none_when_all_is_known(
    config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5):
        write_samples(tmp_path / f"a-{number}.tar", range(10 * number, 10 * number + 3))
    write_samples(tmp_path / "b.tar", range(4))
    sources = f"data.train=[{{shards: {tmp_path}/a-*.tar}}, {{shards: {tmp_path}/b.tar, name: mine}}]"
    settings = load(config_file, [sources])
    with caplog.at_level(logging.INFO, "phi3v_dist"):
        Data.open(settings.data.train, settings)
        assert caplog.messages == [
            "prepared a: 15 samples, 5 shards, tokens counted",
            "prepared mine: 4 samples, 1 shards, tokens counted",
        ]
        Data.open(settings.data.train, settings)
        assert len(caplog.messages) == 2
