"""What is trained: frozen parts, adapters, and that plain peft agrees about what an adapter is."""

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stored import write_checkpoint, write_run

from phi3v_dist.config import LoraSettings, PartsSettings, Settings, TrainSettings
from phi3v_dist.errors import CheckpointError, ConfigError
from phi3v_dist.model.adapters import choose_trained, is_adapter, lora_targets, merged_parameters, part_of
from phi3v_dist.model.export import export
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.sources import TrainedWeights
from phi3v_dist.parallel.partitions import official_name

SAME_IN_FP32 = 1e-5  # merged against adapter + base, logits; measured: 1.4e-6
HOW = st.sampled_from(["full", "lora", "frozen"])
PARTS = ("text", "vision", "projector")


def train_settings(targets=None, dropout=0.0, **parts) -> TrainSettings:
    lora = LoraSettings(rank=4, alpha=8, targets=targets, dropout=dropout)
    return TrainSettings(steps=10, parts=PartsSettings(**parts), lora=lora)


@pytest.fixture
def model(tiny_model):
    return Phi3VForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def inputs(tiny_model):
    torch.manual_seed(0)
    pictures = torch.randn(1, 2, 3, 336, 336)
    ids = torch.cat([torch.arange(3, 12), torch.full((313,), -1), torch.arange(12, 20)])[None]
    return {"input_ids": ids, "pixel_values": pictures, "image_sizes": torch.tensor([[336, 336]])}


def disturb_adapters(model):
    """As training would: adapters begin as no change at all."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data.normal_(std=0.1, generator=generator)


@settings(max_examples=15, deadline=None)
@given(parts=st.fixed_dictionaries(dict.fromkeys(PARTS, HOW)))
def test_each_part_is_trained_as_asked_and_nothing_else(tiny_model, parts):
    model = Phi3VForCausalLM.from_pretrained(tiny_model)
    names = {name for name, _ in model.named_parameters()}
    choose_trained(model, train_settings(**parts), seed=0)
    assert {official_name(n) for n, _ in model.named_parameters() if not is_adapter(n)} == names
    for name, parameter in model.named_parameters():
        how = parts[part_of(name)]
        assert parameter.requires_grad == (how == "full" or is_adapter(name)), name
        assert how == "lora" or not is_adapter(name), name
    adapted = {part_of(name) for name, _ in model.named_parameters() if is_adapter(name)}
    assert adapted == {part for part, how in parts.items() if how == "lora"}


def test_adapters_begin_as_no_change_and_are_the_same_on_every_rank(model, tiny_model, inputs):
    with torch.no_grad():
        before = model(**inputs).logits
        everything = train_settings(text="lora", vision="lora", projector="lora")
        choose_trained(model, everything, seed=7)
        assert torch.equal(model(**inputs).logits, before)
    other = Phi3VForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    choose_trained(other, everything, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.supports("lora", on="one process")
def test_only_adapters_change_in_training(model, inputs):
    choose_trained(model, train_settings(text="lora", vision="lora", projector="frozen"), seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # in the first step only B moves, since it is 0
        model.train()(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] < 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if is_adapter(name)}


def test_targets_may_be_named_and_mistakes_come_together(model):
    choose_trained(model, train_settings(["qkv_proj", "img_projection.0"], text="lora", projector="lora"), seed=0)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if is_adapter(name)}
    layers = [f"model.layers.{number}.self_attn.qkv_proj" for number in range(len(model.model.layers))]
    assert adapted == {*layers, "model.vision_embed_tokens.img_projection.0"}


def test_targets_that_match_nothing_are_named(model):
    wrong = ["qkv_prog", "lm_head", "fc1", "down_proj"]
    with pytest.raises(ConfigError) as caught:
        lora_targets(model, train_settings(wrong, text="lora", vision="frozen"))
    assert caught.value.problems == [
        "`train.lora.targets` qkv_prog: matches no linear layer; there are down_proj, gate_up_proj, o_proj, qkv_proj",
        "`train.lora.targets` lm_head: the head computes losses and takes no adapter",
        "`train.lora.targets` fc1: is in vision, which `train.parts` does not set to lora",
    ]
    with pytest.raises(ConfigError, match=r"`train.parts.vision` is lora, but .* names none of its layers: freeze it"):
        lora_targets(model, train_settings(["qkv_proj"], text="lora", vision="lora"))


@pytest.fixture
def adapted_run(model, settings_tree, tmp_path):
    """A checkpoint of a LoRA run on text and projector, and the model it is of."""
    settings_tree["train"] |= {"parts": {"text": "lora", "vision": "frozen", "projector": "lora"}}
    settings_tree["train"]["lora"] = {"rank": 4, "alpha": 8}
    run = write_run(tmp_path / "runs", settings_tree)
    choose_trained(model, train_settings(text="lora", vision="frozen", projector="lora"), seed=0)
    disturb_adapters(model)
    named = {official_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    trained = {name: tensor for name, tensor in named.items() if is_adapter(name)}
    frozen = {name: tensor for name, tensor in named.items() if not is_adapter(name)}
    return write_checkpoint(run, 5, trained, frozen), Settings.model_validate(settings_tree)


@pytest.mark.supports("export lora", on="one process")
def test_a_merged_export_is_base_and_adapter(adapted_run, model, inputs, tmp_path):
    path, tree = adapted_run
    export(TrainedWeights.open(path), tree, tmp_path / "merged", merge=True)
    exported = Phi3VForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        ours, theirs = exported(**inputs).logits, model.eval()(**inputs).logits
    assert (ours - theirs).abs().max() <= SAME_IN_FP32
    assert torch.equal(exported.lm_head.weight, model.lm_head.weight)
    wanted = dict(merged_parameters(model))
    assert {name for name, ours in exported.named_parameters() if torch.equal(ours, wanted[name])} == wanted.keys()


@pytest.mark.supports("export lora", on="one process")
def test_plain_peft_loads_the_adapter(adapted_run, model, tiny_model, inputs, tmp_path):
    path, tree = adapted_run
    export(TrainedWeights.open(path), tree, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "origin.json",
    }  # fmt: skip
    loaded = peft.PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(tiny_model), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == sum(is_adapter(name) for name, _ in model.named_parameters())
    merged = dict(loaded.merge_and_unload().named_parameters())
    for name, ours in merged_parameters(model):
        assert (ours - merged[name]).abs().max() <= 1e-6, name


def test_an_adapter_on_another_runs_weights_has_no_base_to_name(adapted_run, model, settings_tree, tmp_path):
    path, _ = adapted_run
    settings_tree["model"]["init_from"] = str(path)
    second = write_run(tmp_path / "runs", settings_tree, "second")
    trained = {official_name(name): p.detach() for name, p in model.named_parameters() if is_adapter(name)}
    frozen = {name: merged for name, merged in merged_parameters(model)}
    weights = TrainedWeights.open(write_checkpoint(second, 2, trained, frozen))
    with pytest.raises(CheckpointError, match="its adapters stand on .*step-00000005, .* export with --merge"):
        export(weights, Settings.model_validate(settings_tree), tmp_path / "out")


def test_weights_trained_in_full_have_no_place_in_an_adapter_folder(adapted_run, model, tmp_path):
    path, tree = adapted_run
    weights = TrainedWeights.open(path)
    weights.in_full = ["model.norm.weight"]
    with pytest.raises(CheckpointError, match="1 weights trained in full, such as model.norm.weight.* --merge"):
        export(weights, tree, tmp_path / "out")


def test_a_run_can_begin_with_an_adapted_one(adapted_run, model, tiny_model):
    from phi3v_dist.model.sources import initial_weights

    path, _ = adapted_run
    weights = initial_weights(tiny_model, str(path), seed=0)
    for name, merged in merged_parameters(model):
        assert torch.equal(weights.get(name), merged), name
