"""Where a run's weights may come from, and every way in which they may not."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from stored import write_checkpoint, write_run

from phi3v_dist.errors import CheckpointError
from phi3v_dist.model.phi3v import Phi3VForCausalLM, read_config
from phi3v_dist.model.sources import RandomWeights, TrainedWeights, initial_weights
from phi3v_dist.model.weights import OfficialFolder, is_untrained, load_weights


@pytest.fixture
def trained(tiny_model):
    tensors = load_file(tiny_model / "model.safetensors")
    parameters = dict(Phi3VForCausalLM.from_pretrained(tiny_model).named_parameters())
    return {name: tensors[name] + 0.01 for name in parameters}


@pytest.fixture
def run(settings_tree, tmp_path):
    return write_run(tmp_path / "runs", settings_tree)


@pytest.mark.parametrize("name", ["phi3_vision", "phi3_5_vision"])
def test_random_weights_of_the_real_model_have_all_official_names_and_shapes(assets_folder, golden_folder, name):
    weights = RandomWeights(read_config(assets_folder / name), seed=0)
    manifest = json.loads((golden_folder / "param_manifest" / f"{name}.json").read_text())
    official = {name: tuple(shape) for name, shape in manifest["names_and_shapes"].items()}
    assert {name: weights.shape(name) for name in weights.names} == official
    assert len(official) == 592 and sum(map(math.prod, official.values())) == 4_146_621_440
    assert weights.dtype("lm_head.weight") == torch.bfloat16


def test_random_weights_do_not_depend_on_what_was_drawn_before(tiny_model):
    config = read_config(tiny_model)
    one, other = RandomWeights(config, seed=0), RandomWeights(config, seed=0)
    forwards = {name: one.get(name) for name in one.names}
    assert all(torch.equal(other.get(name), forwards[name]) for name in reversed(other.names))
    assert not torch.equal(RandomWeights(config, seed=1).get("lm_head.weight"), forwards["lm_head.weight"])


def test_random_begins_without_any_weights_in_the_folder(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    model = Phi3VForCausalLM(read_config(tmp_path))
    load_weights(model, initial_weights(tmp_path, "random", seed=0))
    assert torch.equal(model.lm_head.weight, OfficialFolder(tiny_model).get("lm_head.weight")), "as prepare.py tiny"


def test_a_run_begins_with_another_ones_newest_weights_or_those_of_a_step(tiny_model, trained, run):
    first = write_checkpoint(run, 3, trained)
    write_checkpoint(run, 4, {name: tensor + 1 for name, tensor in trained.items()}, num_ranks=3)
    for path, shift in ((run, 1), (first, 0)):
        weights = initial_weights(tiny_model, str(path), seed=0)
        assert weights.names == OfficialFolder(tiny_model).names
        for name in weights.names:
            wanted = trained[name] + shift if name in trained else OfficialFolder(tiny_model).get(name)
            assert torch.equal(weights.get(name), wanted), name
    assert sum(is_untrained(name) for name in weights.names if name not in trained) == 18


def test_where_a_run_began_is_followed_through_several_runs(tiny_model, trained, run, settings_tree, tmp_path):
    """The second run froze its text: that is in the first run's checkpoint, and nowhere else."""
    first = write_checkpoint(run, 3, trained)
    settings_tree["model"]["init_from"] = str(first)
    second = write_run(tmp_path / "runs", settings_tree, "second")
    vision = {name: tensor + 1 for name, tensor in trained.items() if name.startswith("model.vision")}
    text = {name: tensor for name, tensor in trained.items() if name not in vision}
    weights = TrainedWeights.open(write_checkpoint(second, 7, vision, frozen=text))
    assert all(torch.equal(weights.get(name), tensor) for name, tensor in (vision | text).items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder; a run, a checkpoint, a model folder, or random"),
        (lambda folder: (folder / "checkpoints").mkdir(parents=True), "no checkpoint in it yet"),
        (lambda folder: folder.mkdir(), "no model.safetensors"),
        (
            lambda folder: (folder.mkdir(), (folder / "adapter_config.json").touch()),
            "no model.safetensors .*; it is an adapter alone: name its run",
        ),
    ],
)
def test_a_place_without_weights_is_named(tiny_model, tmp_path, make, message):
    folder = tmp_path / "there"
    make(folder)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(folder))}: {message}"):
        initial_weights(tiny_model, str(folder), seed=0)


def test_a_checkpoint_outside_of_a_run_folder_is_refused(tiny_model, trained, tmp_path):
    path = write_checkpoint(tmp_path / "alone", 3, trained)
    with pytest.raises(CheckpointError, match="nothing says which model it was trained from"):
        initial_weights(tiny_model, str(path), seed=0)
