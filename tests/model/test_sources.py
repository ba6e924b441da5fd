"""Where a run's weights may come from, and every way in which they may not."""

import json
import math
import re

import pytest
import torch
import yaml
from stored import trained_further, write_checkpoint, write_run

from phi3v_dist.config import Settings
from phi3v_dist.errors import CheckpointError
from phi3v_dist.model.build import pinned_start
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.sources import RandomWeights, TrainedWeights, initial_weights, pinned, trained_rule
from phi3v_dist.model.weights import OfficialFolder, is_untrained, load_weights


@pytest.fixture
def trained(tiny_model):
    return trained_further(tiny_model)


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


@pytest.mark.supports("init_from", on="one process")
def test_random_begins_without_any_weights_in_the_folder(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    model = Phi3VForCausalLM(read_config(tmp_path))
    load_weights(model, initial_weights(tmp_path, "random", seed=0))
    assert torch.equal(model.lm_head.weight, OfficialFolder(tiny_model).get("lm_head.weight")), "as prepare.py tiny"


@pytest.mark.supports("init_from", on="one process")
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


def test_a_run_means_its_newest_checkpoint_of_that_time_ever_after(settings_tree, trained, run):
    first = write_checkpoint(run, 3, trained)
    settings = Settings.model_validate(settings_tree | {"model": settings_tree["model"] | {"init_from": str(run)}})
    assert pinned_start(settings) == str(first)
    settings.run.folder.mkdir(exist_ok=True)
    recorded = settings_tree | {"model": settings_tree["model"] | {"init_from": str(first)}}
    (settings.run.folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    second = write_checkpoint(run, 4, trained)
    assert pinned(str(run)) == str(second) and pinned_start(settings) == str(first)
    assert pinned_start(Settings.model_validate(settings_tree)) is None


def test_a_changed_byte_is_found_before_a_run_begins_with_it(tiny_model, trained, run):
    path = write_checkpoint(run, 3, trained) / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    initial_weights(tiny_model, str(run), seed=0)
    with pytest.raises(CheckpointError, match="rank-00001.safetensors: its bytes changed"):
        initial_weights(tiny_model, str(run), seed=0, verify=True)


def test_the_rule_of_a_run_is_known_to_those_that_begin_with_it(tiny_model, trained, settings_tree, tmp_path):
    settings_tree["model"]["longrope"] = "long"
    run = write_run(tmp_path / "runs", settings_tree, "long")
    path = write_checkpoint(run, 3, trained)
    assert trained_rule(tiny_model, str(run)) == trained_rule(tiny_model, str(path)) == "long"
    assert trained_rule(tiny_model, None) == trained_rule(tiny_model, "random") == "document"


def test_a_chain_finds_a_model_folder_that_moved(tiny_model, trained, run, settings_tree, tmp_path):
    first = write_checkpoint(run, 3, trained)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["model"]["path"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(CheckpointError, match="gone"):
        initial_weights(tiny_model, str(first), seed=0)
    weights = initial_weights(tiny_model, str(first), seed=0, moved_to=tiny_model)
    assert torch.equal(weights.get("lm_head.weight"), trained["lm_head.weight"])


def test_without_a_padding_token_the_embedding_is_random_too(tiny_model):
    config = read_config(tiny_model) | {"pad_token_id": None}
    assert RandomWeights(config, seed=0).get("model.embed_tokens.weight").any(1).all()


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
    with pytest.raises(CheckpointError, match="nothing says which model this run began with"):
        initial_weights(tiny_model, str(path), seed=0)
