"""Checkpoints that DeepSpeed wrote, imported: nothing in them runs, nothing is lost, and what is wrong is named."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, environment

from phi3v_dist import config
from phi3v_dist.config import Settings
from phi3v_dist.errors import CheckpointError, ConfigError
from phi3v_dist.survive.deepspeed_files import DeepSpeedCheckpoint, Inert, read_inert
from phi3v_dist.survive.deepspeed_import import import_checkpoint
from phi3v_dist.survive.manifest import damage
from phi3v_dist.survive.rank_files import TensorReader

RANKS = Path(__file__).with_name("deepspeed_ranks.py")
WAYS = ("full", "frozen")
TIMEOUT_S = 280
SAME_IN_FP32 = 2e-6  # relative


@pytest.fixture(scope="module")
def old(tiny_model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of checkpoints by DeepSpeed, runs that go on from them, and notes; see deepspeed_ranks.py."""
    import conftest

    folder = tmp_path_factory.mktemp("deepspeed")
    tree = conftest.settings_tree.__wrapped__(tiny_model, shards, folder)
    tree["run"]["root"] = str(folder)
    tree["train"] |= {"rows_per_step": 6}
    frozen = copy.deepcopy(tree)
    frozen["train"]["parts"] = {"text": "full", "vision": "frozen", "projector": "full"}
    frozen["model"]["dtype"] = "bf16"
    for name, way in zip(WAYS, (tree, frozen), strict=True):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(way))
    done = subprocess.run(
        [sys.executable, str(RANKS), str(folder)], env=environment(), cwd=REPOSITORY, capture_output=True, text=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def note(old: Path, name: str) -> dict:
    return json.loads((old / f"{name}.json").read_text())


def settings_of(old: Path, tmp_path: Path, *words: str, way: str = "full") -> Settings:
    return config.load(old / f"{way}.yaml", [f"run.root={tmp_path / 'runs'}", *words])


@pytest.fixture
def broken(old: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be broken."""
    return shutil.copytree(old / "full-old", tmp_path / "broken")


@pytest.mark.fault(22)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.supports("deepspeed checkpoint", on="2 ranks")
@pytest.mark.supports("deepspeed checkpoint", on="more ranks")
def test_every_master_and_moment_is_what_it_was_and_training_goes_on(old: Path, way: str, world_size: int) -> None:
    before, after = note(old, f"{way}-old"), note(old, f"{way}-{world_size}")
    assert after["digests"] == before["digests"] and len(before["digests"]) > 60
    assert after["position"] == [0, {}] and after["step"] == 2
    if world_size == 2:
        assert after["losses"] == before["losses"]
    else:
        tolerance = SAME_IN_FP32 if way == "full" else 1e-3
        assert after["losses"] == pytest.approx(before["losses"], rel=tolerance)


@pytest.mark.fault(22)
def test_the_imported_checkpoint_is_one_of_ours(old: Path) -> None:
    path = old / "full-3" / "checkpoints" / "step-00000000"
    assert damage(path) == []
    reader = TensorReader(path)
    assert reader.manifest["world_size"] == 2 and reader.manifest["engine"]["counters"]["global_steps"] == 2
    assert reader.get("lm_head.weight").shape == reader.shapes["lm_head.weight"]
    frozen = TensorReader(old / "frozen-3" / "checkpoints" / "step-00000000").specs
    assert {spec.role for spec in frozen.values()} == {"trained", "frozen"}


@pytest.mark.fault(22)
@pytest.mark.slow
def test_the_command_imports_and_the_run_goes_on_from_it(old: Path, tmp_path: Path) -> None:
    options = {"cwd": REPOSITORY, "env": environment(), "capture_output": True, "text": True, "timeout": TIMEOUT_S}
    words = [f"run.root={tmp_path}", "run.name=new", "train.steps=1", "train.warmup_steps=0", "data.validation=[]"]
    command = [sys.executable, "launch/prepare.py", "checkpoint", str(old / "full-old")]
    done = subprocess.run([*command, "--config", str(old / "full.yaml"), *words], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "global_step2, step 2, saved by 2 ranks" in done.stdout and "its data begins at the start" in done.stdout
    again = subprocess.run([*command, "--config", str(old / "full.yaml"), *words], **options)
    assert again.returncode == 2 and "has begun already (checkpoints)" in again.stderr
    train = [sys.executable, "launch/train.py", "--config", str(old / "full.yaml"), *words]
    trained = subprocess.run(train, **options)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "continuing from" in trained.stdout and "step-00000000, step 0 of 1" in trained.stdout
    newest = TensorReader(tmp_path / "new" / "checkpoints" / "step-00000001")
    assert newest.manifest["engine"]["optimizer_scalars"][0]["step"]["value"] == 3, "Adam goes on with its own step"


class Canary:
    """Unpickled as usual, it writes a file."""

    def __init__(self, path: Path, how: str):
        self.path, self.how = path, how

    def __reduce__(self) -> tuple:
        if self.how == "call":
            return os.makedirs, (str(self.path), 0o700, True)
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.fault(87)
@pytest.mark.parametrize("how", ["call", "code"])
def test_nothing_in_the_files_runs(broken: Path, old: Path, tmp_path: Path, how: str) -> None:
    canary = tmp_path / "canary"
    for path in (broken / "global_step2").iterdir():
        content = torch.load(path, weights_only=False)
        torch.save(content | {"extra": Canary(canary, how), "hidden": {"deep": [Canary(canary, how)]}}, path)
    folder = import_checkpoint(DeepSpeedCheckpoint.open(broken), settings_of(old, tmp_path))
    assert damage(folder) == [] and not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the canary is alive: read as usual, it fires"


@pytest.mark.fault(87)
def test_a_pickle_that_is_all_code_becomes_an_object_that_does_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save(Canary(canary, "call"), tmp_path / "x.pt")
    found = read_inert(tmp_path / "x.pt")
    assert isinstance(found, Inert) and found.arguments[0] == str(canary) and not canary.exists()
    for content in (pickle.dumps(Canary(canary, "call")), b"PK\x03\x04 no archive", b""):
        (tmp_path / "y.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"y.pt cannot be read: .*not written by torch.save") as raised:
            read_inert(tmp_path / "y.pt")
        assert "Error" not in str(raised.value) and ".." not in str(raised.value), "no words of torch's own"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "z.pt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_inert(tmp_path / "z.pt")
    assert not canary.exists()


def change(path: Path, edit: Callable[[dict], object]) -> None:
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def without_rank_1(step: Path) -> None:
    for path in step.glob("*rank_1_*"):
        path.unlink()


def with_another_name(step: Path) -> None:
    for path in step.glob("*model_states.pt"):
        change(path, lambda content: content["param_shapes"][-1].update(stranger=torch.Size([0])))


def cut_off(step: Path) -> None:
    path = next(step.glob("*rank_1*optim_states.pt"))
    path.write_bytes(path.read_bytes()[:-2000])


def shorter(step: Path) -> None:
    def edit(content: dict) -> None:
        flats = content["optimizer_state_dict"]["fp32_flat_groups"]
        flats[0] = flats[0].detach()[:-1].clone()

    change(next(step.glob("*rank_1*optim_states.pt")), edit)


def of_stage_2(step: Path) -> None:
    for path in step.glob("*model_states.pt"):
        path.unlink()
    torch.save({}, step / "mp_rank_00_model_states.pt")


def by_three_ranks(step: Path) -> None:
    for path in step.glob("*model_states.pt"):
        change(path, lambda content: content.update(dp_world_size=3))


def tensor_parallel(step: Path) -> None:
    for path in step.glob("*model_states.pt"):
        change(path, lambda content: content.update(mp_world_size=2))


@pytest.mark.parametrize(
    ("breaks", "told"),
    [
        (without_rank_1, ["model_states.pt of rank 1 is missing", "optim_states.pt of rank 1", "saved by 2 ranks"]),
        (by_three_ranks, ["model_states.pt of rank 2 is missing", "saved by 3 ranks"]),
        (with_another_name, ["stranger: in", "not in the model"]),
        (cut_off, ["rank_1", "cannot be read", "cut off, damaged"]),
        (shorter, ["rank_1", "elements, but the names beside it stand for"]),
        (of_stage_2, ["holds no ZeRO-3 checkpoint", "zero_to_fp32.py"]),
        (tensor_parallel, ["tensor parallelism"]),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named_and_nothing_is_written(
    broken: Path, old: Path, tmp_path: Path, breaks: Callable[[Path], None], told: list[str]
) -> None:
    breaks(broken / "global_step2")
    settings = settings_of(old, tmp_path)
    with pytest.raises(CheckpointError) as raised:
        import_checkpoint(DeepSpeedCheckpoint.open(broken), settings)
    assert all(part in raised.value.report() for part in told), raised.value.report()
    assert not list((settings.run.folder / "checkpoints").glob("*"))


def test_files_of_a_deepspeed_that_was_never_tested_are_imported_with_a_warning(
    broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DeepSpeedCheckpoint.open(broken)
    assert not caplog.messages
    for path in (broken / "global_step2").glob("*model_states.pt"):
        change(path, lambda content: content.update(ds_version="0.14.2"))
    DeepSpeedCheckpoint.open(broken)
    (warning,) = caplog.messages
    assert "was saved by DeepSpeed 0.14.2; importing is tested with files of deepspeed==0.19.8" in warning


def test_settings_that_do_not_fit_are_named_by_tensor(old: Path, tmp_path: Path) -> None:
    source = DeepSpeedCheckpoint.open(old / "full-old")
    settings = settings_of(old, tmp_path, "train.parts.vision=frozen")
    with pytest.raises(CheckpointError) as raised:
        import_checkpoint(source, settings)
    assert "class_embedding: trained in" in str(raised.value) and "frozen by `train.parts`" in str(raised.value)
    (settings.run.folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has begun already \(checkpoints\)"):
        import_checkpoint(source, settings)


def test_a_folder_that_is_none_and_a_tag_that_is_not_there_are_named(old: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no DeepSpeed checkpoint: it has neither"):
        DeepSpeedCheckpoint.open(tmp_path)
    for tag in ("global_step7", "../full-old", ""):
        with pytest.raises(CheckpointError, match="there is no checkpoint .* in it; there is global_step2"):
            DeepSpeedCheckpoint.open(old / "full-old", tag)
    inside = DeepSpeedCheckpoint.open(old / "full-old" / "global_step2")
    assert inside.folder == DeepSpeedCheckpoint.open(old / "full-old").folder


def test_a_folder_that_is_not_there_or_a_file_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, told in (("nowhere", "nowhere: there is no such folder"), ("file", "file: that is a file")):
        with pytest.raises(CheckpointError, match=told):
            DeepSpeedCheckpoint.open(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"x.pt cannot be read: No such file or directory$"):
        read_inert(tmp_path / "x.pt")


def test_checkpoints_of_our_own_are_told_from_those_of_deepspeed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    for folder in (tmp_path / "run", checkpoint.parent, checkpoint):
        with pytest.raises(CheckpointError, match=r"own format.*model.init_from=.*step-00000004 "):
            DeepSpeedCheckpoint.open(folder)


def test_tags_that_there_are_are_listed_beside_one_that_is_not_there(tmp_path: Path) -> None:
    for name in ("global_step20", "global_step10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    (tmp_path / "latest").write_text("global_step30")
    with pytest.raises(CheckpointError, match="no checkpoint 'nope' in it; there is global_step10, global_step20"):
        DeepSpeedCheckpoint.open(tmp_path, "nope")
    with pytest.raises(CheckpointError, match="no checkpoint 'global_step30' in it"):
        DeepSpeedCheckpoint.open(tmp_path)
