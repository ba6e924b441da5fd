"""Ranks that share a row: losses and every gradient are those of one process that has the row whole.

collective_ranks.py trains, under real ZeRO-3, every layer recomputed and feed-forward parts in slices: packed rows of
up to 1,450 tokens with pictures, one document beyond the model's original length (400) beside short ones, documents,
pictures and label runs that begin in one slice and end in another, one sample that a single rank cannot decode.
"""

import json

import pytest
import torch
from conftest import REPOSITORY
from test_equal_collectives import run

from phi3v_dist.config import Settings
from phi3v_dist.errors import ConfigError
from phi3v_dist.model import build
from phi3v_dist.parallel import zero
from phi3v_dist.parallel.ulysses import SequenceGroup

SAME_LOSS = 1e-6
SAME_GRADIENT = 1e-5  # |difference| / max(own norm, 1e-6 x global norm); measured: 3e-6
# Ranks, mix (packed1: no accumulation), how parts are trained, steps, ranks that share a row. Two steps or more: the
# first can hide a mismatch of collectives.
TRIALS = [
    "2:packed:trained:2:2", "2:packed1:lora:2:2", "2:packed1:frozen:2:2", "4:packed:trained:2:2",
    "4:packed1:trained:2:4",
]  # fmt: skip
MORE = [
    "2:packed:lora:3:2", "2:packed:frozen:3:2", "2:every:trained:4:2", "4:one:trained:4:2", "4:packed:lora:3:2",
    "4:packed:trained:3:4", "4:packed:lora:3:4", "4:packed:frozen:3:4", "4:every:frozen:4:4",
]  # fmt: skip
WRONG = ["2:packed1:trained:1:2:local_factors", "2:texts:trained:1:2:late_shift", "2:packed1:trained:1:2:one_block"]


@pytest.fixture(scope="module")
def notes(tmp_path_factory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("sequence"), [*TRIALS, *WRONG], timeout_s=400)


def assert_as_one_process(found: dict) -> None:
    assert max(found["off"]) <= SAME_LOSS
    assert not {name: off for name, off in found["differences"].items() if not off <= SAME_GRADIENT}
    assert set(found["orders"]) == {1} and all(len(set(by_rank)) == 1 for by_rank in found["calls"])
    assert min(found["exchanges"]) > 0


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.supports("sequence 2", "lora", "frozen", "full", "gradient_checkpointing", on="2 ranks")
@pytest.mark.supports("sequence 2", "sequence 4", "full", on="more ranks")
def test_losses_and_gradients_are_those_of_one_process_and_collectives_in_one_order(notes, trial):
    assert_as_one_process(notes[trial])
    assert any("lora" in name for name in notes[trial]["differences"]) == ("lora" in trial)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.supports("sequence 2", "sequence 4", "lora", "frozen", on="more ranks")
def test_so_they_are_in_every_combination(tmp_path):
    for trial, found in run(tmp_path, MORE, timeout_s=1400).items():
        print(trial, max(found["off"]), max(found["differences"].values()))
        assert_as_one_process(found)


@pytest.mark.parametrize("trial", [trial for trial in TRIALS if "packed" in trial])
def test_some_row_has_a_document_beyond_the_original_length_beside_short_ones(notes, trial):
    assert any(len(lengths) > 2 and max(lengths) > 400 > min(lengths) for lengths in notes[trial]["documents"])


def test_a_sample_that_one_rank_cannot_decode_is_left_out_by_all_that_share_its_row(notes):
    assert sum(notes["2:packed:trained:2:2"]["quarantined"]) >= 1
    assert sum(notes["4:packed:trained:2:2"]["quarantined"]) >= 1


@pytest.mark.parametrize("trial", WRONG)
def test_the_comparison_sees_the_mistakes_that_train_without_a_message(notes, trial):
    found = notes[trial]
    assert max(found["off"]) > 100 * SAME_LOSS and max(found["differences"].values()) > 100 * SAME_GRADIENT


def settings_of(model, sequence: int, **train) -> Settings:
    return Settings.model_validate(
        {"model": {"path": model}, "data": {"train": [{"shards": "none"}]}, "train": {"steps": 1, **train},
         "parallel": {"sequence": sequence, "deepspeed": REPOSITORY / "ds_configs" / "zero3.json"}}
    )  # fmt: skip


@pytest.mark.parametrize(("sequence", "world_size"), [(3, 4), (2, 3), (2, 1), (8, 12)])
def test_ranks_that_cannot_be_divided_are_named_with_what_to_change(tiny_model, sequence, world_size):
    (found,) = zero.problems(settings_of(tiny_model, sequence), world_size)
    assert f"`parallel.sequence` is {sequence}, but {world_size} ranks cannot be divided" in found
    assert f"or use {-(-world_size // sequence) * sequence} ranks" in found


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sequence", "possible"),
    [(32, 32, 3, "1, 2, 4, 8, 16, 32"), (12, 4, 3, "1, 2, 4, 12"), (4, 2, 4, None), (6, 2, 3, "1, 2, 6")],
)
def test_heads_that_cannot_be_divided_are_named(tmp_path, tiny_model, heads, kv_heads, sequence, possible):
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = settings_of(tmp_path, sequence)
    if possible is None:
        build.require_heads_divide(settings)
        return
    with pytest.raises(ConfigError, match=f"`parallel.sequence` is {sequence}, .* take one of {possible}$"):
        build.require_heads_divide(settings)


def test_accumulation_counts_groups_of_ranks(tiny_model):
    settings = settings_of(tiny_model, 2, rows_per_step=8, gradient_accumulation_steps=4)
    assert zero.problems(settings, 4) == []
    assert zero.resolve(settings, 4, torch.float32, 64)["gradient_accumulation_steps"] == 4
    (found,) = zero.problems(settings, 8)
    assert "4 x 4 groups of ranks = 16 rows, but `train.rows_per_step` is 8" in found


@pytest.mark.parametrize("total", [0, 1, 3, 8, 13])
def test_shares_are_everything_once_and_nearly_equal(total):
    shares = [SequenceGroup(4, rank).share(total) for rank in range(4)]
    assert [n for share in shares for n in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
