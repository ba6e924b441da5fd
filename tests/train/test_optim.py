"""What is trained at which rate and what decays, on the official names; the schedule's ends."""

import json

import pytest
import torch

from phi3v_dist.config import TrainSettings
from phi3v_dist.model.adapters import part_of
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.train.optim import build_optimizer, is_decayed, learning_rates

TOWER = "model.vision_embed_tokens.img_processor.vision_model"


@pytest.fixture(scope="module")
def official(golden_folder) -> dict[str, list[int]]:
    return json.loads((golden_folder / "param_manifest" / "phi3_vision.json").read_text())["names_and_shapes"]


def test_on_the_official_names_matrices_and_word_embeddings_alone_decay(official):
    kept = {name for name in official if not is_decayed(name)}
    one_dimensional = {name for name, shape in official.items() if len(shape) == 1}
    separators = {f"model.vision_embed_tokens.{name}" for name in ("glb_GN", "sub_GN")}
    assert kept == one_dimensional | separators | {f"{TOWER}.embeddings.position_embedding.weight"}
    assert is_decayed("model.embed_tokens.weight") and is_decayed("lm_head.weight")
    assert is_decayed(f"{TOWER}.embeddings.patch_embedding.weight")
    assert f"{TOWER}.embeddings.class_embedding" in kept


def test_the_official_names_fall_into_the_three_parts_by_size(official):
    sizes = {"vision": 0, "projector": 0, "text": 0}
    for name, shape in official.items():
        sizes[part_of(name)] += torch.Size(shape).numel()
    assert sizes == {"vision": 303_507_456, "projector": 22_034_432, "text": 3_821_079_552}  # MODEL.md §1


def test_every_trainable_parameter_is_in_exactly_one_group(tiny_model):
    model = Phi3VForCausalLM.from_pretrained(tiny_model)
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    train = TrainSettings(weight_decay=0.05, betas=(0.8, 0.9), eps=1e-6)
    optimizer = build_optimizer(model, train)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p is not frozen)
    groups = {(group["part"], group["weight_decay"]) for group in optimizer.param_groups}
    assert groups == {(part, decay) for part in ("vision", "projector", "text") for decay in (0.05, 0.0)}
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6) for group in optimizer.param_groups)


def rates(step, num_steps=100, **settings):
    peaks = {"text": 1.0, "vision": 0.5, "projector": 2.0}
    return learning_rates(step, num_steps, TrainSettings(learning_rate=peaks, **settings))


def test_warmup_rises_in_a_line_to_the_peak_of_each_part():
    assert rates(1, warmup_steps=10)["text"] == pytest.approx(0.1)
    assert rates(10, warmup_steps=10) == {"text": 1.0, "vision": 0.5, "projector": 2.0}


def test_by_default_warmup_takes_a_tenth_of_a_short_run_and_100_steps_of_a_long_one():
    assert rates(3) == rates(3, warmup_steps=10) and rates(1, num_steps=5) == rates(1, num_steps=5, warmup_steps=0)
    assert rates(7, num_steps=5000) == rates(7, num_steps=5000, warmup_steps=100)


def test_the_cosine_is_half_way_in_the_middle_and_ends_at_its_share_of_the_peak():
    middle, end = rates(55, warmup_steps=10, min_lr_frac=0.2), rates(100, warmup_steps=10, min_lr_frac=0.2)
    assert middle == pytest.approx({"text": 0.6, "vision": 0.3, "projector": 1.2})
    assert end == pytest.approx({"text": 0.2, "vision": 0.1, "projector": 0.4})
    assert rates(150, warmup_steps=10, min_lr_frac=0.2) == end, "a run prolonged past its schedule stays there"


def test_without_warmup_the_first_step_is_nearly_at_the_peak_and_rates_only_fall():
    values = [rates(step, warmup_steps=0, min_lr_frac=0.0)["text"] for step in range(1, 101)]
    assert 0.999 < values[0] < 1.0
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0.0, abs=1e-12)


def test_a_run_of_nothing_but_warmup_ends_at_the_peak():
    assert rates(5, num_steps=5, warmup_steps=5)["text"] == 1.0
