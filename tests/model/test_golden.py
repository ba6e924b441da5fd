"""The published code's own numbers (tests/golden/README.md says how they were made), on every recorded case."""

import json

import pytest
import torch
from safetensors.torch import load_file

from phi3v_dist.model import Phi3VForCausalLM
from phi3v_dist.model.phi3v import read_config
from phi3v_dist.model.weights import OfficialFolder, load_weights

CONFIGS = ("mha_o64", "gqa_o1024")
NOT_CASES = ("config", "clip_config", "train_curve")


def cases(golden):
    return [
        (config, path.stem)
        for config in CONFIGS
        for path in sorted((golden / "model" / config).glob("*.json"))
        if path.stem not in NOT_CASES
    ]


def pytest_generate_tests(metafunc):
    from pathlib import Path

    if "case" in metafunc.fixturenames:
        found = cases(Path(__file__).parents[1] / "golden")
        metafunc.parametrize(("config", "case"), found, ids=[f"{c}-{n}" for c, n in found])


def golden_model(golden, config, longrope="document"):
    folder = golden / "model" / config
    fields = read_config(folder)
    fields["img_processor"]["clip_config"] = json.loads((folder / "clip_config.json").read_text())
    model = Phi3VForCausalLM(fields, longrope)
    load_weights(model, OfficialFolder(folder))
    return model


def golden_pixels(pixels):
    """The README's integer formula, exact in fp32."""
    sizes, seed = pixels["image_sizes"], pixels["pixel_seed"]
    values = torch.zeros(len(sizes), pixels["num_crops_plus_1"], 3, 336, 336)
    y, x = torch.meshgrid(torch.arange(336), torch.arange(336), indexing="ij")
    for n, (height, width) in enumerate(sizes):
        for k in range(height // 336 * (width // 336) + 1):
            for c in range(3):
                v = 3 * x * x + 5 * y * y + 7 * x * y + 11 * x + 17 * y + 101 * c + 211 * k + 307 * n + 53 * seed
                values[n, k, c] = (v % 509 - 254).float() / 128
    return values, torch.tensor(sizes)


def test_logits_loss_and_gradients_are_those_of_the_published_code(golden_folder, config, case):
    path = golden_folder / "model" / config / case
    tensors, facts = load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())
    model = golden_model(golden_folder, config, "key_length" if "phi35rule" in case else "document")
    pixel_values, image_sizes = golden_pixels(facts["pixels"]) if facts.get("pixels") else (None, None)
    mask = tensors.get("attention_mask")
    output = model(
        tensors["input_ids"], pixel_values, image_sizes, attention_mask=mask,
        position_ids=tensors.get("position_ids"), labels=tensors["labels"], return_logits=True,
    )  # fmt: skip
    output.loss.backward()

    real = torch.ones_like(tensors["input_ids"]).bool() if mask is None else mask.bool()
    if "logits" in tensors:
        difference = (output.logits - tensors["logits"])[real].abs().max()
    else:
        rows, positions = tensors["logits_pos"].T
        difference = (output.logits[rows, positions] - tensors["logits_sel"]).abs().max()
    assert difference <= 5e-5  # measured: 1.8e-5
    assert abs(output.loss.item() - facts["loss"]) <= 5e-6  # measured: 1e-6
    assert len(output.token_losses) == facts["num_label_tokens"]
    nll = tensors["token_nll"].flatten()
    assert torch.allclose(output.token_losses, nll[nll != 0], atol=5e-5)

    floor = 1e-6 * facts["grad_global_norm"]
    for name, parameter in model.named_parameters():
        if name not in facts["grad_norms"]:
            assert parameter.grad is None, name  # the published code does not reach it either
            continue
        found, wanted = float(parameter.grad.double().norm()), facts["grad_norms"][name]
        if name.endswith("k_proj.bias"):  # exactly 0 in theory, rounding in both; compared absolutely
            assert abs(found - wanted) <= floor, name
        else:
            assert abs(found - wanted) <= 1e-4 * max(wanted, floor), name  # measured: 5e-7
    assert set(facts["params_without_grad"]).isdisjoint(n for n, p in model.named_parameters() if p.grad is not None)


def test_the_published_training_curve_is_followed(golden_folder):
    """Steps whose cases all have pictures or none: plain AdamW skips parameters without a gradient, as ours here."""
    folder = golden_folder / "model" / "mha_o64"
    curve = json.loads((folder / "train_curve.json").read_text())
    model = golden_model(golden_folder, "mha_o64", "max_position")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    for step in curve["steps"]:
        tensors = load_file(folder / f"{step['case']}.safetensors")
        facts = json.loads((folder / f"{step['case']}.json").read_text())
        pixel_values, image_sizes = golden_pixels(facts["pixels"]) if facts.get("pixels") else (None, None)
        optimizer.zero_grad()
        loss = model(
            tensors["input_ids"], pixel_values, image_sizes, attention_mask=tensors.get("attention_mask"),
            position_ids=tensors.get("position_ids"), labels=tensors["labels"],
        ).loss  # fmt: skip
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
        optimizer.step()
        assert loss.item() == pytest.approx(step["loss"], abs=1e-3)
        assert norm.item() == pytest.approx(step["grad_norm_pre_clip"], rel=5e-3)


@pytest.mark.parametrize("name", ["phi3_vision", "phi3_5_vision"])
def test_the_real_models_names_and_shapes_are_the_official_ones(golden_folder, assets_folder, name):
    manifest = json.loads((golden_folder / "param_manifest" / f"{name}.json").read_text())
    official = {name: tuple(shape) for name, shape in manifest["names_and_shapes"].items()}
    model = Phi3VForCausalLM.without_weights(read_config(assets_folder / name))
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    untrained = official.keys() - ours.keys()
    assert ours == {name: official[name] for name in ours}
    assert all("layers.23." in name or "post_layernorm" in name for name in untrained)
    assert len(untrained) == 18
