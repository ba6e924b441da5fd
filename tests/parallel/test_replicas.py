"""A flipped bit in one rank's memory is found and its rank named; real ZeRO-3 ranks train in numbers_ranks.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

from phi3v_dist.parallel.replicas import _minority

RANKS = Path(__file__).parents[1] / "train" / "numbers_ranks.py"
BUFFER = "model.vision_embed_tokens.img_processor.vision_model.embeddings.position_ids"


def run(folder: Path, trial: str) -> list[dict]:
    command = [sys.executable, str(RANKS), str(folder), trial]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]  # a false alarm in the clean steps would have ended it
    return json.loads((folder / f"{trial}.json").read_text())


def assert_found(ranks: list[dict], world_size: int) -> None:
    found = ranks[0]["found"]
    assert all(notes["found"] == found for notes in ranks), "ranks decide differently"
    last = world_size - 1
    assert "rank 1 on " in found["gathered"] and "its copy of model.norm.weight is another one" in found["gathered"]
    assert f"rank {last} on " in found["master"] and "computing copy differ in lm_head.weight" in found["master"]
    assert "rank 0 on " in found["computing"] and "computing copy differ in lm_head.weight" in found["computing"]
    for what, name in (("buffer", BUFFER), ("learning rate", "`param_groups` of the engine")):
        assert name in found[what]
        wanted = "rank 1 on " if world_size > 2 else "no majority says who is right"
        assert wanted in found[what] and ("rank 0 on" in found[what]) == (world_size == 2)
    for what in ("gathered", "master", "computing", "buffer", "learning rate"):
        assert "Start again from the last checkpoint, without the node that is named" in found[what]
        assert found[what].startswith("silent corruption: 2 problems")
    assert found["nothing"] == "", "with every bit back in its place there is nothing to find"


@pytest.mark.fault(29)
def test_a_flipped_bit_is_found_and_its_rank_named_and_clean_steps_raise_no_alarm(tmp_path):
    assert_found(run(tmp_path, "2:flips:fp32"), world_size=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(29)
def test_of_three_ranks_in_bf16_the_majority_is_right_and_twenty_clean_steps_raise_no_alarm(tmp_path):
    assert_found(run(tmp_path, "3:flips:bf16"), world_size=3)


@pytest.mark.parametrize(
    ("seen", "wrong"), [("aab", [2]), ("ab", []), ("abab", []), ("abc", []), ("abaa", [1]), ("aaaaa", []), ("a", [])]
)
def test_a_minority_is_what_differs_from_more_than_half(seen, wrong):
    assert _minority(list(seen)) == wrong
