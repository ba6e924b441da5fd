"""The figures of docs/original.md: those that need no trained model are measured again, and must be on the page."""

import re
from dataclasses import replace
from pathlib import Path

import original_points as original
import pytest
import torch
from conftest import REPOSITORY, TESTS

from phi3v_dist import config
from phi3v_dist.config import Settings
from phi3v_dist.data.importers.sample import CatalogueSettings, plan_products, vocabulary_text
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import Sample
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.tiny import write_tiny
from phi3v_dist.run import Data

PAGE = (REPOSITORY / "docs/original.md").read_text().replace(r"\|", "|")
PRODUCT = {"title": "Red Hat", "category3_code": "HATS", "full_price": 75}


def catalogue(split: str) -> list[dict[str, str | int]]:
    """The products of `make train`, undrawn."""
    planned = [product for product in plan_products(CatalogueSettings()) if product.split == split]
    return [
        {"title": one.look.title, "category3_code": one.look.category, "full_price": one.full_price} for one in planned
    ]


@pytest.fixture(scope="module")
def official(assets_folder: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(assets_folder / "phi3_vision")


@pytest.fixture
def sample(settings_tree: dict) -> Sample:
    """One with a picture."""
    data = Data.open(Settings.model_validate(settings_tree).data.validation, Settings.model_validate(settings_tree))
    return next(one for one in original.read(data) if one.images)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def test_the_image_tag_is_seven_pieces_of_text_and_no_place_for_a_picture(
    official: Phi3VProcessor, sample: Sample
) -> None:
    figures = original.tag_points(official, sample)
    assert len(str(figures["tag, pieces"]).split()) == 7 and f"`{figures['tag, pieces']}`" in PAGE
    assert figures["tag, places for the picture: original"] == 0
    assert figures["tag, places for the picture: here"] > 1000


def test_the_originals_loss_is_a_mean_over_padding(official: Phi3VProcessor) -> None:
    figures = original.loss_points(official, catalogue("train"))
    shares = [figures[f"loss, share of {name}"] for name in ("padding", "the prompt", "the answer")]
    assert sum(shares) == pytest.approx(1)
    assert [share for share in map(percent, shares) if share not in PAGE] == []
    assert figures["loss, tokens of the answer: original"] == figures["loss, tokens of the answer: here"]


def test_without_a_place_for_the_picture_nothing_that_sees_is_trained(tiny_model: Path, sample: Sample) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model, 1)
    model = Phi3VForCausalLM.from_pretrained(tiny_model)
    text = original.text_of(processor.tokenizer, PRODUCT)
    figures = original.gradient_points(model, processor, processor.encode(sample), text)
    assert figures["vision, share with a gradient: original"] == 0
    assert figures["vision, share with a gradient: here"] > 0.99


def test_padding_computed_once_is_padding_computed_for_each_row(tiny_model: Path) -> None:
    tokenizer = Phi3VProcessor.from_pretrained(tiny_model).tokenizer
    model = Phi3VForCausalLM.from_pretrained(tiny_model)
    texts = [original.text_of(tokenizer, PRODUCT | {"title": title}) for title in ("A hat", "A red hat with a bow")]
    together, _ = original.original_loss(model, texts, tokenizer.pad_token_id)
    alone = [original.original_loss(model, [text], tokenizer.pad_token_id)[0] for text in texts]
    assert together.item() == pytest.approx(sum(alone).item() / 2, rel=1e-6)


def test_true_digits_in_the_context_correct_what_an_answer_would_have_said(tiny_model: Path, sample: Sample) -> None:
    """The first token is the model's own in both; from there on the forced one is told the truth."""
    processor = Phi3VProcessor.from_pretrained(tiny_model, 1)
    model = Phi3VForCausalLM.from_pretrained(tiny_model)
    example = processor.encode(sample)
    forced = original.teacher_forced(model, example, processor.tokenizer)
    changed = example.input_ids.clone()
    last = int((example.labels != -100).nonzero()[-3])
    changed[last] = (changed[last] + 1) % 100 + 5
    other = original.teacher_forced(model, replace(example, input_ids=changed), processor.tokenizer)
    assert forced != other


@pytest.mark.parametrize(
    ("words", "price"), [("Price: 1,290", 1290), ("Price: 75.5", 75.5), ("Price: 75x", 0), ("", 0)]
)
def test_the_original_reads_the_last_word_and_takes_what_is_no_number_for_free(words: str, price: float) -> None:
    assert original.price_of(words) == price


def test_its_way_of_training_ends_in_one_answer_for_all(tiny_model: Path) -> None:
    tokenizer = Phi3VProcessor.from_pretrained(tiny_model).tokenizer
    model = original.retrained(tiny_model, [PRODUCT] * 4, 2, tokenizer)
    figures = original.retrained_points(model, [PRODUCT], tokenizer)
    assert figures["retrained, price error of its answers"] == abs(
        75 - original.price_of(str(figures["retrained, its one answer"]))
    )
    assert figures["retrained, validation loss it reports"] < figures["retrained, loss of the answers' tokens"]


@pytest.mark.slow
def test_it_reports_a_small_price_error_and_misses_by_as_much_as_one_price_for_all(tmp_path: Path) -> None:
    """The tiny model of `make train` and its products, fewer steps."""
    write_tiny(tmp_path, vocabulary_text())
    tokenizer = Phi3VProcessor.from_pretrained(tmp_path).tokenizer
    train, validation = catalogue("train"), catalogue("validation")
    model = original.retrained(tmp_path, train, 150, tokenizer)
    figures = original.retrained_points(model, validation, tokenizer)
    (least,) = original.constant_points(train, validation).values()
    reported, true = (figures[f"retrained, price error {name}"] for name in ("it reports", "of its answers"))
    print(figures, f"one price for all: {least}")
    assert true > 0.95 * least > 4 * reported
    assert figures["retrained, loss of the answers' tokens"] > 10 * figures["retrained, validation loss it reports"]


def test_bf16_weights_without_an_fp32_copy_stay_where_they_are() -> None:
    figures = original.precision_points()
    for name in ("matrices", "norms"):
        share = figures[f"weights that {original.NUM_STEPS} steps never moved, {name}: original"]
        assert percent(share) in PAGE
        assert figures[f"weights that {original.NUM_STEPS} steps never moved, {name}: here"] < 0.001


def test_downloads_and_counts_are_what_the_page_says(sample: Sample) -> None:
    downloads, counts = original.download_points(list(sample.images)), original.count_points()
    assert f"{downloads['download, kinds of pictures lost']}" in PAGE
    assert "NoneType" in str(downloads["download, a missing file"])
    with pytest.raises(TypeError):
        torch.tensor("$1,290.00")
    assert f"{counts['epoch, optimizer steps']} steps" in PAGE
    assert f"{counts['epoch, products whose gradient is dropped']} products" in PAGE
    assert percent(counts["split by row, share of twins seen in training"]) in PAGE


def test_a_model_asked_without_a_place_for_the_picture_says_the_same_of_all(tiny_model: Path, sample: Sample) -> None:
    """And one that is handed a picture with no place for it refuses, where the original went on."""
    processor = Phi3VProcessor.from_pretrained(tiny_model, 1)
    model = Phi3VForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([processor.tokenizer(original.ASKED).input_ids])
    crops, size = processor.crops_of(sample.images[0])
    with pytest.raises(ValueError, match="picture|image"):
        model(ids, pixel_values=crops, image_sizes=torch.tensor([size]))


def test_the_commands_settings_are_those_of_the_quickstart() -> None:
    settings = config.load(REPOSITORY / "launch/configs/quickstart.yaml")
    assert settings.train.learning_rate.text == original.PEAK and settings.train.warmup_steps == original.WARMUP_STEPS
    assert settings.eval.max_new_tokens == original.MAX_NEW_TOKENS


def test_the_page_names_tests_that_there_are() -> None:
    sources = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) > 10 and [name for name in named if f"def {name}(" not in sources] == []
