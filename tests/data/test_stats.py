"""stats counts what is there, and its tokens are those that training will see."""

import json
import sys
from pathlib import Path

import pytest
from conftest import picture, write_samples
from webdataset import TarWriter

from phi3v_dist.cli import prepare
from phi3v_dist.config import SourceSettings
from phi3v_dist.data.crops import num_image_tokens
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.data.stats import NUM_CROPS, collect
from phi3v_dist.errors import ConfigError, DataError


@pytest.fixture
def table(shards: Path) -> ShardTable:
    return ShardTable.open(
        [SourceSettings(shards=[str(shards / f"{side}-*.tar")], name=side) for side in ("train", "validation")]
    )


def test_tokens_are_those_of_training_at_4_and_at_16_crops(table: ShardTable, tiny_model: Path) -> None:
    stats = collect(table, Phi3VProcessor.from_pretrained(tiny_model, NUM_CROPS[0]))
    for tokens in stats.tokens:
        lengths = measure(table, Phi3VProcessor.from_pretrained(tiny_model, tokens.num_crops))
        assert tokens.total == lengths.tokens.sum()
        assert tokens.longest[0][1] == lengths.tokens.max()
        assert tokens.fits == {row: int((lengths.tokens <= row).sum()) for row in (4096, 8192, 32768, 131072)}
    assert stats.usable == 52
    assert sum(source.tokens[16] for source in stats.sources) == stats.tokens[1].total


def test_sources_are_counted_apart_and_pictures_by_size(table: ShardTable) -> None:
    stats = collect(table, None)
    train, validation = stats.sources
    assert (train.name, train.shards, train.samples, train.pictures, train.text_only) == ("train", 2, 40, 31, 9)
    assert (validation.name, validation.shards, validation.samples, validation.unusable) == ("validation", 1, 12, 0)
    assert train.shard_bytes[0] < train.shard_bytes[2] and train.size_bytes == sum(
        Path(shard).stat().st_size for shard in table.shards[:2]
    )
    assert dict(stats.picture_sizes)["under 0.1"] + dict(stats.picture_sizes)["0.1 – 0.25"] == 40
    wide, square = (num_image_tokens(width, 300, 4) for width in (400, 300))
    num_square = dict(stats.picture_sizes)["under 0.1"]
    assert stats.tokens[0].total == stats.tokens[0].image_total == num_square * square + (40 - num_square) * wide


def test_shards_are_shown_as_they_are_indexed_and_counted(tmp_path: Path, tiny_model: Path, shown: list) -> None:
    for number in range(2):
        write_samples(tmp_path / f"a-{number}.tar", range(10 * number, 10 * number + 3))
    table = ShardTable.open([SourceSettings(shards=[f"{tmp_path}/a-*.tar"])])
    collect(table, Phi3VProcessor.from_pretrained(tiny_model, NUM_CROPS[0]))
    assert shown == [
        *(("indexing", done, 2, "shards") for done in (1, 2)),
        *(("reading indexes", done, 2, "shards") for done in (0, 1, 2)),
        *(("counting tokens", done, 2, "shards") for done in (0, 1)),
    ]


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path, tiny_model: Path) -> None:
    with TarWriter(str(tmp_path / "x.tar"), mtime=0) as tar:
        tar.write({"__key__": "broken", "json": b"{"})
        tar.write({"__key__": "no\npicture", "json": b"{}", "jpg": b"<html>"})
    table = ShardTable.open([SourceSettings(shards=[str(tmp_path / "x.tar")])])
    stats = collect(table, Phi3VProcessor.from_pretrained(tiny_model, 4))
    assert stats.usable == 0 and stats.sources[0].unusable == 2 and stats.tokens[0].total == 0
    assert [name.split(":")[-1] for name, _ in stats.bad] == ["broken", r"no\npicture"]


def run_stats(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "stats", *words])
    prepare.run_command()


def test_the_command_prints_tables_or_json(
    shards: Path, tiny_model: Path, config_file: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run_stats(monkeypatch, str(shards / "train-*.tar"), "--json")
    stats = json.loads(capsys.readouterr().out)
    assert stats["sources"][0]["samples"] == 40 and not stats["with_text"]
    run_stats(monkeypatch, "--config", str(config_file))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 200 and "train-000.tar:" in out and "fit into 128k" in out
    assert all(title in out for title in ("shards", "pictures by size", "tokens a sample"))
    run_stats(monkeypatch, str(shards / "train-*.tar"))
    assert "image tokens a sample" in capsys.readouterr().out


def test_many_crops_of_captions_need_no_templates(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TarWriter(str(tmp_path / "x.tar"), mtime=0) as tar:
        tar.write({"__key__": "0", "png": picture("red", 1344, 1344, "PNG"), "txt": b"a red box"})
    run_stats(monkeypatch, str(tmp_path / "x.tar"), "--model", str(tiny_model), "--json")
    out = capsys.readouterr().out
    stats = json.loads(out[out.index("{") :])
    assert stats["usable"] == 1 and stats["tokens"][1]["image_total"] == 2509
    with pytest.raises(DataError, match="no such shard"):
        run_stats(monkeypatch, str(tmp_path / "y.tar"))
    with pytest.raises(ConfigError, match="name shards"):
        run_stats(monkeypatch)
