"""A sample longer than a row is cut by the named policy: counted exactly, pictures whole, answers untouched."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter

from phi3v_dist.config import SourceSettings
from phi3v_dist.data import outcomes
from phi3v_dist.data.batch import Example
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.fit import GAP, FitPolicy
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.loader import Decoder
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import Message, Sample
from phi3v_dist.data.shards import ShardTable

WORDS = "What is it? Say hello. A red square, Price: 12345. "


def processor_of(
    folder: Path, name: str = "drop", limit_tokens: int | None = None, num_crops: int = 4
) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(folder, num_crops, FitPolicy(name, limit_tokens))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tiny_model: Path) -> Phi3VProcessor:
    return processor_of(tiny_model, num_crops=1)


def sample_of(*turns: tuple[str, tuple[str | int, ...]], sizes_wh: tuple[tuple[int, int], ...] = ()) -> Sample:
    images = tuple(np.full((height, width, 3), 200, np.uint8) for width, height in sizes_wh)
    return Sample(0, "a.tar", "0", "a", tuple(Message(role, parts) for role, parts in turns), images)


def counted(processor: Phi3VProcessor, sample: Sample) -> tuple[int, int, int, int]:
    """What `count` says, after asserting that `encode` does it."""
    length = processor.count(sample.messages, [(image.shape[1], image.shape[0]) for image in sample.images])
    example = processor.encode(sample)
    assert length[:3] == (len(example.input_ids), (example.labels != -100).sum(), len(example.pixel_values))
    return length


def answers(example: Example) -> list[int]:
    return example.labels[example.labels != -100].tolist()


TWO_PICTURES = sample_of(
    ("user", (0, 1, WORDS)), ("assistant", ("A red square.",)), sizes_wh=((400, 300), (300, 900))
)  # fmt: skip


def test_drop_changes_nothing_and_needs_no_new_lengths_for_other_rows(tiny_model: Path) -> None:
    unlimited, drop = processor_of(tiny_model), processor_of(tiny_model, "drop", 400)
    assert counted(drop, TWO_PICTURES) == counted(unlimited, TWO_PICTURES)
    assert drop.digest == unlimited.digest
    digests = [processor_of(tiny_model, name, n).digest for name in ("fewer_crops", "truncate_text") for n in (400, 9)]
    assert len({unlimited.digest, *digests}) == 5


@pytest.mark.fault(77)
def test_fewer_crops_takes_the_most_crops_that_fit(tiny_model: Path) -> None:
    alone = {n: counted(processor_of(tiny_model, num_crops=n), TWO_PICTURES).tokens for n in range(1, 10)}
    assert alone[9] > alone[5] > alone[3] > alone[1]
    for limit in {tokens + more for tokens in alone.values() for more in (-1, 0, 1)}:
        fitting = [n for n in alone if alone[n] <= limit]
        length = counted(processor_of(tiny_model, "fewer_crops", limit, num_crops=9), TWO_PICTURES)
        assert length.tokens == (alone[max(fitting)] if fitting else alone[9]), limit
        assert length.full_tokens == alone[9]


def test_a_sample_cut_into_fewer_crops_is_the_one_with_that_setting(tiny_model: Path) -> None:
    whole = counted(processor_of(tiny_model, num_crops=4), TWO_PICTURES).tokens
    cut = processor_of(tiny_model, "fewer_crops", whole - 1).encode(TWO_PICTURES)
    plain = processor_of(tiny_model, num_crops=3).encode(TWO_PICTURES)
    assert torch.equal(cut.input_ids, plain.input_ids) and torch.equal(cut.pixel_values, plain.pixel_values)
    assert torch.equal(cut.labels, plain.labels) and torch.equal(cut.image_sizes, plain.image_sizes)


def test_a_picture_too_thin_for_fewer_crops_leaves_the_sample_whole(tiny_model: Path) -> None:
    thin = sample_of(("user", (0,)), ("assistant", ("A.",)), sizes_wh=((1000, 2),))  # 2 x 336 px / 500 is 1 px
    length = counted(processor_of(tiny_model, "fewer_crops", 300), thin)
    assert length.tokens == length.full_tokens > 300


def test_texts_are_cut_in_the_middle_the_longest_to_one_length(tiny_model: Path) -> None:
    first, last = "Say hello. ", " What is it?"
    sample = sample_of(
        ("system", (first + "red " * 90 + last,)), ("user", ("A red square? ", 0, first + "blue " * 70 + last)),
        ("assistant", ("A red square. " * 20,)), ("user", ("Say hello.",)), ("assistant", ("hello",)),
        sizes_wh=((336, 336),),
    )  # fmt: skip
    whole = processor_of(tiny_model).encode(sample)
    limit = len(whole.input_ids) - 90
    processor = processor_of(tiny_model, "truncate_text", limit)
    example = processor.encode(sample)
    assert limit - 10 <= counted(processor, sample).tokens <= limit
    assert answers(example) == answers(whole) and (example.input_ids == -1).sum() == (whole.input_ids == -1).sum()
    ids = [i for i in example.input_ids.tolist() if i >= 0]
    text = processor.tokenizer.decode(ids)
    assert text.count(GAP) == 2 and text.count("A red square? ") == 1
    before, between, after = text.split(GAP)
    assert before.split("\n")[1].startswith(first + "red red") and between.startswith(" red red")
    assert last + "<|end|>" in between and between.endswith(" blue ") and after.startswith(" blue blue")
    assert abs(text.count("red red") - text.count("blue blue")) <= 3


@pytest.mark.parametrize("name", ["fewer_crops", "truncate_text"])
@pytest.mark.fault(77)
def test_what_cannot_be_made_to_fit_stays_whole_to_be_left_out(name: str, tiny_model: Path) -> None:
    long_answer = sample_of(("user", (WORDS * 9,)), ("assistant", ("hello " * 300,)))
    length = counted(processor_of(tiny_model, name, 200), long_answer)
    assert length.tokens == length.full_tokens > 300
    short_texts = sample_of(("user", ("What is it?", 0)), ("assistant", ("A.",)), sizes_wh=((336, 336),))
    assert counted(processor_of(tiny_model, name, 320), short_texts).tokens > 320


def test_a_prompt_is_cut_as_its_conversation_is(tiny_model: Path) -> None:
    sample = sample_of(("user", (0, WORDS * 20)), ("assistant", ("A red square.",)), sizes_wh=((400, 300),))
    for name, limit in (("fewer_crops", 1000), ("truncate_text", 500)):
        processor = processor_of(tiny_model, name, limit, num_crops=4 if name == "fewer_crops" else 1)
        example, prompt = processor.encode(sample), processor.encode_prompt(sample.messages, sample.images)
        assert counted(processor, sample).tokens <= limit < counted(processor, sample).full_tokens
        assert example.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
        assert torch.equal(example.pixel_values, prompt.pixel_values) and not answers(prompt)


TEXTS = st.lists(st.sampled_from(["red ", "square", "Price: 12", "\n", " ", "😀é漢", "x" * 40, "<|end|>"]), max_size=60)
TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS.map("".join)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(turns=TURNS, limit=st.integers(16, 400), shown=st.booleans())
@pytest.mark.fault(77)
def test_texts_cut_fit_unless_left_out_and_keep_answers_and_pictures(
    whole: Phi3VProcessor, turns: list[tuple[str, str]], limit: int, shown: bool
) -> None:
    parts: list[tuple[str, tuple[str | int, ...]]] = [(role, (text,)) for role, text in turns]
    sample = sample_of(*parts, ("user", (0, "x" * 9) if shown else ("x",)), sizes_wh=((30, 30),))
    cutting = copy.copy(whole)
    cutting.fit_policy = FitPolicy("truncate_text", limit)
    before, after, length = whole.encode(sample), cutting.encode(sample), counted(cutting, sample)
    assert length.full_tokens == len(before.input_ids)
    assert answers(after) == answers(before)
    assert after.input_ids[after.input_ids < 0].tolist() == before.input_ids[before.input_ids < 0].tolist()
    if length.tokens == length.full_tokens:
        assert torch.equal(after.input_ids, before.input_ids)
    else:
        assert length.tokens <= limit < length.full_tokens
        assert "\ufffd" not in whole.tokenizer.decode(after.input_ids.clamp(min=0))


# --- shards --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Small, wide picture, long question, long answer, damaged."""
    question = {"small": "What is it?", "wide": "What is it?", "long": WORDS * 20, "never": "What is it?", "bad": "x"}
    with TarWriter(str(tmp_path / "a.tar"), mtime=0) as tar:
        for key, text in question.items():
            answer = "red " * 900 if key == "never" else "A red square."
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            width = 900 if key == "wide" else 300
            record = b"{" if key == "bad" else json.dumps({"messages": turns}).encode()
            tar.write({"__key__": key, "json": record, "0.jpg": picture("red", width, 300)})
    return tmp_path / "a.tar"


@pytest.mark.parametrize(
    ("name", "cut", "left_out"),
    [
        ("drop", [], ["wide", "long", "never"]),
        ("fewer_crops", ["wide"], ["long", "never"]),
        ("truncate_text", ["long"], ["wide", "never"]),
    ],
)
@pytest.mark.fault(77)
@pytest.mark.supports("fit", on="one process")
def test_every_sample_is_used_cut_or_left_out_and_named(
    name: str, cut: list[str], left_out: list[str], shard: Path, tiny_model: Path
) -> None:
    policy = FitPolicy(name, 600)  # type: ignore[arg-type]
    table = ShardTable.open([SourceSettings(shards=[str(shard)])])
    processor = Phi3VProcessor.from_pretrained(tiny_model, num_crops=3, fit_policy=policy)
    lengths = measure(table, processor)
    decoder = Decoder(table, Fetcher(table), processor)
    for i in np.flatnonzero((lengths.tokens > 0) & (lengths.tokens <= 600)):
        assert len(decoder.example(int(i), int(lengths.tokens[i])).input_ids) == lengths.tokens[i]
    named = [[n.split(":")[1] for n in outcomes.names(o, table, lengths, 9)] for o in outcomes.cut(lengths, policy)]
    assert named == ([cut] if cut else [])
    too_long, unusable = outcomes.left_out(lengths, policy)
    assert [n.split(":")[1] for n in outcomes.names(too_long, table, lengths, 9)] == left_out
    assert str(too_long).startswith(f"{len(left_out)} longer than `data.row_length_tokens` 600")
    assert "JSON cannot be read" in outcomes.names(unusable, table, lengths, 9)[0]


def test_lengths_are_measured_again_for_another_row_only_where_it_decides_them(shard: Path, tiny_model: Path) -> None:
    measured: list[tuple[int, int]] = []
    table = ShardTable.open([SourceSettings(shards=[str(shard)])])
    for name, limit in [("drop", 800), ("drop", 700), ("fewer_crops", 800), ("fewer_crops", 700), ("fewer_crops", 800)]:
        measure(table, processor_of(tiny_model, name, limit), on_progress=lambda *numbers: measured.append(numbers))
    assert len(measured) == 3
