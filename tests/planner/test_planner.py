"""What the planner says: of the real size, of loops and layers it did not trace, to people and to programs."""

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from planner_cases import model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from phi3v_dist import config as settings_file
from phi3v_dist.config import ModelSettings, PartsSettings, TrainSettings
from phi3v_dist.data.plan import PlannedRow
from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.model.flops import PATCH_PIXELS, PATCHES, attention_pair, flops
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.vision import clip_config
from phi3v_dist.planner import at_start, door, options, record, row, unroll
from phi3v_dist.planner.row import RowShape, full_row, timeline

NONE = Path("none")
TRAIN = TrainSettings(steps=1)
GIB = 2**30


@pytest.mark.parametrize("checkpointed", [True, False])
def test_layers_and_loops_that_were_not_traced_are_exact(checkpointed: bool, monkeypatch) -> None:
    config = model(64, 4, vocab=512, clip_layers=5)
    shape = full_row(2500, 10, per_image=2)
    settings = ModelSettings(path=NONE, gradient_checkpointing=checkpointed, vision_chunk_crops=2)
    unrolled = timeline(config, settings, TRAIN, shape, torch.float32)
    monkeypatch.setattr(unroll, "TRACED", 99)
    whole = timeline(config, settings, TRAIN, shape, torch.float32)
    assert unrolled.keys == whole.keys
    assert np.array_equal(unrolled.live, whole.live) and np.array_equal(unrolled.most, whole.most)


# PLANNER.md §7: GiB of activations at 131,072 tokens, by ranks that share the row. Its row A builds all logits, which
# this model never does.
TABLE = {
    "B": ({"mlp_chunk_tokens": None}, {1: 48.1, 2: 23.3, 4: 11.6, 8: 5.8}),
    "C": ({}, {1: 42.1, 2: 20.3, 4: 10.1, 8: 5.1}),
    "D": ({"offload_activations": True}, {1: 18.8, 2: 8.7, 4: 4.3, 8: 2.2}),
}
QUICK = {("C", 8)}
CELLS = [
    pytest.param(name, ranks, marks=() if (name, ranks) in QUICK else pytest.mark.slow)
    for name, (_, sizes) in TABLE.items()
    for ranks in sizes
]


@pytest.mark.parametrize(("name", "ranks"), CELLS)
def test_the_real_model_takes_what_the_design_says(name: str, ranks: int, assets_folder: Path) -> None:
    config = read_config(assets_folder / "phi3_vision")
    words, sizes = TABLE[name]
    found = timeline(
        config, ModelSettings(path=NONE, **words), TRAIN, full_row(131072, 0), torch.bfloat16, ranks
    ).peak / GIB  # fmt: skip
    print(f"{name} {ranks}: {found:.2f} GiB, PLANNER.md {sizes[ranks]}")
    assert found == pytest.approx(sizes[ranks], rel=0.15)


def test_the_operations_of_the_trace_are_those_of_the_formulas() -> None:
    config = model(128, 2)
    shape = RowShape((700, 300), 600, ((336, 336),), 1)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made = row.build(config, ModelSettings(path=NONE, gradient_checkpointing=False), TRAIN, torch.float32, mode)
    arguments = row.faked(row.inputs_of(shape), mode)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward_count(query, key, value, *_, out_shape=None, **__):
        return sdpa_flop_count(query, key, value)

    def backward_count(gradient, query, key, value, *_, out_shape=None, **__):
        return sdpa_backward_flop_count(gradient, query, key, value)

    def in_place_count(_, first, second, *, out_shape=None, **__):  # the head's: torch counts `addmm`, not `addmm_`
        return 2 * first[0] * first[1] * second[1]

    counts = {flash: forward_count, back: backward_count, torch.ops.aten.addmm_: in_place_count}
    counter = FlopCounterMode(display=False, custom_mapping=counts)
    with mode, counter:
        losses = made(**arguments, pixel_values=row.crops_of(shape)).token_losses
        losses.sum().backward()
    planned = PlannedRow((0,), 1000, 700**2 + 300**2, len(losses), shape.crops)
    work = flops(config, PartsSettings())
    # The counter takes whole squares and seven products of them (forward 2, backward 5); ours are causal, and six.
    text = 3 * attention_pair(config) * planned.squared_tokens
    clip = clip_config(config)
    tower = 4 * clip.hidden_size * (PATCHES + 1) ** 2 * (clip.num_hidden_layers - 1) * shape.crops
    pixels = 2 * 3 * PATCH_PIXELS * clip.hidden_size * PATCHES * shape.crops  # have no gradient; the formula counts one
    expected = work.of_row(planned) + text * (7 / 3 - 1) + tower * (7 / 2 - 3) - pixels
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with config.json alone, and a config that names shards which are not there."""
    (tmp_path / "config.json").write_text(json.dumps(model(128, 4) | {"model_type": "phi3_v"}))
    tree = {
        "model": {"path": str(tmp_path)},
        "data": {"train": [{"shards": str(tmp_path / "none.tar")}], "row_length_tokens": 2048},
        "train": {"steps": 5, "rows_per_step": 16},
        "parallel": {"deepspeed": str(REPOSITORY / "ds_configs/zero3.json")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def ask(folder: Path, *words: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=str(folder / "run.yaml"))
    options.add_options(parser)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(words)

    def no_data(_):
        raise DataError("no shards")

    assert options.is_asked(arguments)
    door.answer(arguments, no_data)


def test_a_config_json_alone_is_enough_and_programs_get_one_object(folder: Path, capsys) -> None:
    ask(folder, "--nodes", "2", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["memory"]["total"] == sum(found["memory"]["causes"].values())
    assert found["cluster"]["nodes"] * found["cluster"]["gpus_per_node"] == 16
    assert found["cost"]["flops_full"] > found["cost"]["flops_causal"]


def test_people_are_told_every_figure_and_what_it_rests_on(folder: Path, capsys) -> None:
    ask(folder, "--nodes", "1", "--efficiency", "0.3")
    text = capsys.readouterr().out
    for word in ("in all: fits", "PFLOP a step", "IF 30%", "tokens/s", "network", "best every", "CUDA context"):
        assert word in text


@pytest.mark.slow
def test_what_does_not_fit_comes_with_changes_that_make_it_fit(folder: Path, capsys, monkeypatch) -> None:
    from phi3v_dist.planner import gpus

    small = replace(gpus.GPUS["h100-80"], name="small", memory_bytes=int(4.5 * GIB))
    monkeypatch.setitem(gpus.GPUS, "small", small)
    words = ("--nodes", "1", "--gpu", "small", "data.row_length_tokens=131072", "model.gradient_checkpointing=false")
    ask(folder, *words, "--json")
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["changes"][0] == "model.gradient_checkpointing=true"
    ask(folder, *words, "--recommend", str(folder / "out.yaml"))
    assert "fits" in capsys.readouterr().out
    ask(folder, "--nodes", "1", "--gpu", "small", "--config", str(folder / "out.yaml"), "--json")
    assert json.loads(capsys.readouterr().out)["fits"]
    chosen = settings_file.load(folder / "out.yaml")
    assert chosen.parallel.deepspeed.is_file() and chosen.data.row_length_tokens == 131072, "the word is in it, too"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "--nodes is 0"),
        (["--nodes", "1", "--gpu", "h100-8"], "did you mean h100-80"),
        (["--nodes", "1", "--efficiency", "2"], "--efficiency is 2"),
        (["--json"], "only with --nodes"),
        (["--nodes", "1", "parallel.sequence=3"], "parallel.sequence"),
        (["--nodes", "1", "--gpus-per-node", "2", "parallel.sequence=4"], "parallel.sequence"),
    ],
)
def test_wrong_words_are_refused(folder: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ask(folder, *words)


def test_a_row_longer_than_the_context_is_refused(folder: Path) -> None:
    short = model(128, 4) | {"model_type": "phi3_v", "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(short))
    with pytest.raises(ConfigError, match="context ends at 1,024"):
        ask(folder, "--nodes", "1")


def test_on_a_gpu_that_is_known_the_plan_of_a_run_has_the_time_of_a_step_too(folder: Path, monkeypatch) -> None:
    settings = settings_file.load(folder / "run.yaml", [f"run.root={folder}", "run.name=timed", "model.dtype=bf16"])
    settings.run.folder.mkdir()
    rows = [PlannedRow((0, 1), tokens=1500, squared_tokens=1500**2, label_tokens=900, crops=4)]
    of_torch = {"get_device_name": "NVIDIA H100 80GB HBM3", "device_count": 2, "mem_get_info": (1 << 36, 1 << 36)}
    for name, answer in of_torch.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, answer=answer: answer)
    at_start.write_plan(settings, 4, torch.device("cuda"), rows)
    cost = record.read_plan(settings.run.folder)["cost"]
    assert cost["tokens_per_s"] == pytest.approx(settings.train.rows_per_step * 1500 / cost["step_s"])


def test_a_run_keeps_its_plan_and_makes_one_that_is_damaged_again(folder: Path, caplog) -> None:
    settings = settings_file.load(folder / "run.yaml", [f"run.root={folder}", "run.name=own"])
    settings.run.folder.mkdir()
    rows = [PlannedRow((0, 1), tokens=1500, squared_tokens=1500**2, label_tokens=900, crops=4)]
    path = settings.run.folder / record.PLAN_NAME
    with caplog.at_level(logging.INFO):
        at_start.write_plan(settings, 2, torch.device("cpu"), rows)
    assert "GiB a rank at the worst moment" in caplog.text
    first = path.read_text()
    plan = record.read_plan(settings.run.folder)
    assert plan["traced_bytes"] == plan["peak_bytes"] == sum(plan["causes"].values()) and plan["row_tokens"] == 1500
    at_start.write_plan(settings, 2, torch.device("cpu"), rows)
    assert path.read_text() == first, "the same run says the same, without tracing again"
    path.write_text(first[:40])
    assert record.read_plan(settings.run.folder) == {}
    at_start.write_plan(settings, 2, torch.device("cpu"), rows)
    at_start.write_plan(settings, 4, torch.device("cpu"), rows)
    assert record.read_plan(settings.run.folder)["peak_bytes"] < plan["peak_bytes"], "more ranks, smaller shares"
