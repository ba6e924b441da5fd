"""Long documents: what is in their shards, that the answer stands where it is said to, seed, length."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
import webdataset

from phi3v_dist.cli import prepare
from phi3v_dist.config import SourceSettings
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.importers.catalogue.chapters import LongDocumentSettings, chance, plan_documents
from phi3v_dist.data.importers.catalogue.garments import GARMENTS
from phi3v_dist.data.importers.documents import write_documents
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.lint import LintOptions, lint
from phi3v_dist.data.loader import Decoder
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import ConfigError, DataError

SMALL = LongDocumentSettings(
    train_documents=2, validation_documents=6, document_tokens=(5000, 6500), pages_per_question=3,
    text_tokens_per_page=300, samples_per_shard=4, image_side_px=(64, 80),
)  # fmt: skip


@pytest.fixture(scope="module")
def documents(tmp_path_factory, tiny_model) -> Path:
    out = tmp_path_factory.mktemp("long")
    write_documents(out, SMALL, tiny_model)
    return out


def records(folder: Path, split: str = "*") -> list[dict]:
    """The samples' JSON, as the plain webdataset library reads it."""
    shards = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    return [sample["json"] for sample in webdataset.WebDataset(shards, shardshuffle=False).decode()]


def pages_of(record: dict) -> list[tuple[str, str]]:
    """(article, picture) of every page, in reading order."""
    parts = [part for turn in record["messages"] if turn["role"] == "user" for part in turn["content"]]
    return [
        (words["text"].split()[-1], picture["image"])
        for words, picture in zip(parts, parts[1:], strict=False)
        if picture["type"] == "image"
    ]


def test_the_answer_stands_where_the_depth_says(documents: Path, tiny_model: Path) -> None:
    for record in records(documents):
        pages = pages_of(record)
        asked = record["messages"][-2]["content"][-1]["text"]
        (found,) = [n for n, (article, _) in enumerate(pages) if asked == f"Which product is article {article}?"]
        assert found + 1 == record["page"]
        assert found / (len(pages) - 1) == record["depth"]
        assert pages[found][1] == f"{found}.jpg", "the picture of that page"
        (said,) = record["messages"][-1]["content"]
        assert said["text"].startswith(
            f"Product: {record['title']}, Category: {record['category3_code']}, Full Price: "
        )
        earlier = [turn["content"] for turn in record["messages"][:-1] if turn["role"] == "assistant"]
        assert earlier and not any(f"Product: {record['title']}," in words["text"] for (words,) in earlier)


def test_the_depth_in_pages_is_the_depth_in_tokens(documents: Path, tiny_model: Path) -> None:
    """Pages are about equally long, so where its picture begins in the token sequence is the same share."""
    table = ShardTable.open([SourceSettings(shards=str(documents / "validation-*.tar"))])
    processor = Phi3VProcessor.from_pretrained(tiny_model, num_crops=1)
    decoder = Decoder(table, Fetcher(table), processor)
    for sample_id in range(len(table)):
        sample = decoder.sample(sample_id)
        ids = processor.encode(sample).input_ids
        page, num_pages = int(sample.fields["page"]), int(sample.fields["num_images"])
        begins = int((ids == -page).nonzero()[0]) / len(ids)
        assert begins == pytest.approx((page - 1) / num_pages, abs=0.06)
        assert torch.unique(ids[ids < 0]).numel() == num_pages


def test_lengths_and_pictures_are_those_recorded_and_those_asked_for(documents: Path, tiny_model: Path) -> None:
    table = ShardTable.open([SourceSettings(shards=str(documents / "*.tar"))])
    lengths = measure(table, Phi3VProcessor.from_pretrained(tiny_model, num_crops=1))
    found = records(documents)
    assert not lengths.bad
    assert lengths.tokens.tolist() == [record["num_tokens"] for record in found]
    assert (lengths.crops // 2).tolist() == [record["num_images"] for record in found]
    for tokens in lengths.tokens.tolist():
        assert any(0 <= wanted - tokens <= 80 for wanted in SMALL.document_tokens), tokens


def test_depths_are_spread_evenly_over_the_documents_of_each_length(documents: Path) -> None:
    found = records(documents, "validation")
    for num_images in {record["num_images"] for record in found}:
        depths = sorted(record["depth"] for record in found if record["num_images"] == num_images)
        assert depths == pytest.approx([0, 0.5, 1], abs=0.5 / (num_images - 1) + 1e-9)


def test_a_hundred_thousand_tokens_are_planned_with_every_depth_bin_full() -> None:
    settings = replace(SMALL, document_tokens=(110_000,), validation_documents=40, pages_per_question=4)
    planned = plan_documents(settings, {110_000: 275})
    held_out = [document for document in planned if document.split == "validation"]
    assert Counter(min(int(document.depth * 4), 3) for document in held_out) == dict.fromkeys(range(4), 10)
    for document in planned:
        titles = {entry.look.title for entry in document.entries}
        articles = {entry.article for entry in document.entries}
        assert len(titles) == len(articles) == 275, "no other page fits the question or the answer"
        assert len(set(document.asked.values())) == len(document.asked), "nothing is asked twice"
        assert all(page < after for after, page in document.asked.items()), "only what was shown is asked for"
        categories = Counter(entry.look.category for entry in document.entries)
        assert max(categories.values()) - min(categories.values()) <= 1


def test_chance_is_what_guessing_a_product_of_the_document_scores(documents: Path) -> None:
    description = json.loads((documents / "documents.json").read_text())
    shares = []
    for record in records(documents, "validation"):
        answered = sum(turn["role"] == "assistant" for turn in record["messages"]) - 1
        shares.append(1 / (record["num_images"] - answered))
    assert description["chance_title"] == pytest.approx(fmean(shares))
    many = plan_documents(replace(SMALL, train_documents=0, validation_documents=60, document_tokens=(9,)), {9: 400})
    assert chance(many)["category"] == pytest.approx(1 / len(GARMENTS), abs=0.01)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    documents: Path, tmp_path: Path, tiny_model: Path
) -> None:
    name = "train-documents-000000.tar"
    few = replace(SMALL, validation_documents=1)
    write_documents(tmp_path / "again", few, tiny_model)
    write_documents(tmp_path / "other", replace(few, seed=1), tiny_model)
    assert (tmp_path / "again" / name).read_bytes() == (documents / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (documents / name).read_bytes()


def test_what_is_there_is_not_drawn_again_and_other_documents_are_refused(
    documents: Path, tmp_path: Path, tiny_model: Path
) -> None:
    shard = documents / "train-documents-000000.tar"
    before = shard.stat().st_mtime_ns
    write_documents(documents, SMALL, tiny_model)
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(DataError, match="other settings.*seed"):
        write_documents(documents, replace(SMALL, seed=1), tiny_model)


def test_the_shards_have_nothing_that_lint_complains_about(documents: Path) -> None:
    table = ShardTable.open([SourceSettings(shards=str(documents / "*.tar"))])
    assert lint(table, LintOptions(decode=True)).findings == {}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"document_tokens": (400,)}, "2 to 768 are possible"),
        ({"document_tokens": (1_000_000,), "text_tokens_per_page": 60}, "2 to 768 are possible"),
        ({"text_tokens_per_page": 60, "pages_per_question": 1}, "set text_tokens_per_page or pages_per_question"),
    ],
)
def test_lengths_that_cannot_be_filled_are_refused(tmp_path: Path, tiny_model: Path, settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        write_documents(tmp_path / "none", replace(SMALL, **settings), tiny_model)


def test_settings_that_cannot_be_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        LongDocumentSettings(train_documents=0, validation_documents=0, document_tokens=(), text_tokens_per_page=3)
    text = str(caught.value)
    assert all(word in text for word in ("both 0", "document_tokens", "text_tokens_per_page=3 must be at least 60"))


@pytest.mark.parametrize("words", [["--long"], ["--model", "tiny"]])
def test_long_and_model_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["prepare.py", "sample", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(ConfigError, match="give --long --model FOLDER together"):
        prepare.run_command()


def test_the_command_writes_documents_and_says_what_guessing_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["document_tokens=[2000]", "train_documents=0", "validation_documents=1", "text_tokens_per_page=300"]
    words = ["sample", "--long", "--out", str(tmp_path / "out"), "--model", str(tiny_model), *settings]
    monkeypatch.setattr("sys.argv", ["prepare.py", *words])
    prepare.run_command()
    out = capsys.readouterr().out
    assert "2,000" in out and "right by guessing" in out
    assert len(records(tmp_path / "out", "validation")) == 1
