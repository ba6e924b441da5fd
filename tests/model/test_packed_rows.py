"""Documents in a row do not see each other, pictures included, on either side of the original context length."""

from dataclasses import replace

import pytest
import torch

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.batch import Filling, Row, collate
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.loader import Decoder
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.model import Phi3VForCausalLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples(shards, tiny_model):
    table = ShardTable.open([SourceSettings(shards=str(shards / "train-*.tar"))])
    processor = Phi3VProcessor.from_pretrained(tiny_model, num_crops=2)
    decoder = Decoder(table, Fetcher(table), processor)
    return [processor.encode(decoder.sample(i)) for i in range(6)]


@pytest.fixture(scope="module")
def model(tiny_model):
    model = Phi3VForCausalLM.from_pretrained(tiny_model)
    model.rope.original_length = 60  # text-only documents below, pictures above: both branches in one row
    return model


@torch.no_grad()
def test_a_packed_rows_losses_are_those_of_its_samples_alone(model, examples):
    packed = model(**collate(Row(tuple(examples)), pad_id=0).inputs(CPU)).token_losses
    alone = [model(**collate(Row((example,)), pad_id=0).inputs(CPU)).token_losses for example in examples]
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5  # measured: 2e-6


@torch.no_grad()
def test_filling_and_unplaced_crops_change_nothing(model, examples):
    batch = collate(Row((examples[0], Filling(30), examples[1])), pad_id=0)
    crops = torch.cat([batch.pixel_values, torch.randn(1, 3, 336, 336)])
    with_filling = model(**replace(batch, pixel_values=crops).inputs(CPU)).token_losses
    without = model(**collate(Row(tuple(examples[:2])), pad_id=0).inputs(CPU)).token_losses
    assert (with_filling - without).abs().max() <= 1e-5


@torch.no_grad()
def test_the_official_call_gives_the_same_losses_as_the_flat_row(model, examples):
    """[rows, tokens] with padding and the processor's padded crops, against one flat row."""
    pair = [examples[0], examples[3]]  # one with a picture, one without
    length = max(len(e.input_ids) for e in pair)
    ids = torch.stack([torch.nn.functional.pad(e.input_ids, (0, length - len(e.input_ids))) for e in pair])
    labels = torch.stack([torch.nn.functional.pad(e.labels, (0, length - len(e.labels)), value=-100) for e in pair])
    mask = torch.stack([(torch.arange(length) < len(e.input_ids)).long() for e in pair])
    pixels = torch.zeros(1, 3, 3, 336, 336)
    pixels[0, : len(examples[0].pixel_values)] = examples[0].pixel_values
    padded = model(ids, pixels, examples[0].image_sizes, attention_mask=mask, labels=labels)
    flat = model(**collate(Row(tuple(pair)), pad_id=0).inputs(CPU))
    assert (padded.token_losses - flat.token_losses).abs().max() <= 1e-5
    assert padded.loss.item() == pytest.approx(flat.loss.item(), abs=1e-6)


def test_a_row_without_labels_or_pictures_still_reaches_every_parameter(model, examples):
    """What an empty row must do under ZeRO-3: the same modules forward and backward as any other row."""
    model.zero_grad()
    output = model.train()(**collate(Row((Filling(8),)), pad_id=0).inputs(CPU))
    output.token_losses.sum().backward()
    model.eval()
    assert output.token_losses.sum().item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_too_few_or_too_many_image_places_are_refused(model, examples):
    example = examples[0]
    pixels = example.pixel_values[None]
    with pytest.raises(ValueError, match="image tokens"):
        model(example.input_ids[None, :200], pixels, example.image_sizes)
