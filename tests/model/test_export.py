"""What an export refuses, and what its folder holds. The checkpoint is a stand-in; launch tests export a real one."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from phi3v_dist.errors import CheckpointError
from phi3v_dist.model import export as module
from phi3v_dist.model.export import export
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.weights import is_untrained, write_safetensors


class Trained:
    """What a checkpoint's reader gives: fp32 weights by official name."""

    def __init__(self, tensors):
        self.tensors = tensors

    @property
    def names(self):
        return list(self.tensors)

    def get(self, name):
        return self.tensors[name].float()


@pytest.fixture
def base(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    (folder / "modeling_phi3_v.py").write_text("# remote code\n")
    (folder / "optimizer.bin").write_bytes(b"not for an export")
    return folder


@pytest.fixture
def trained(base, monkeypatch):
    """Other weights than the base's, under the names of what is trained."""
    tensors = load_file(base / "model.safetensors")
    changed = Trained({name: tensor + 0.01 for name, tensor in tensors.items() if not is_untrained(name)} | {
        name: tensor + 0.01 for name, tensor in tensors.items() if ".encoder.layers.0." in name
    })  # fmt: skip
    monkeypatch.setattr(module, "read_tensors", lambda path: changed)
    return changed


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path / "run" / "checkpoints" / "step-00000003"


def test_the_folder_is_complete_and_opens_by_itself(base, trained, checkpoint, tmp_path):
    out = tmp_path / "new" / "export"
    export(checkpoint, base, out)
    written, original = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, trained.get(name) if name in trained.names else original[name]), name
    assert len(written) - len(trained.names) == 18, "CLIP's last layer and norm come from the base folder"
    for path in base.iterdir():
        if path.suffix in (".json", ".py"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (out / "optimizer.bin").exists()
    model = Phi3VForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, trained.get("lm_head.weight"))
    assert [path.name for path in out.parent.iterdir()] == ["export"]


def test_weights_are_written_in_the_base_folders_type(base, trained, checkpoint, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    write_safetensors(base, sorted(tensors), tensors.__getitem__)
    export(checkpoint, base, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_the_same_checkpoint_again_is_done_already_and_another_is_refused(base, trained, checkpoint, tmp_path):
    out = tmp_path / "out"
    export(checkpoint, base, out)
    written = (out / "model.safetensors").stat().st_mtime_ns
    export(checkpoint, base, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(CheckpointError, match=f"{out}: exists and is not the export of .*step-00000004"):
        export(checkpoint.with_name("step-00000004"), base, out)


def test_any_other_folder_in_the_way_is_refused_and_left_alone(base, trained, checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="exists"):
        export(checkpoint, base, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_of_another_model_is_refused_with_every_name(base, trained, checkpoint, tmp_path):
    del trained.tensors["model.norm.weight"], trained.tensors["lm_head.weight"]
    trained.tensors["model.layers.9.mlp.down_proj.weight"] = torch.zeros(2)
    with pytest.raises(CheckpointError) as caught:
        export(checkpoint, base, tmp_path / "out")
    assert caught.value.problems == [
        f"{checkpoint} does not hold lm_head.weight of {base}",
        f"{checkpoint} does not hold model.norm.weight of {base}",
        f"{checkpoint} holds model.layers.9.mlp.down_proj.weight, which {base} does not know",
    ]
    assert not (tmp_path / "out").exists()


def test_what_reads_back_differently_never_gets_its_name(base, trained, checkpoint, tmp_path, monkeypatch):
    def damaged(folder, names, get):
        write_safetensors(folder, names, lambda name: get(name) * 1.001)

    monkeypatch.setattr(module, "write_safetensors", damaged)
    with pytest.raises(CheckpointError, match="read back, its logits differ by"):
        export(checkpoint, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_refused(base, trained, checkpoint, tmp_path):
    trained.tensors["lm_head.weight"][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="differ by nan"):
        export(checkpoint, base, tmp_path / "out")


def test_a_folder_without_a_checkpoint_is_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match="step-00000009"):
        export(tmp_path / "checkpoints" / "step-00000009", base, tmp_path / "out")
