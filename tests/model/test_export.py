"""What an export refuses, and what its folder holds. Checkpoints are real files; launch tests make them by training."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import REPOSITORY, environment
from safetensors.torch import load_file, save_file
from stored import write_checkpoint, write_run

from phi3v_dist.cli.export import run_command
from phi3v_dist.config import Settings
from phi3v_dist.errors import CheckpointError, Phi3VError
from phi3v_dist.model import export as module
from phi3v_dist.model.export import export
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.sources import TrainedWeights
from phi3v_dist.model.weights import OfficialFolder, is_untrained, write_safetensors
from phi3v_dist.survive.best_file import BEST_NAME

NUM_UNTRAINED = 18  # 16 of CLIP's last layer, 2 of its norm


@pytest.fixture
def base(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    (folder / "modeling_phi3_v.py").write_text("# remote code\n")
    (folder / "LICENSE").write_text("MIT\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# the base model\n")
    (folder / "optimizer.bin").write_bytes(b"not for an export")
    return folder


@pytest.fixture
def trained(base):
    """Other weights than the base's, under the names of what is trained."""
    tensors = load_file(base / "model.safetensors")
    kept = {name for name in tensors if ".encoder.layers.1." in name or ".post_layernorm." in name}
    assert len(kept) == NUM_UNTRAINED
    return {name: tensor + 0.01 for name, tensor in tensors.items() if name not in kept}


@pytest.fixture
def run(base, settings_tree, tmp_path):
    settings_tree["model"]["path"] = str(base)
    return write_run(tmp_path / "runs", settings_tree)


def settings_of(run):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree.pop("environment")
    return Settings.model_validate(tree)


def export_step(run, trained, out, step=3, **options):
    path = run / "checkpoints" / f"step-{step:08d}"
    if not path.exists():
        write_checkpoint(run, step, trained, options.pop("frozen", None))
    export(TrainedWeights.open(path), settings_of(run), out, **options)
    return path


@pytest.mark.supports("export", on="one process")
def test_the_folder_is_complete_and_opens_by_itself(base, trained, run, tmp_path):
    out = tmp_path / "new" / "export"
    export_step(run, trained, out)
    written, original = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, trained.get(name, original[name])), name
    written_anew = ("generation_config.json", "preprocessor_config.json")  # ends of answers; crops trained with
    for path in base.iterdir():
        if path.suffix in (".json", ".py") and path.name not in written_anew or path.name == "LICENSE":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    given, found = (json.loads((folder / "preprocessor_config.json").read_text()) for folder in (base, out))
    assert given["num_crops"] == 4 and found == given | {"num_crops": 1}
    assert not (out / "optimizer.bin").exists()
    model = Phi3VForCausalLM.from_pretrained(out)
    direct = Phi3VForCausalLM.without_weights(model.config).take(trained)
    ids = torch.arange(3, 90)[None]
    with torch.inference_mode():
        assert (model(ids).logits - direct(ids).logits).abs().max() == 0.0
    assert [path.name for path in out.parent.iterdir()] == ["export"]


def test_generation_stops_at_all_three_end_ids_whatever_the_base_says(base, trained, run, tmp_path, assets_folder):
    stop = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    (base / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5}')
    export_step(run, trained, tmp_path / "a")
    found = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert found["eos_token_id"] == sorted(stop) and len(stop) == 3 and found["temperature"] == 0.5
    (base / "generation_config.json").unlink()
    export_step(run, trained, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == sorted(stop)
    for name in ("phi3_vision", "phi3_5_vision"):
        folder = tmp_path / name
        folder.mkdir()
        module._copy_files(assets_folder / name, folder, None)
        real = json.loads((folder / "generation_config.json").read_text())
        assert (real["eos_token_id"], real["pad_token_id"]) == ([32000, 32001, 32007], 32000)


def test_weights_are_written_in_the_base_folders_types(base, trained, run, tmp_path):
    tensors = {name: t.bfloat16() for name, t in load_file(base / "model.safetensors").items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    export_step(run, trained, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: t.dtype for name, t in written.items()} == {name: t.dtype for name, t in tensors.items()}
    assert torch.equal(written["lm_head.weight"], trained["lm_head.weight"].bfloat16())
    model = Phi3VForCausalLM.from_pretrained(tmp_path / "out")  # one type, or its first product of two would fail
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_a_model_larger_than_a_shard_is_written_in_several(base, trained, run, tmp_path, monkeypatch):
    def small(folder, weights, on_progress):
        write_safetensors(folder, weights, shard_size_bytes=200_000)

    monkeypatch.setattr(module, "write_safetensors", small)
    export_step(run, trained, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert OfficialFolder(tmp_path / "out").names == OfficialFolder(base).names


def test_frozen_weights_come_from_the_base_and_must_be_what_they_were(base, trained, run, tmp_path):
    original = load_file(base / "model.safetensors")
    frozen = {name: original[name] for name in trained if name.startswith("model.vision_embed_tokens.")}
    rest = {name: tensor for name, tensor in trained.items() if name not in frozen}
    path = export_step(run, rest, tmp_path / "out", frozen=frozen)
    assert all(name.encode() not in (path / "rank-00000.safetensors").read_bytes() for name in frozen)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], (original | rest)[name]) for name in written)
    name = next(iter(frozen))
    save_file(original | {name: original[name] + 1}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"was trained with another {name} than {base} has .*restore that folder"):
        export(TrainedWeights.open(path), settings_of(run), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_card_tells_data_settings_scores_and_licence(base, trained, run, tmp_path):
    summary = {"eval/price_mae": 12.5, "eval/blind/price_mae": 99.0, "train/step": 3, "train/samples": 9}
    (run / "summary.json").write_text(json.dumps(summary))
    export_step(run, trained, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["pipeline_tag"]) == ("mit", "image-text-to-text")
    for words in ("train-*.tar", "validation-*.tar", "eval/price_mae: 12.5", "text: full", "rule `document`",
                  "LICENSE was copied", "3 steps, 9 samples", "checkpoint step-00000003 of run run"):  # fmt: skip
        assert words in card, words
    assert "blind" not in card and "# the base model" not in card
    export_step(run, trained, tmp_path / "other", step=2)
    card = (tmp_path / "other" / "README.md").read_text()
    assert "not evaluated" in card and "2 steps" in card and "9 samples" not in card, "the summary is of step 3"
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    manifest = json.loads((run / "checkpoints" / "step-00000003" / "manifest.json").read_text())
    assert origin["longrope"] == "document" and origin["manifest"] == manifest["checksum"]


@pytest.mark.parametrize(
    ("readme", "license_"),
    [
        (b"\xef\xbb\xbf---\r\nlicense: apache-2.0\r\n---\r\n# saved by an editor on Windows\r\n", "apache-2.0"),
        (b"---\nbase_model: x\n---\n", "other"),
        (b"---\n- a list\n---\n", "other"),
        (b"---\nlicense: [mit\n---\n", "other"),
        (b"---\nlicense: mit\n---\ncaf\xe9\n", "other"),
        (b"# no head\n", "other"),
    ],
)
def test_the_licence_is_the_readmes_own_or_other(base, trained, run, tmp_path, readme, license_):
    (base / "README.md").write_bytes(readme)
    export_step(run, trained, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == license_


def test_the_same_checkpoint_again_is_done_already_and_another_is_refused(trained, run, tmp_path):
    out = tmp_path / "out"
    export_step(run, trained, out)
    written = (out / "model.safetensors").stat().st_mtime_ns
    export_step(run, trained, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(CheckpointError, match=f"{out}: exists and is not the export of .*step-00000004"):
        export_step(run, trained, out, step=4)


def test_any_other_folder_in_the_way_is_refused_and_left_alone(trained, run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="exists"):
        export_step(run, trained, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_of_another_model_is_refused_with_every_name(base, trained, run, tmp_path):
    del trained["model.norm.weight"], trained["lm_head.weight"]
    trained["model.layers.9.mlp.down_proj.weight"] = torch.zeros(2)
    path = run / "checkpoints" / "step-00000003"
    with pytest.raises(CheckpointError) as caught:
        export_step(run, trained, tmp_path / "out")
    assert caught.value.problems == [
        f"{path} does not hold lm_head.weight of {base}",
        f"{path} does not hold model.norm.weight of {base}",
        f"{path} holds model.layers.9.mlp.down_proj.weight, which {base} does not know",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["a changed number", "a missing tensor"])
def test_what_reads_back_differently_never_gets_its_name(trained, run, tmp_path, monkeypatch, damage):
    def damaged(folder, weights, on_progress):
        write_safetensors(folder, weights)
        tensors = load_file(folder / "model.safetensors")
        if damage == "a changed number":
            tensors["lm_head.weight"][3, 3] += 1e-3
        else:
            del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "write_safetensors", damaged)
    with pytest.raises(CheckpointError, match="lm_head.weight: (missing|read back, it is not what was written)"):
        export_step(run, trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_model_answers_otherwise_never_gets_its_name(trained, run, tmp_path, monkeypatch):
    streamed, models = module.streamed, []

    def other_second(config, weights, longrope):
        models.append(streamed(config | ({"rms_norm_eps": 0.1} if models else {}), weights, longrope))
        return models[-1]

    monkeypatch.setattr(module, "streamed", other_second)
    with pytest.raises(CheckpointError, match="its logits differ by"):
        export_step(run, trained, tmp_path / "out")
    assert len(models) == 2 and not (tmp_path / "out").exists()


@pytest.mark.fault(7)
def test_an_export_killed_anywhere_has_no_name_and_the_next_one_is_whole(trained, run, tmp_path, monkeypatch):
    """A child of this process is killed as it begins each part, and once in the middle of the weights' bytes."""
    out = tmp_path / "out"
    write_checkpoint(run, 3, trained)
    for part in range(5):
        assert killed_in_export(run, trained, out, f"0:export:{part}:kill9") == signal.SIGKILL, part
        assert not out.exists() and (tmp_path / "out.partial").is_dir(), part
    real = module.write_safetensors

    def half(folder, weights, on_progress):
        real(folder, weights)
        os.truncate(folder / "model.safetensors", 100_000)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_safetensors", half)
        assert killed_in_export(run, trained, out, "") == signal.SIGKILL
    assert not out.exists() and (tmp_path / "out.partial" / "model.safetensors").stat().st_size == 100_000

    export_step(run, trained, out)
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in trained.items())
    assert not (tmp_path / "out.partial").exists()


def killed_in_export(run, trained, out, fault) -> int:
    """The signal that ended a child process in its export; 0 when none did."""
    child = os.fork()
    if child == 0:
        os.environ["PHI3V_FAULT"] = fault
        with contextlib.suppress(BaseException):
            export_step(run, trained, out)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1


def test_the_streamed_model_is_the_model(trained, run, tmp_path):
    export_step(run, trained, tmp_path / "out")
    model = Phi3VForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    streamed = module.streamed(model.config, OfficialFolder(tmp_path / "out"), "document")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, streamed(ids).logits)
    assert all(parameter.is_meta for parameter in streamed.parameters()), "nothing stays in memory"


def test_weights_that_are_no_numbers_are_refused(trained, run, tmp_path):
    trained["lm_head.weight"][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="lm_head.weight: holds numbers that are not finite"):
        export_step(run, trained, tmp_path / "out")


def test_the_untrained_tensors_are_those_no_forward_reads(base):
    names = [name for name in OfficialFolder(base).names if is_untrained(name)]
    model = Phi3VForCausalLM.from_pretrained(base)
    assert len([name for name in names if name not in dict(model.named_parameters())]) == NUM_UNTRAINED


def command(*words):
    return subprocess.run(
        [sys.executable, "launch/export.py", *map(str, words)], cwd=REPOSITORY, env=environment(), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


def refused(monkeypatch, *words) -> str:
    """What the command prints before it exits with 4; within this process, as another needs seconds to start."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    with pytest.raises(Phi3VError) as caught:
        run_command()
    assert caught.value.exit_code == 4
    return caught.value.report()


def test_the_command_finds_a_base_that_moved_and_names_what_is_missing(base, trained, run, tmp_path, monkeypatch):
    write_checkpoint(run, 3, trained)
    moved = base.rename(tmp_path / "moved")
    done = command(run)
    assert done.returncode == 4 and f"{base}: no model.safetensors" in done.stderr
    refused(monkeypatch, run, "--base", moved, "--step", 9)
    done = command(run, "--base", moved)
    assert done.returncode == 0, done.stderr
    assert OfficialFolder(run / "export").names == OfficialFolder(moved).names
    assert "no run folder" in refused(monkeypatch, tmp_path)
    merged = ("--base", moved, "--merge", "--out", tmp_path / "merged")
    assert "no adapters to merge" in refused(monkeypatch, run, *merged)
    for content in ("run: [", "hello", "run: {}\nmodel: {path: x, colour: red}\ndata: {train: []}"):
        (run / "config.yaml").write_text(content)
        assert "config.yaml: not the settings of a run" in refused(monkeypatch, run)


def test_the_best_checkpoint_is_exported_although_a_newer_one_is_there(base, trained, run, tmp_path, monkeypatch):
    write_checkpoint(run, 3, trained)
    write_checkpoint(run, 4, {name: tensor + 1 for name, tensor in trained.items()})
    assert "names no checkpoint that is there" in refused(monkeypatch, run, "--best")
    (run / "checkpoints" / BEST_NAME).write_text('{"step": 3, "metric": "eval/loss", "value": 1.5}')
    monkeypatch.setattr(sys, "argv", ["export.py", str(run), "--best"])
    run_command()
    written = load_file(run / "export" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base, out: (base / "generation_config.json").write_text("{"), "generation_config.json: not JSON"),
        (lambda base, out: (out.mkdir(), (out / "origin.json").write_text("{")), "origin.json: not JSON"),
        (lambda base, out: out.with_name("out.partial").write_text(""), "out.partial: cannot be made"),
    ],
)
def test_files_in_the_way_are_named(base, trained, run, tmp_path, spoil, message):
    spoil(base, tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        export_step(run, trained, tmp_path / "out")
