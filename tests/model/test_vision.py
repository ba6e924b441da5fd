"""Crops through the vision tower: as bytes or floats, in one call or in chunks, the result is the same."""

import pytest
import torch
from PIL import Image
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.batch import Batch, Filling, Row, collate
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.loader import Decoder
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.model import Phi3VForCausalLM
from phi3v_dist.model.vision import clip_config

CPU = torch.device("cpu")
SAME_GRADIENT = 2e-5  # of its tensor's greatest value; measured: 8e-6 (k_proj.bias, 0 in theory), others 3e-6


@pytest.fixture(scope="module")
def decoder(shards, tiny_model) -> Decoder:
    table = ShardTable.open([SourceSettings(shards=str(shards / "train-*.tar"))])
    processor = Phi3VProcessor.from_pretrained(tiny_model, num_crops=4)
    return Decoder(table, Fetcher(table), processor, crops="fast")


@pytest.fixture
def model(tiny_model) -> Phi3VForCausalLM:
    return Phi3VForCausalLM.from_pretrained(tiny_model).train()


@pytest.mark.parametrize("key", [None, "attn_implementation", "_attn_implementation"])
def test_the_tower_attends_with_sdpa_whatever_its_config_says(key: str | None) -> None:
    config = clip_config({"img_processor": {"clip_config": {} if key is None else {key: "eager"}}})
    assert CLIPEncoderLayer(config).self_attn.config._attn_implementation == "sdpa"


def batch_of(decoder: Decoder, numbers: list[int], filling: int = 0, num_chunks: int | None = None) -> Batch:
    """A row of these samples (every fourth is text only; the others have 3 to 5 crops) and so much empty tail."""
    parts: list = [decoder.processor.encode(decoder.sample(n), decoder.crops) for n in numbers]
    parts += [Filling(filling)] if filling else []
    return collate(Row(tuple(parts)), 0, None, decoder.normalization, num_chunks)


def calls_of_the_tower(model: Phi3VForCausalLM) -> list[int]:
    """Crops of each call, filled while the model runs; recomputation calls it again."""
    calls: list[int] = []
    tower = model.model.vision_embed_tokens.img_processor
    tower.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    return calls


def losses_and_gradients(model: Phi3VForCausalLM, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = model(**batch.inputs(CPU)).token_losses
    losses.sum().backward()
    return losses.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


ROWS = {
    "image only": ([0], 0), "several images": ([0, 1, 2, 4], 0), "mixed": ([3, 0, 7, 1], 0), "text only": ([3, 7], 0),
    "mixed with an empty tail": ([0, 3], 40), "empty": ([], 8),
}  # fmt: skip


@pytest.mark.parametrize("num_chunks", [None, 1, 2, 7])
@pytest.mark.parametrize("row", ROWS)
def test_chunks_change_neither_losses_nor_gradients(model, decoder, row, num_chunks):
    numbers, filling = ROWS[row]
    wanted = losses_and_gradients(model, batch_of(decoder, numbers, filling))
    model.set_gradient_checkpointing(True, vision_chunk_crops=3)
    calls = calls_of_the_tower(model)
    batch = batch_of(decoder, numbers, filling, num_chunks)
    losses, gradients = losses_and_gradients(model, batch)
    own = -(-len(batch.pixel_values) // 3)
    assert len(calls) == (2 * wanted_calls if (wanted_calls := num_chunks or own) > 1 else 1)
    assert max(calls) - min(calls) <= 1 and min(calls) >= 1
    assert torch.equal(losses, wanted[0])
    for name, gradient in gradients.items():
        expected = wanted[1][name]
        assert gradient is not None, name
        scale = max(float(expected.abs().max()), 1e-3)
        assert (gradient - expected).abs().max() <= SAME_GRADIENT * scale, name


def test_without_checkpointing_there_is_one_call_always(model, decoder):
    calls = calls_of_the_tower(model)
    batch = batch_of(decoder, [0, 1, 2], num_chunks=3)
    model(**batch.inputs(CPU))
    model.set_gradient_checkpointing(True, vision_chunk_crops=2)
    model.eval()
    model(**batch.inputs(CPU))
    assert calls == [len(batch.pixel_values)] * 2


def test_padding_crops_never_reach_the_tower(model, decoder):
    """The processor fills up to num_crops + 1 crops a picture; of these 2 x 5, a strip has 4 real ones, a square 5."""
    pictures = [Image.new("RGB", size, "red") for size in ((300, 100), (300, 300))]
    call = decoder.processor("<|image_1|>\nand\n<|image_2|>", pictures)
    calls = calls_of_the_tower(model.eval())
    model(call.input_ids, call.pixel_values, call.image_sizes)
    assert calls == [9] and call.pixel_values.shape[:2] == (2, 5)


def test_bytes_are_normalised_by_the_numbers_of_the_model_folder(model, decoder):
    batch = batch_of(decoder, [0, 3])
    floats = batch.inputs(CPU) | {"pixel_values": batch.normalization(batch.pixel_values), "normalization": None}
    assert batch.pixel_values.dtype == torch.uint8
    assert torch.equal(model(**batch.inputs(CPU)).token_losses, model(**floats).token_losses)


def test_bytes_without_their_normalisation_are_refused(model, decoder):
    inputs = batch_of(decoder, [0]).inputs(CPU) | {"normalization": None}
    with pytest.raises(ValueError, match="uint8 crops come with the `normalization`"):
        model(**inputs)
