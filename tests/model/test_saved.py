"""Every kind of folder that holds a model gives that model, and every other one says what it is instead."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from stored import trained_further, write_checkpoint, write_run

from phi3v_dist.config import LoraSettings
from phi3v_dist.errors import CheckpointError
from phi3v_dist.model.adapters import write_adapter
from phi3v_dist.model.origin import ORIGIN_NAME
from phi3v_dist.model.saved import SavedModel

ADAPTED = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def trained(tiny_model):
    return trained_further(tiny_model)


@pytest.fixture
def run(settings_tree, trained, tmp_path):
    """A run folder with checkpoints of steps 3 and 4."""
    settings_tree["model"]["longrope"] = "long"
    run = write_run(tmp_path / "runs", settings_tree)
    write_checkpoint(run, 3, {name: tensor + 1 for name, tensor in trained.items()})
    write_checkpoint(run, 4, trained, num_ranks=3)
    return run


def is_of(model, tensors) -> bool:
    return all(torch.equal(parameter, tensors[name]) for name, parameter in model.named_parameters())


def test_a_model_folder_is_itself(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "published")
    saved = SavedModel.open(folder)
    assert (saved.name, saved.files, saved.longrope, saved.num_crops, saved.run) == (
        "published", folder, "document", None, None,
    )  # fmt: skip
    assert is_of(saved.load(), load_file(tiny_model / "model.safetensors"))


def test_an_export_keeps_its_rule_and_knows_its_run(tiny_model, run):
    folder = shutil.copytree(tiny_model, run / "export")
    (folder / ORIGIN_NAME).write_text('{"longrope": "short"}')
    saved = SavedModel.open(folder)
    assert (saved.name, saved.longrope, saved.run) == ("export", "short", run)
    assert saved.load().longrope == "short" and saved.load(longrope="long").longrope == "long"


def test_a_run_is_its_newest_checkpoint_and_a_checkpoint_is_itself(tiny_model, trained, run):
    newest = SavedModel.open(run)
    assert (newest.name, newest.files, newest.longrope, newest.num_crops, newest.run) == (
        "checkpoint-00000004", tiny_model, "long", 1, run,
    )  # fmt: skip
    assert is_of(newest.load(), trained)
    earlier = SavedModel.open(run / "checkpoints" / "step-00000003")
    assert earlier.name == "checkpoint-00000003"
    assert is_of(earlier.load(), {name: tensor + 1 for name, tensor in trained.items()})


def test_of_a_run_a_damaged_checkpoint_is_passed_over_and_by_name_refused(run, caplog):
    path = run / "checkpoints" / "step-00000004"
    file = path / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert SavedModel.open(run).name == "checkpoint-00000003"
    assert "rank-00001.safetensors: its bytes changed" in caplog.text
    with pytest.raises(CheckpointError, match="its bytes changed"):
        SavedModel.open(path)


def test_a_base_folder_that_moved_can_be_named(tiny_model, trained, run, tmp_path):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["model"]["path"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(CheckpointError, match="model folder .*gone, which is not there: say with --base"):
        SavedModel.open(run)
    saved = SavedModel.open(run, base=tiny_model)
    assert saved.files == tiny_model and is_of(saved.load(), trained)


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """An adapter of one layer, as an export writes it, and the weight that it makes."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    weight = load_file(tiny_model / "model.safetensors")[f"{ADAPTED}.weight"]
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(weight.shape[0], 4, generator=generator)
    down = torch.randn(4, weight.shape[1], generator=generator)
    pair = {f"{ADAPTED}.lora_A.default.weight": down, f"{ADAPTED}.lora_B.default.weight": up}
    write_adapter(folder, pair, LoraSettings(rank=4, alpha=8), tiny_model)
    (folder / ORIGIN_NAME).write_text('{"longrope": "long", "adapter_only": true}')
    return folder, weight + 2.0 * up @ down


def test_an_adapter_alone_is_added_to_the_folder_it_stands_on(tiny_model, adapter, tmp_path):
    folder, weight = adapter
    saved = SavedModel.open(folder)
    assert (saved.files, saved.longrope) == (tiny_model, "long")
    found = dict(saved.load().named_parameters())
    assert torch.allclose(found.pop(f"{ADAPTED}.weight"), weight, atol=1e-6)
    original = load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(parameter, original[name]) for name, parameter in found.items())
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    assert SavedModel.open(folder, base=moved).files == moved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is set; only a plain LoRA"),
        ({"bias": "all"}, "bias is set"),
        ({"r": 0}, "not the settings of a LoRA adapter"),
        ({"lora_alpha": "much"}, "not the settings of a LoRA adapter"),
        ({"base_model_name_or_path": "/nowhere"}, "stands on /nowhere, which is no folder: say with --base"),
        ({"base_model_name_or_path": None}, "not the settings of a LoRA adapter"),
    ],
)
def test_an_adapter_that_cannot_be_added_says_why(adapter, change, message):
    path = adapter[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        SavedModel.open(adapter[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: {name: x for name, x in t.items() if "lora_A" in name},
            "not a plain LoRA: .*lora_B.weight",
        ),
        (lambda t: {name.replace("layers.0", "layers.7"): x for name, x in t.items()}, "adapts .*layers.7.*has not"),
        (lambda t: {name: x.t().contiguous() for name, x in t.items()}, r"do not give \(64, 64\)"),
    ],
)
def test_an_adapter_of_another_model_is_refused(adapter, spoil, message):
    path = adapter[0] / "adapter_model.safetensors"
    save_file(spoil(load_file(path)), path)
    with pytest.raises(CheckpointError, match=message):
        SavedModel.open(adapter[0])


def test_an_adapter_whose_file_is_cut_is_refused(adapter):
    path = adapter[0] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        SavedModel.open(adapter[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: run / "nothing", "no such folder; a model folder, an export, a run folder or one of its"),
        (lambda run: run / "config.yaml", "no such folder"),
        (lambda run: run / "checkpoints", "holds no model .the checkpoints of a run are in it: name the run"),
        (lambda run: (run / "eval").mkdir() or run / "eval", "holds no model; a model folder"),
        (lambda run: shutil.rmtree(run / "checkpoints") or run, "holds no model; a model folder"),
        (lambda run: [shutil.rmtree(path) for path in run.glob("checkpoints/*")] and run, "has no checkpoint yet"),
        (lambda run: (run / "config.yaml").unlink() or run, "nothing says which model this run began with"),
    ],
)
def test_a_folder_that_is_no_model_is_named(run, make, message):
    folder = make(run)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(run))}.*{message}"):
        SavedModel.open(folder)
