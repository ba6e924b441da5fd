"""The published processor reproduced, and structured conversations against it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v_dist.data.batch import Example
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import BadSample, Message, Sample
from phi3v_dist.errors import CheckpointError, ConfigError, DataError

END, USER, ASSISTANT, BOS = 32007, 32010, 32001, 1
SPECIAL_TEXTS = ("<|end|>", "<|user|>", "<|assistant|>\n", "<|endoftext|>", "<|image_1|>", "<s>", "</s>", "<unk>")


@pytest.fixture(scope="module")
def processor(assets_folder: Path) -> Phi3VProcessor:
    """One local crop per picture: 313 tokens, and fast."""
    return Phi3VProcessor.from_pretrained(assets_folder / "phi3_vision", num_crops=1)


@pytest.fixture(scope="module")
def four_crops(assets_folder: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(assets_folder / "phi3_vision", num_crops=4)


def sample_of(
    *turns: tuple[str, tuple[str | int, ...]], images: int = 0, size_wh: tuple[int, int] = (30, 20)
) -> Sample:
    """A sample whose pictures are of one grey each, so that they can be told apart."""
    messages = tuple(Message(role, parts) for role, parts in turns)
    pictures = tuple(np.full((size_wh[1], size_wh[0], 3), 60 * i, np.uint8) for i in range(images))
    return Sample(7, "shards/a.tar", "cat-1", "cats", messages, pictures)


def official(processor: Phi3VProcessor, sample: Sample, prompt: bool = False) -> torch.Tensor:
    """Ids the published processor gives for the chat template's text, pictures numbered as they are read."""
    shown: list[int] = []
    turns = []
    for message in sample.messages:
        content = ""
        for part in message.parts:
            if isinstance(part, int):
                shown.append(part)
            content += part if isinstance(part, str) else f"<|image_{len(shown)}|>"
        turns.append({"role": message.role, "content": content})
    text = processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    return processor(text, [Image.fromarray(sample.images[i]) for i in shown]).input_ids[0]


def learned(example: Example) -> list[int]:
    return example.labels[example.labels != -100].tolist()


# --- the published processor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_crops", [4, 16])
@pytest.mark.parametrize("model", ["phi3_vision", "phi3_5_vision"])
def test_a_call_gives_the_published_ids_sizes_and_shapes(
    model: str, num_crops: int, golden_folder: Path, assets_folder: Path
) -> None:
    processor = Phi3VProcessor.from_pretrained(assets_folder / model, num_crops)
    cases = json.loads((golden_folder / "processor.json").read_text())
    cases = [case for case in cases if (case["model"], case["num_crops"]) == (model, num_crops)]
    assert len(cases) >= 7
    for case in cases:
        names = case["images"] or []
        images = [Image.open(golden_folder / "images" / f"{name}.png") for name in names]
        output = processor(case["text"], images or None)
        expected = chain.from_iterable([r] if isinstance(r, int) else [r[0]] * r[1] for r in case["input_ids_rle"])
        assert output.input_ids.tolist() == [list(expected)], case["case"]
        assert output.attention_mask.tolist() == [[1] * case["length"]], case["case"]
        if not names:
            assert "pixel_values" not in output and "image_sizes" not in output
            continue
        assert output.image_sizes.tolist() == case["image_sizes"], case["case"]
        assert list(output.pixel_values.shape) == case["pixel_values_shape"], case["case"]
        assert sum(output.num_img_tokens) == (output.input_ids < 0).sum(), case["case"]


def test_a_call_fills_with_zeros_after_the_real_crops(four_crops: Phi3VProcessor) -> None:
    image = Image.new("RGB", (300, 100), "red")  # 3 x 1 crops and the global view
    crops, size_hw = four_crops.crops_of(image)
    pixel_values = four_crops("<|image_1|>", image).pixel_values
    assert crops.shape == (4, 3, 336, 336) and size_hw == (336, 1008)
    assert torch.equal(pixel_values[0, :4], crops)
    assert not pixel_values[0, 4:].any() and pixel_values.shape[1] == 5


@pytest.mark.parametrize("model", ["phi3_vision", "phi3_5_vision"])
def test_the_tokenizer_gives_the_published_chat_text_and_ids(
    model: str, golden_folder: Path, assets_folder: Path
) -> None:
    tokenizer = Phi3VProcessor.from_pretrained(assets_folder / model).tokenizer
    cases = [c for c in json.loads((golden_folder / "chat_template.json").read_text()) if c["model"] == model]
    assert len(cases) >= 10
    for case in cases:
        text = tokenizer.apply_chat_template(
            case["messages"], tokenize=False, add_generation_prompt=case["add_generation_prompt"]
        )
        assert text == case["text"]
        assert tokenizer(text).input_ids == case["ids_with_bos"], text
        assert tokenizer(text, add_special_tokens=False).input_ids == case["ids_no_special"], text


@pytest.mark.parametrize(
    ("text", "num_images"),
    [("no place", 1), ("<|image_1|>", 0), ("<|image_1|>", 2), ("<|image_1|><|image_1|>", 1), ("<|image_2|>", 1)],
)
@pytest.mark.fault(79)
def test_placeholders_that_do_not_match_the_pictures_are_refused(
    text: str, num_images: int, processor: Phi3VProcessor
) -> None:
    with pytest.raises(DataError, match=f"its {num_images} pictures.*found"):
        processor(text, [Image.new("RGB", (8, 8))] * num_images)


# --- structured conversations --------------------------------------------------------------------------------------

CONVERSATIONS = {
    "text only": sample_of(("user", ("Hello",)), ("assistant", ("Hi.",))),
    "system turn": sample_of(("system", ("Be brief.",)), ("user", ("2+2?",)), ("assistant", ("4",))),
    "picture first": sample_of(("user", (0, "\nWhat?")), ("assistant", ("A cat.",)), images=1),
    "picture last": sample_of(("user", ("Look at ", 0)), ("assistant", ("A cat.",)), images=1),
    "three pictures": sample_of(("user", (0, "\n", 1, 2, " Compare.")), ("assistant", ("Same.",)), images=3),
    "pictures out of order": sample_of(("user", (2, " and ", 0, 1)), ("assistant", ("Yes.",)), images=3),
    "several turns": sample_of(
        ("user", (0, "What?")),
        ("assistant", ("A cat.",)),
        ("user", ("And", 1, "?")),
        ("assistant", ("A dog.",)),
        images=2,
    ),
    "picture in an answer": sample_of(("user", ("Draw.",)), ("assistant", (" \n", 0, " done")), images=1),
    "spaces around": sample_of(("user", ("  two before and after  ",)), ("assistant", ("ends in newlines\n\n",))),
    "space before the answer": sample_of(("user", ("x",)), ("assistant", ("\n \u3000\x85Answer",))),
    "separator that is no space": sample_of(("user", ("x",)), ("assistant", ("\x1c Answer",))),
    "answer of spaces": sample_of(("user", (" ",)), ("assistant", (" \n",))),
    "empty": sample_of(("user", ("",)), ("assistant", ())),
    "parts": sample_of(("user", ("He", "llo", " wor", "ld")), ("assistant", (" ", " He", "y"))),
    "unicode": sample_of(("user", ("été 漢字 😀👩‍👩‍👧 \u200f\x00",)), ("assistant", ("\ufeffñ\r\n\tذ",))),
    "no answer yet": sample_of(("user", ("Hello",))),
}


@pytest.mark.parametrize("sample", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_a_conversation_has_the_ids_of_its_chat_text(sample: Sample, processor: Phi3VProcessor) -> None:
    assert processor.encode(sample).input_ids.tolist() == official(processor, sample).tolist()


@pytest.mark.parametrize("sample", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_a_prompt_is_the_beginning_of_its_conversation(sample: Sample, processor: Phi3VProcessor) -> None:
    example = processor.encode(sample)
    prompt = processor.encode_prompt(sample.messages, sample.images, sample.sample_id)
    has_answer = sample.messages[-1].role == "assistant"
    asked = replace(sample, messages=sample.messages[:-1] if has_answer else sample.messages)
    assert prompt.input_ids.tolist() == official(processor, asked, prompt=True).tolist()
    assert prompt.input_ids[-1] == ASSISTANT and learned(prompt) == []
    if has_answer:
        assert example.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
        assert END in example.labels[len(prompt.input_ids) :]


def conversations(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[tuple[str, tuple[str | int, ...]]]]:
    """Turns for `sample_of(…, images=2)`, each picture shown once at most."""
    parts = st.lists(st.one_of(texts, texts, st.integers(0, 1)), max_size=4)
    turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), parts), min_size=1, max_size=4)
    return turns.map(without_repeats)


def without_repeats(turns: list[tuple[str, list[str | int]]]) -> list[tuple[str, tuple[str | int, ...]]]:
    shown: set[int] = set()
    kept = []
    for role, parts in turns:
        kept.append((role, tuple(p for p in parts if isinstance(p, str) or not (p in shown or shown.add(p)))))
    return kept


WORDS = st.one_of(st.text(max_size=12), st.sampled_from([" ", "\n", "  \n", "a", " a", "<|", "|>", "▁", "<0x0A>"]))
ANY_TEXT = st.one_of(WORDS, st.sampled_from(SPECIAL_TEXTS))


@settings(max_examples=60, deadline=None)
@given(turns=conversations(WORDS))
def test_any_ordinary_conversation_has_the_ids_of_its_chat_text(processor: Phi3VProcessor, turns: list) -> None:
    words = "".join(part for _, parts in turns for part in parts if isinstance(part, str))
    assume(not any(text in words for text in [*processor.tokenizer.get_added_vocab(), "<|image_"]))
    sample = sample_of(*turns, images=2)
    assert processor.encode(sample).input_ids.tolist() == official(processor, sample).tolist()


@settings(max_examples=60, deadline=None)
@given(turns=conversations(ANY_TEXT), size_wh=st.tuples(st.integers(10, 80), st.integers(10, 80)))
def test_the_counted_length_is_that_of_the_example(
    four_crops: Phi3VProcessor, turns: list, size_wh: tuple[int, int]
) -> None:
    sample = sample_of(*turns, images=2, size_wh=size_wh)
    example = four_crops.encode(sample)
    length = four_crops.count(sample.messages, [size_wh, size_wh])
    tokens = len(example.input_ids)
    assert length == (tokens, len(learned(example)), len(example.pixel_values), tokens)
    assert len(example.labels) == length.tokens


def test_answers_and_their_end_are_learned_and_nothing_else(processor: Phi3VProcessor) -> None:
    example = processor.encode(
        sample_of(
            ("system", ("S",)),
            ("user", (0, "\nCompare")),
            ("assistant", ("They differ.",)),
            ("user", ("How?",)),
            ("assistant", ("In size.",)),
            images=1,
        )
    )
    assert learned(example) == [2688, 1163, 29889, END, 512, 2159, 29889, END]
    where = example.labels != -100
    assert torch.equal(example.labels[where], example.input_ids[where])
    assert example.labels[-2:].tolist() == [-100, -100]  # the newline after <|end|>: generation has stopped


def test_a_picture_in_an_answer_is_not_learned(processor: Phi3VProcessor) -> None:
    example = processor.encode(sample_of(("user", ("Draw.",)), ("assistant", ("Here: ", 0, "!")), images=1))
    assert min(learned(example)) > BOS
    assert learned(example)[-1] == END and (example.input_ids == -1).sum() == 313


def test_pictures_are_numbered_as_they_are_read(processor: Phi3VProcessor) -> None:
    example = processor.encode(sample_of(("user", (1, "then", 0)), ("assistant", ("ok",)), images=2))
    picture_ids = example.input_ids[example.input_ids < 0]
    assert picture_ids.unique_consecutive().tolist() == [-1, -2]
    first_is_lighter = example.pixel_values[1, 0, 168, 168] > example.pixel_values[3, 0, 168, 168]
    assert example.pixel_values.shape == (4, 3, 336, 336) and first_is_lighter


def test_an_example_without_pictures_has_empty_tensors(processor: Phi3VProcessor) -> None:
    example = processor.encode(CONVERSATIONS["text only"])
    assert example.pixel_values.shape == (0, 3, 336, 336) and example.pixel_values.dtype == torch.float32
    assert example.image_sizes.shape == (0, 2) and example.image_sizes.dtype == torch.int64
    assert example.input_ids.dtype == example.labels.dtype == torch.int64 and example.sample_id == 7


def test_threads_may_share_one_processor(processor: Phi3VProcessor) -> None:
    samples = list(CONVERSATIONS.values()) * 2
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(processor.encode, samples))
    for sample, example in zip(samples, together, strict=True):
        alone = processor.encode(sample)
        assert torch.equal(alone.input_ids, example.input_ids) and torch.equal(alone.pixel_values, example.pixel_values)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (sample_of(("tool", ("x",))), "role 'tool'"),
        (sample_of(("user", (1,)), images=1), "picture 1 .* has 1 pictures"),
        (sample_of(("user", (0,)), ("user", ("x", 0)), images=1), "picture 0 .* is shown 2 times"),
        (sample_of(("user", ("half \ud83d",))), "not valid Unicode"),
        (sample_of(("user", (0,)), images=1, size_wh=(2000, 1)), "2000 x 1 px"),
    ],
)
@pytest.mark.fault(67)
@pytest.mark.fault(79)
@pytest.mark.fault(80)
def test_a_sample_that_cannot_be_encoded_names_shard_key_and_reason(
    sample: Sample, reason: str, processor: Phi3VProcessor
) -> None:
    with pytest.raises(BadSample, match=f"shards/a.tar.*cat-1.*{reason}"):
        processor.encode(sample)
    sizes_wh = [(image.shape[1], image.shape[0]) for image in sample.images]
    with pytest.raises(DataError, match=reason):
        processor.count(sample.messages, sizes_wh)


# --- loading -------------------------------------------------------------------------------------------------------


def test_the_model_folder_sets_the_number_of_crops_unless_told(assets_folder: Path) -> None:
    assert Phi3VProcessor.from_pretrained(assets_folder / "phi3_vision").num_crops == 16
    assert Phi3VProcessor.from_pretrained(assets_folder / "phi3_5_vision").num_crops == 4
    assert Phi3VProcessor.from_pretrained(assets_folder / "phi3_5_vision", num_crops=2).num_crops == 2


def test_the_digest_changes_with_what_decides_lengths(
    assets_folder: Path, processor: Phi3VProcessor, four_crops: Phi3VProcessor
) -> None:
    same = Phi3VProcessor.from_pretrained(assets_folder / "phi3_vision", num_crops=1)
    assert processor.digest == same.digest != four_crops.digest


def test_generation_stops_at_the_ids_of_the_stop_tokens(processor: Phi3VProcessor) -> None:
    assert processor.stop_ids == (END, 32000, ASSISTANT)


@pytest.fixture
def model_folder(assets_folder: Path, tmp_path: Path) -> Iterator[Path]:
    yield copytree(assets_folder / "phi3_vision", tmp_path / "model")


def test_missing_files_are_named(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json, preprocessor_config.json not found in .*model"):
        Phi3VProcessor.from_pretrained(model_folder)


@pytest.mark.parametrize(("content", "reason"), [("{}", "no entry 'image_mean'"), ("{", "is not JSON")])
def test_a_damaged_preprocessor_file_is_named(content: str, reason: str, model_folder: Path) -> None:
    (model_folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json.*{reason}"):
        Phi3VProcessor.from_pretrained(model_folder)


def test_no_crops_at_all_is_refused(assets_folder: Path) -> None:
    with pytest.raises(ConfigError, match="num_crops is 0"):
        Phi3VProcessor.from_pretrained(assets_folder / "phi3_vision", num_crops=0)


def test_a_tokenizer_of_another_kind_is_refused(model_folder: Path) -> None:
    path = model_folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|system|>", "<|sys|>"))
    config = model_folder / "tokenizer_config.json"
    state = json.loads(config.read_text().replace("<|system|>", "<|sys|>"))
    state["added_tokens_decoder"]["32001"]["rstrip"] = False
    config.write_text(json.dumps(state))
    with pytest.raises(CheckpointError) as caught:
        Phi3VProcessor.from_pretrained(model_folder)
    assert any("no token <|system|>" in problem for problem in caught.value.problems)
    assert any("<|assistant|> must have lstrip=false and rstrip=true" in problem for problem in caught.value.problems)
