"""The tiny folder is the real one in small: layout, tokenizer, reproducible bytes."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import environment
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.tiny import write_tiny

SENTENCES = ["A red coat, Price: 120.50", "A blue coat with a collar, Price: 99.00", "What is shown? A green coat."]
SIZES = {
    "clip": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "decoder": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "new" / "model"
    num_parameters = write_tiny(folder, SENTENCES, seed=3, **SIZES)
    assert num_parameters == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_arguments_give_the_same_bytes_in_any_process(folder, tmp_path):
    script = (
        "import sys, json, pathlib; from phi3v_dist.model.tiny import write_tiny; "
        "write_tiny(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), seed=3, **json.loads(sys.argv[3]))"
    )
    again = tmp_path / "again"
    words = [again, json.dumps(SENTENCES), json.dumps(SIZES)]
    subprocess.run([sys.executable, "-c", script, *words], check=True, env=environment(PYTHONHASHSEED="7"))
    assert contents(again) == contents(folder)


def test_another_seed_gives_other_weights_and_the_global_generator_is_left_alone(folder, tmp_path):
    before = torch.random.get_rng_state()
    write_tiny(tmp_path, SENTENCES, seed=4, **SIZES)
    assert torch.equal(torch.random.get_rng_state(), before)
    ours, other = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == other.keys()
    assert not torch.equal(ours["lm_head.weight"], other["lm_head.weight"])


def test_names_are_those_of_the_official_folder_with_fewer_layers(folder, golden_folder):
    manifest = json.loads((golden_folder / "param_manifest" / "phi3_vision.json").read_text())
    official = set(manifest["names_and_shapes"])
    ours = set(load_file(folder / "model.safetensors"))
    assert ours <= official
    assert {name for name in official if ".layers." not in name} == {name for name in ours if ".layers." not in name}


def test_config_has_the_official_fields_and_form(folder, assets_folder):
    config, official = read_config(folder), read_config(assets_folder / "phi3_vision")
    for name in ("rope_theta", "max_position_embeddings", "original_max_position_embeddings", "bos_token_id",
                 "eos_token_id", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "embd_layer"):  # fmt: skip
        assert config[name] == official[name], name
    assert config["rope_scaling"].keys() == official["rope_scaling"].keys()
    assert config["rope_scaling"]["type"] == "su"
    assert official["img_processor"].items() <= (config["img_processor"] | {"image_dim_out": 1024}).items()
    assert config["vocab_size"] % 64 == 0


def test_random_weights_keep_a_signals_size(folder):
    model = Phi3VForCausalLM.from_pretrained(folder)
    pad_id = model.config["pad_token_id"]
    assert not model.model.embed_tokens.weight[pad_id].any()
    with torch.no_grad():
        logits = model(torch.arange(3, 60)[None]).logits
    assert 0.3 < logits.std() < 3.0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_special_tokens_are_single_and_swallow_white_space_as_the_official_ones(tokenizer, assets_folder):
    official = PreTrainedTokenizerFast.from_pretrained(assets_folder / "phi3_vision")
    for text in ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>", "<s>", "</s>"):
        ours, theirs = (t.added_tokens_decoder[t.convert_tokens_to_ids(text)] for t in (tokenizer, official))
        assert (ours.rstrip, ours.lstrip, ours.special) == (theirs.rstrip, theirs.lstrip, theirs.special), text
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer("<|assistant|>\n x").input_ids[1:] == tokenizer("<|assistant|>x").input_ids[1:]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<|endoftext|>", "<|endoftext|>")


@pytest.mark.parametrize("text", ["A red coat, Price: 120.50", "Ünïcödé 漢字 🧥 \t\n  spaces", "", " leading", "0x1F"])
def test_any_text_comes_back_whole(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer(text).input_ids == [1, *ids]


def test_known_words_are_short_and_digits_stand_alone(tokenizer):
    assert len(tokenizer("A blue coat", add_special_tokens=False).input_ids) <= 4
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Price: 120.50", add_special_tokens=False).input_ids)
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("12050")


def test_the_processor_takes_the_folder(folder):
    processor = Phi3VProcessor.from_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert sorted(processor.stop_ids) == sorted(generation["eos_token_id"])
    assert processor.num_crops == 4
