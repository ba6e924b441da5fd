"""Whole runs through the real launchers: real DeepSpeed ZeRO-3, real shards, two gloo ranks."""

import json
import math
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from conftest import REPOSITORY, environment, write_samples
from launching import TIMEOUT_S, command, launch, losses

from phi3v_dist.observe.tracker import read_metrics

SAME_IN_FP32 = 2e-6  # relative, first 10 steps; measured: 4e-7


def rates(folder) -> dict[int, float]:
    return {int(row["train/step"]): row["train/lr/text"] for row in read_metrics(folder) if "train/lr/text" in row}


@pytest.mark.supports("torchrun", "evaluation", "local", on="2 ranks")
def test_a_finished_run_leaves_everything_a_person_needs(reference):
    assert sorted(losses(reference)) == list(range(1, 11))
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["train/step"] == 10
    assert {"eval/loss", "eval/field_em/colour", "eval/parse_fail_pct", "eval/stop_pct"} <= set(summary)
    resolved = yaml.safe_load((reference / "config.yaml").read_text())
    assert resolved["train"]["steps"] == 10 and resolved["environment"]["versions"]["deepspeed"]
    assert [path.name for path in sorted((reference / "checkpoints").glob("step-*"))] == [
        "step-00000004", "step-00000008", "step-00000010",
    ]  # fmt: skip
    predictions = (reference / "eval" / "step-000010" / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 12
    untuned = json.loads((reference / "eval" / "step-000000" / "scores.json").read_text())
    assert not any("blind" in name for name in untuned)
    assert summary["eval/base/samples"] == untuned["eval/samples"] == 12
    assert summary["eval/base/loss"] == pytest.approx(untuned["eval/loss"], rel=1e-12)
    assert summary["eval/minus_base/loss"] == pytest.approx(summary["eval/loss"] - untuned["eval/loss"])
    assert summary["eval/minus_base/loss"] < 0
    assert len(list((reference / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize("name", [pytest.param("single", marks=pytest.mark.slow), "deepspeed"])
@pytest.mark.supports("deepspeed", on="2 ranks")
@pytest.mark.supports("python", on="one process")
def test_losses_do_not_depend_on_the_launcher_or_the_number_of_ranks(launched, reference, name):
    config, root = launched
    done = launch(name, config, f"run.name={name}", "data.validation=[]", "checkpoint.every_steps=100")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found, wanted = losses(root / name), losses(reference)
    assert found.keys() == wanted.keys()
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, rel=SAME_IN_FP32), step


@pytest.mark.slow
@pytest.mark.fault(31)
def test_a_killed_run_continues_bit_for_bit(launched, reference):
    config, root = launched
    run = root / "killed"
    words = command("torchrun", config, "run.name=killed")
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and max(losses(run), default=0) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    everything = [process, *psutil.Process(process.pid).children(recursive=True)]  # ranks have sessions of their own
    for each in everything:
        each.kill()
    process.wait()
    killed_at = max(losses(run))
    assert 6 <= killed_at < 10

    done = launch("torchrun", config, "run.name=killed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing from" in done.stdout
    assert losses(run) == losses(reference)
    assert rates(run) == rates(reference) and len(set(rates(run).values())) == 10, "the schedule began anew"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["run/attempt"] for row in rows} == {1, 2}

    again = launch("single", config, "run.name=killed")  # finished: says so at once, whatever the launcher
    assert again.returncode == 0 and "finished" in again.stdout


@pytest.mark.slow  # tests/parallel/test_equal_collectives.py shows it in less time
def test_rows_with_and_without_pictures_share_a_step(launched):
    """One sample a row: in most micro-steps one rank has a picture and the other has none."""
    config, root = launched
    words = ("data.packing=off", "train.rows_per_step=4", "train.steps=4", "data.validation=[]")
    two = launch("torchrun", config, "run.name=mixed2", *words)
    one = launch("single", config, "run.name=mixed1", *words)
    assert two.returncode == 0 and one.returncode == 0, two.stderr[-3000:] + one.stderr[-3000:]
    assert losses(root / "mixed2") == pytest.approx(losses(root / "mixed1"), rel=SAME_IN_FP32)


@pytest.mark.supports("damaged", on="2 ranks")
def test_a_bad_picture_is_left_out_named_and_the_loss_stays_a_mean(launched, tmp_path):
    """The header is whole, so the sample is planned; the rest is not, so it is quarantined when it is decoded."""
    import io
    import tarfile

    config, root = launched
    good = write_samples(tmp_path / "good.tar", range(0, 8))
    bad = tmp_path / "bad.tar"
    with tarfile.open(good) as source, tarfile.open(bad, "w") as target:
        for entry in source:
            data = source.extractfile(entry).read()
            data = data[: len(data) // 2] + bytes(len(data) - len(data) // 2) if "00004.0.jpg" in entry.name else data
            target.addfile(entry, io.BytesIO(data))
    words = (
        f"data.train=[{{shards: {bad}}}]", "data.validation=[]", "data.max_bad_frac=0.5", "train.steps=4",
        "train.rows_per_step=4", "data.row_length_tokens=1600",
    )  # fmt: skip
    done = launch("torchrun", config, "run.name=bad", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "quarantined" in done.stdout and "00004" in done.stdout
    rows = read_metrics(root / "bad")
    assert rows[-1]["data/quarantined"] >= 1
    assert all(0 < row["train/loss"] < 12 for row in rows)

    words = (*words[:3], "train.steps=8", "train.rows_per_step=1", "data.packing=false", "data.num_crops=1")
    done = launch("single", config, "run.name=alone", *words)  # a step with nothing to learn from
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [row for row in read_metrics(root / "alone") if "train/loss" in row]
    (empty,) = [row for row in steps if math.isnan(row["train/loss"])]
    assert empty["train/grad_norm"] == 0 and all(0 < row["train/loss"] < 12 for row in steps if row is not empty)


@pytest.mark.slow
def test_one_batch_can_be_learned_by_heart(launched):
    config, root = launched
    words = ("train.overfit_one_batch=true", "train.steps=150", "train.rows_per_step=1", "data.validation=[]")
    rates = "train.learning_rate={text: 3e-3, vision: 3e-3, projector: 3e-3}"
    done = launch("single", config, "run.name=overfit", rates, *words, "checkpoint.every_steps=1000")
    assert done.returncode == 0, done.stderr[-3000:]
    found = losses(root / "overfit")
    assert found[1] > 3 and found[150] < 0.1


@pytest.mark.supports("export", on="2 ranks")
def test_an_export_gives_the_scores_of_the_run(launched, reference):
    config, root = launched
    done = subprocess.run(
        [sys.executable, "launch/export.py", str(reference)], cwd=REPOSITORY, env=environment(), capture_output=True,
        text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    from phi3v_dist.model import Phi3VForCausalLM
    from phi3v_dist.model.weights import OfficialFolder
    from phi3v_dist.survive.checkpoint import read_tensors

    trained = read_tensors(reference / "checkpoints" / "step-00000010")
    exported = OfficialFolder(reference / "export")
    base = OfficialFolder(_base(reference))
    assert exported.names == base.names  # complete: CLIP's untrained last layer too
    assert all(torch.equal(exported.get(name), trained.get(name)) for name in trained.names)
    changed = [name for name in trained.names if not torch.equal(trained.get(name), base.get(name))]
    assert len(changed) == len(trained.names)  # and every trained tensor did move
    assert Phi3VForCausalLM.from_pretrained(reference / "export").config == json.loads(
        (_base(reference) / "config.json").read_text()
    )

    scored = subprocess.run(
        [sys.executable, "launch/evaluate.py", "--config", str(config), "--model", str(reference / "export")],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr[-3000:]
    ours = (reference / "eval" / "step-000010" / "predictions.jsonl").read_text().splitlines()
    theirs = (reference / "eval" / "export" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in theirs] == [json.loads(line)["prediction"] for line in ours]


PARTS = "train.parts={text: lora, vision: frozen, projector: full}"


@pytest.fixture(scope="module")
def adapted(launched):
    """A finished run on two ranks: adapters on the text, a frozen tower, a projector trained in full."""
    config, root = launched
    done = launch("torchrun", config, "run.name=adapted", PARTS, "train.lora={rank: 4, alpha: 8, dropout: 0.1}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root / "adapted"


def test_a_checkpoint_of_an_adapted_run_holds_what_was_trained_and_no_more(adapted, tiny_model):
    from phi3v_dist.model.adapters import is_adapter, part_of
    from phi3v_dist.model.weights import OfficialFolder, is_untrained
    from phi3v_dist.survive.checkpoint import read_tensors

    checkpoint = read_tensors(adapted / "checkpoints" / "step-00000010")
    stored = {name for name, spec in checkpoint.specs.items() if spec.role == "trained"}
    base = OfficialFolder(tiny_model)
    projector = {name for name in base.names if part_of(name) == "projector"}
    assert stored == projector | {name for name in checkpoint.names if is_adapter(name)}
    assert set(checkpoint.names) - stored == {n for n in base.names if n not in projector and not is_untrained(n)} | {
        name for name in base.names if ".encoder.layers.0." in name
    }
    content = b"".join(path.read_bytes() for path in (adapted / "checkpoints" / "step-00000010").glob("rank-*"))
    assert b"qkv_proj.lora_A" in content and b"weight/model.norm.weight" not in content
    assert all(checkpoint.get(name).any() for name in stored if "lora_B" in name), "every adapter has learned"


@pytest.mark.supports("lora", "resume", on="2 ranks")
def test_an_adapted_run_continues_bit_for_bit_at_its_world_size_and_nearly_so_at_another(launched, adapted):
    config, root = launched
    for name, how in (("again-2", "torchrun"), ("again-1", "single")):
        run = shutil.copytree(adapted, root / name)
        for made_later in (run / "checkpoints" / "step-00000008", run / "checkpoints" / "step-00000010"):
            shutil.rmtree(made_later)
        (run / "summary.json").unlink()
        words = (PARTS, "train.lora={rank: 4, alpha: 8, dropout: 0.1}", "data.validation=[]")
        done = launch(how, config, f"run.name={name}", *words)
        assert done.returncode == 0 and "step-00000004, step 4 of 10" in done.stdout, done.stderr[-3000:]
        if how == "torchrun":
            assert losses(run) == losses(adapted)
        else:  # dropout draws other numbers there
            assert losses(run) == pytest.approx(losses(adapted), rel=0.05)


@pytest.mark.slow
@pytest.mark.supports("export lora", "init_from", on="2 ranks")
def test_an_adapted_run_exports_as_a_whole_and_another_begins_with_it(launched, adapted, tiny_model):
    from phi3v_dist.model.weights import OfficialFolder

    config, root = launched
    words = [sys.executable, "launch/export.py", str(adapted)]
    options = {"cwd": REPOSITORY, "env": environment(), "capture_output": True, "text": True, "timeout": TIMEOUT_S}
    refused = subprocess.run(words, **options)
    assert refused.returncode == 4 and "export with --merge" in refused.stderr
    done = subprocess.run([*words, "--merge"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    base, merged = OfficialFolder(tiny_model), OfficialFolder(adapted / "export")
    changed = {name for name in base.names if not torch.equal(base.get(name), merged.get(name))}
    assert all("_proj" in name or "_GN" in name for name in changed) and len(changed) == 4 * 2 + 6

    first_losses = {}
    for name, start in (("from-run", adapted), ("from-export", adapted / "export")):
        begun = launch(
            "single", config, f"run.name={name}", f"model.init_from={start}", "train.steps=1", "train.warmup_steps=0",
            "data.validation=[]",
        )  # fmt: skip
        assert begun.returncode == 0, begun.stderr[-3000:]
        first_losses[name] = losses(root / name)[1]
    assert first_losses["from-run"] == first_losses["from-export"]
    assert first_losses["from-run"] < losses(adapted)[1], "it begins where the other ended"


def _base(run):
    from pathlib import Path

    return Path(yaml.safe_load((run / "config.yaml").read_text())["model"]["path"])


@pytest.mark.fault(83)
@pytest.mark.fault(84)
def test_three_mistakes_are_reported_together_before_a_model_is_built(launched, tmp_path):
    config, root = launched
    not_a_tar = tmp_path / "x.tar"
    not_a_tar.write_text("hello" * 1000)
    done = launch(
        "torchrun", config, "run.name=mistakes", "train.step=3", "data.row_length_tokens=many",
        "train.gradient_accumulation_steps=7",
        f"data.train=[{{shards: {not_a_tar}}}, {{shards: {tmp_path}/none-*.tar}}]",
    )  # fmt: skip
    assert done.returncode != 0
    assert not (root / "mistakes").exists()
    words = ("did you mean `train.steps`", "row_length_tokens", "gradient_accumulation_steps", "not a tar", "none-*")
    for word in words:
        assert word in done.stderr, word
    summary = done.stderr.partition("Root Cause")[2]
    assert re.search(r"traceback : configuration: \d+ problem", summary), "torchrun does not name the cause"


@pytest.mark.slow
def test_a_run_with_states_and_weights_on_the_host_ends_as_any_other(launched, reference):
    config, root = launched
    words = ("run.name=on-host", "parallel.deepspeed=ds_configs/zero3_offload_all.json", "checkpoint.every_steps=5")
    done = launch("torchrun", config, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found, wanted = losses(root / "on-host"), losses(reference)
    assert found == pytest.approx(wanted, rel=SAME_IN_FP32)
    here, there = (json.loads((folder / "summary.json").read_text()) for folder in (root / "on-host", reference))
    assert here["eval/loss"] == pytest.approx(there["eval/loss"], rel=1e-5)
