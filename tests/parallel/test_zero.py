"""The DeepSpeed JSON: what is filled in, and what contradicts the settings."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from phi3v_dist.config import Settings
from phi3v_dist.parallel import zero_limits
from phi3v_dist.parallel.zero import problems, resolve

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture
def settings(tmp_path):
    """Settings with a DeepSpeed JSON of this content, or the path of one."""

    def settings(config, **train) -> Settings:
        path = config
        if not isinstance(config, Path):
            path = tmp_path / "ds.json"
            path.write_text(config if isinstance(config, str) else json.dumps(config))
        tree = {
            "model": {"path": "m"},
            "data": {"train": [{"shards": "a.tar"}]},
            "train": {"steps": 200} | train,
            "parallel": {"deepspeed": path, "nvme": tmp_path / "nvme"},
        }
        return Settings.model_validate(tree)

    return settings


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_shipped_json_resolves_to_what_deepspeed_accepts(settings, path, dtype, monkeypatch):
    monkeypatch.setattr(zero_limits, "is_built", lambda name: True)
    chosen = settings(path, rows_per_step=8, grad_clip=0.5)
    assert problems(chosen, world_size=1) == []
    config = resolve(chosen, 1, dtype, hidden_size=64)
    assert '"auto"' not in json.dumps(config)
    read = DeepSpeedConfig(config)
    assert (read.zero_optimization_stage, read.gradient_clipping) == (3, 0.5)
    assert (read.train_batch_size, read.gradient_accumulation_steps) == (8, 8)
    assert read.bfloat16_config.enabled == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("rows", "world_size", "micro_steps"), [(8, 2, 4), (3, 2, 2), (2, 4, 1), (1, 1, 1)])
def test_batch_numbers_follow_from_rows_and_ranks(settings, rows, world_size, micro_steps):
    config = resolve(settings(ZERO3, rows_per_step=rows), world_size, torch.float32, 64)
    assert config["gradient_accumulation_steps"] == micro_steps
    assert config["train_batch_size"] == micro_steps * world_size
    assert config["train_micro_batch_size_per_gpu"] == 1


def test_values_that_have_no_home_elsewhere_are_kept(settings):
    zero = {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": "auto"}
    given = {"zero_optimization": zero, "bf16": {"enabled": "auto", "check_grad_overflow": True}, "seed": 3}
    config = resolve(settings(given), 1, torch.bfloat16, hidden_size=100)
    assert config["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 9000,
    }  # fmt: skip
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["seed"] == 3


@pytest.mark.fault(82)
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train_batch_size": 8}, '`train_batch_size` is 8; write "auto", its home is train.rows_per_step'),
        ({"gradient_accumulation_steps": 8}, "its home is train.gradient_accumulation_steps"),
        ({"train_micro_batch_size_per_gpu": 1}, "its home is one row per forward, always"),
        ({"gradient_clipping": 1.0}, '`gradient_clipping` is 1.0; write "auto", its home is train.grad_clip'),
        ({"bf16": {"enabled": False}}, '`bf16.enabled` is False; write "auto", its home is model.dtype'),
        ({"bf16": True}, "`bf16.enabled` is True"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            "`optimizer` does not belong here: learning rates",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler` does not belong here"),
        ({"csv_monitor": {"enabled": True}}, "`csv_monitor` does not belong here: metrics.jsonl"),
        ({"comet": {"enabled": True}}, "`comet` does not belong here: DeepSpeed's own monitor would open"),
        ({"fp16": {"enabled": "auto"}}, "`fp16` does not belong here: use bf16 or fp32"),
        ({"zero_optimization": {"stage": 2}}, "`zero_optimization.stage` is 2; this harness shards weights, and its"),
        ({"zero_optimization": {}}, "`zero_optimization.stage` is None"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, '"auto" of `zero_optimization.sub_group_size`'),
        (
            {"gradient_acumulation_steps": 4},
            ":1: `gradient_acumulation_steps` is no key of DeepSpeed",
        ),
        ({"gradient_acumulation_steps": 4}, "; did you mean `gradient_accumulation_steps`?"),
        ({"zero_optimisation": {}}, "did you mean `zero_optimization`?"),
        ({"zero_optimization": None}, "not a JSON object with a `zero_optimization` object"),
    ],
)
def test_a_contradiction_gives_one_message_that_names_the_file_and_the_key(settings, extra, message):
    chosen = settings(ZERO3 | extra)
    found = problems(chosen, world_size=1)
    assert len(found) == 1, found
    assert message in found[0]
    assert str(chosen.parallel.deepspeed) in found[0]


CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/scratch"}


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ({"offload_optimizer": CPU}, []),
        ({"offload_optimizer": CPU, "offload_param": CPU}, []),
        ({"offload_optimizer": {"device": "none", "ratio": 1.0}, "zero_quantized_weights": False}, []),
        ({"offload_param": CPU}, ["offload_param` needs `offload_optimizer`"]),
        ({"offload_optimizer": CPU, "offload_param": NVME}, ["offload_param.device` is nvme; it can be none or cpu:"]),
        ({"offload_optimizer": {"device": "disk"}}, ["offload_optimizer.device` is disk; it can be none, cpu or nvme"]),
        ({"offload_optimizer": CPU | {"ratio": 0.5}}, ["offload_optimizer.ratio` is 0.5; leave it out"]),
        ({"offload_optimizer": CPU | {"super_offload": True}}, ["offload_optimizer.super_offload` is True"]),
        ({"offload_optimizer": NVME}, ["not built here", "python -m phi3v_dist.attempt.build_cache async_io"]),
        ({"offload_optimizer": {"device": "nvme"}}, ['nvme_path` is missing: write "auto"', "not built"]),
        ({"zero_quantized_weights": True}, ["zero_quantized_weights` is True; leave it out: it rounds"]),
        ({"zenflow": {}}, ["zenflow` is {}; leave it out: its updates come late"]),
        ({"mics_shard_size": 8}, ["mics_shard_size` is 8; leave it out: DeepSpeed 0.19 has no MiCS"]),
        ({"zero_hpz_partition_size": 3}, ["zero_hpz_partition_size` is 3, which does not divide 8 ranks"]),
        ({"zero_hpz_partition_size": 8}, ["is 8, but a node has 4 ranks"]),
        ({"zero_hpz_partition_size": "ten"}, ["is ten, which does not divide 8 ranks"]),
        ({"zero_hpz_partition_size": 2}, []),
        ({"zero_hpz_partition_size": "auto"}, []),
        ({"zero_hpz_partition_size": 2, "offload_optimizer": CPU, "offload_param": CPU}, ["leave one out"]),
    ],
)  # fmt: skip
def test_what_does_not_work_is_refused_with_the_reason(settings, monkeypatch, keys, messages):
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(zero_limits, "is_built", lambda name: False)
    found = problems(settings({"zero_optimization": {"stage": 3} | keys}), world_size=8)
    assert bool(found) == bool(messages), found
    assert all(message in "; ".join(found) for message in messages), found


def test_the_copies_of_weights_are_shared_by_a_nodes_ranks(settings, monkeypatch):
    config = settings({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}})

    def size(world_size, **given):
        return resolve(config, world_size, torch.float32, 64, **given)["zero_optimization"]["zero_hpz_partition_size"]

    assert (size(64, ranks_per_node=8), size(2)) == (8, 2)
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert size(8) == 4


@pytest.mark.parametrize(
    ("nodes", "sizes", "is_fine"),
    [
        ("aabb", [2] * 4, True),
        ("aaaabb", [1] * 6, True),
        ("aaaabbbb", [2] * 8, True),
        ("abab", [2] * 4, False),  # as srun --distribution=cyclic deals them out
        ("aabbcccc", [2, 2, 2, 2, 4, 4, 4, 4], False),  # what "auto" finds there
    ],
)
def test_ranks_that_share_a_copy_must_be_on_one_node(nodes, sizes, is_fine):
    message = zero_limits.scattered(list(zip(nodes, sizes, strict=True)))
    assert (message == "") == is_fine
    assert is_fine or "not always on one node (ranks by node: a: 2, b: 2" in message


def test_states_on_a_disk_need_a_folder(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(zero_limits, "is_built", lambda name: True)
    chosen = settings(next(path for path in SHIPPED if path.name == "zero3_nvme.json"))
    offload = resolve(chosen, 1, torch.float32, 64)["zero_optimization"]["offload_optimizer"]
    assert offload["nvme_path"] == str(tmp_path / "nvme")
    nowhere = chosen.model_copy(update={"parallel": chosen.parallel.model_copy(update={"nvme": None})})
    (problem,) = problems(nowhere, world_size=1)
    assert "nvme_path` is auto: set `parallel.nvme` to a folder on each node's own disk" in problem


def test_every_key_of_every_file_is_explained():
    page = SHIPPED[0].with_name("README.md").read_text()

    def keys(value):
        inner = [keys(each) for each in value.values() if isinstance(each, dict)]
        return set(value).union(*inner)

    for path in SHIPPED:
        assert f"`{path.name}`" in page or path.name == "zero3.json"
        known = keys(json.loads(path.read_text())) - {"zero_optimization", "bf16", "enabled", "offload_param", "device"}
        assert all(f"`{key}" in page or f".{key}`" in page for key in known), path


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_what_is_no_json_object_is_refused_with_the_files_name(settings, content):
    chosen = settings(content)
    found = problems(chosen, world_size=1)
    assert len(found) == 1
    assert str(chosen.parallel.deepspeed) in found[0]


@pytest.mark.fault(83, 84)
def test_a_missing_json_names_a_near_one_and_the_arithmetic_is_looked_at_all_the_same(settings):
    path = SHIPPED[0].with_name("zero4.json")
    found = problems(settings(path, rows_per_step=8, gradient_accumulation_steps=3), world_size=2)
    assert f"did you mean {SHIPPED[0]}?" in found[0]
    assert "3 x 2 ranks = 6 rows" in found[1]
    assert "(then 4 each)" in found[1] and "or set the latter to 6" in found[1]


@pytest.mark.fault(83)
@pytest.mark.parametrize(
    ("rows", "given", "world_size", "wrong"), [(8, 4, 2, 0), (8, 2, 2, 1), (8, 8, 1, 0), (4, 4, 8, 1)]
)
def test_accumulation_that_is_given_must_agree_with_rows_and_ranks(settings, rows, given, world_size, wrong):
    found = problems(settings(ZERO3, rows_per_step=rows, gradient_accumulation_steps=given), world_size)
    assert len(found) == wrong
