"""Safetensors by official name: what a folder must hold, what may be absent, and every name that does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored import InMemory

from phi3v_dist.errors import CheckpointError
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.weights import OfficialFolder, load_weights, write_safetensors

EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_ALIAS = "model.vision_embed_tokens.wte.weight"
TOWER = "model.vision_embed_tokens.img_processor.vision_model."
UNTRAINED = (f"{TOWER}encoder.layers.1.", f"{TOWER}post_layernorm.")


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model's folder, to be changed."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def tensors(tiny_model):
    return load_file(tiny_model / "model.safetensors")


def write(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_are_shown_as_they_are_read(tiny_model, shown):
    live = Phi3VForCausalLM(read_config(tiny_model))
    load_weights(live, OfficialFolder(tiny_model))
    num_tensors = len(dict(live.named_parameters()))
    assert shown == [(f"reading {tiny_model}", done, num_tensors, "tensors") for done in range(num_tensors + 1)]


def load_both_ways(folder) -> Phi3VForCausalLM:
    """By `from_pretrained`, and into a live model; both must agree."""
    model = Phi3VForCausalLM.from_pretrained(folder)
    live = Phi3VForCausalLM(read_config(folder))
    load_weights(live, OfficialFolder(folder))
    for (name, ours), (_, theirs) in zip(model.named_parameters(), live.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    return model


def test_every_parameter_is_set_from_the_file(folder, tensors):
    model = load_both_ways(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    assert not any(parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])


def test_untrained_tensors_may_be_there_or_not(folder, tensors):
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith(UNTRAINED)}
    assert len(tensors) - len(without) == 18, "16 of CLIP's last layer, 2 of its norm"
    write(folder, without)
    load_both_ways(folder)


@pytest.mark.parametrize("keep", [(EMBEDDING,), (EMBEDDING_ALIAS,), (EMBEDDING, EMBEDDING_ALIAS)])
def test_the_embedding_may_go_by_either_name_or_both(folder, tensors, keep):
    embedding = tensors.pop(EMBEDDING)
    write(folder, tensors | {name: embedding.clone() for name in keep})
    assert torch.equal(load_both_ways(folder).model.embed_tokens.weight, embedding)
    assert EMBEDDING_ALIAS not in OfficialFolder(folder).names


def test_missing_extra_and_misshaped_names_come_in_one_error(folder, tensors):
    del tensors["model.norm.weight"], tensors[f"{TOWER}encoder.layers.0.mlp.fc1.bias"]
    tensors["lm_head.bias"] = torch.zeros(3)
    tensors[f"{TOWER}encoder.layers.0.mlp.fc9.weight"] = torch.zeros(3)  # in a layer that is trained
    tensors[f"{TOWER}encoder.layers.2.mlp.fc1.bias"] = torch.zeros(3)  # one layer more than the tower has
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 127)
    write(folder, tensors)
    expected = [
        f"{folder}: model.norm.weight: missing",
        f"{folder}: {TOWER}encoder.layers.0.mlp.fc1.bias: missing",
        f"{folder}: lm_head.bias: not a part of this model",
        f"{folder}: {TOWER}encoder.layers.0.mlp.fc9.weight: not a part of this model",
        f"{folder}: {TOWER}encoder.layers.2.mlp.fc1.bias: not a part of this model",
        f"{folder}: model.layers.0.mlp.down_proj.weight: shape (64, 127), config.json says (64, 128)",
    ]
    for load in (
        Phi3VForCausalLM.from_pretrained,
        lambda folder: load_weights(Phi3VForCausalLM(read_config(folder)), OfficialFolder(folder)),
    ):
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert sorted(caught.value.problems) == sorted(expected)


def test_several_files_with_an_index_read_as_one(folder, tensors):
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    write_safetensors(folder, InMemory(tensors), shard_size_bytes=200_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for file in files:
        stored = load_file(folder / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(stored)
        size_bytes = sum(t.numel() * t.element_size() for t in stored.values())
        assert size_bytes <= 200_000 or len(stored) == 1
    weights = OfficialFolder(folder)
    assert weights.names == names
    assert all(torch.equal(weights.get(name), tensors[name]) for name in names)
    assert all(weights.shape(name) == tuple(tensors[name].shape) for name in names)
    load_both_ways(folder)


def test_one_file_needs_no_index(tmp_path):
    write_safetensors(tmp_path, InMemory({"a": torch.arange(6.0).view(2, 3).T}))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert OfficialFolder(tmp_path).get("a").tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_file_that_the_index_names_and_is_not_there_is_named(folder, tensors):
    (folder / "model.safetensors").unlink()
    write_safetensors(folder, InMemory(tensors), shard_size_bytes=200_000)
    missing = next(folder.glob("model-00002-of-*.safetensors"))
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"{missing}: cannot be read"):
        OfficialFolder(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_an_index_that_is_none_is_named(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json: no JSON with a `weight_map`"):
        OfficialFolder(folder)


@pytest.mark.parametrize("damage", ["cut off", "no header"])
def test_a_damaged_file_is_named(folder, damage):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage == "cut off" else b"\xff" * 100)
    with pytest.raises(CheckpointError, match=f"{path}: cannot be read as safetensors"):
        Phi3VForCausalLM.from_pretrained(folder)


@pytest.mark.fault(87)
def test_pickles_are_refused_with_the_reason(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is no .*; a pickle can run code when it is read"):
        OfficialFolder(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "pytorch_model.bin"}}')
    with pytest.raises(CheckpointError, match=r"index.json: pytorch_model.bin is no .*; a pickle can run code"):
        OfficialFolder(folder)


def test_an_index_that_leads_out_of_its_folder_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other/model.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"names files outside of its folder: ../other/model.safetensors"):
        OfficialFolder(folder)


def test_a_tensor_in_two_files_is_refused(folder, tensors):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="lm_head.weight is in model-00001-of-00002.* and model-00002-of-00002"):
        OfficialFolder(folder)


def test_an_empty_or_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        OfficialFolder(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: no model.safetensors"):
        OfficialFolder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "not JSON"), ('{"model_type": "phi3"}', "model_type is 'phi3', not 'phi3_v'")],
)
def test_a_config_that_is_not_of_this_model_is_refused(folder, content, message):
    (folder / "config.json").unlink()
    if content:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        read_config(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "`hidden_size` is None"),
        ({"original_max_position_embeddings": "4k"}, "`original_max_position_embeddings` is 4k"),
        ({"img_processor": None}, "`img_processor` is missing"),
        ({"pad_token_id": 99999}, "`pad_token_id` is 99999"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "longrope"}}, "LongRoPE is read from `rope_scaling`"),
        ({"rope_scaling": None}, "LongRoPE is read from `rope_scaling`"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "found {'type': 'linear'"),
    ],
)
def test_a_config_with_something_missing_or_rewritten_is_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        Phi3VForCausalLM.from_pretrained(folder)


def test_quantised_weights_are_refused(folder, tensors):
    write(folder, tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)})
    with pytest.raises(CheckpointError, match="lm_head.weight: stored as torch.int8; quantised"):
        Phi3VForCausalLM.from_pretrained(folder)


def test_inputs_that_do_not_fit_together_are_refused(folder):
    model = Phi3VForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 9)[None]
    places = torch.cat([ids, torch.full((1, 303), -1)], dim=1)  # ten too few for one crop
    pictures = {"pixel_values": torch.zeros(2, 3, 336, 336), "image_sizes": torch.tensor([[336, 336]])}
    for wrong, message in (
        ({"input_ids": ids[:, :0]}, "holds no token"),
        ({"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, "not all 0"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 5)}, "must be as input_ids"),
        ({"input_ids": places, **pictures}, "give 313 image tokens, the text has 303 places"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**wrong)


def test_files_in_bf16_stay_bf16_unless_another_type_is_asked_for(folder, tensors):
    write(folder, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert OfficialFolder(folder).dtype("lm_head.weight") == torch.bfloat16
    assert Phi3VForCausalLM.from_pretrained(folder).lm_head.weight.dtype == torch.bfloat16
    model = Phi3VForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
