"""The planner beside the real DeepSpeed engine: two real processes, and many ranks that are not there."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment
from launching import free_port
from planner_cases import cases, predicted

ENGINE = Path(__file__).parent / "engine_ranks.py"
TOLERANCE = 0.03  # asked for; measured: see docs/planner.md
REAL, FAKE = 2, 16
SOME = ("slices, shared by two",)
OTHERS = tuple(name for name in cases(REAL) if name not in SOME)


def start(words: list[str]) -> None:
    done = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def measured(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Peak bytes of the last step by case, of the rank that held most."""
    (folder / "cases.json").write_text(json.dumps([cases(REAL)[name] for name in names]))
    launcher = ["torchrun", "--nproc_per_node", str(REAL), "--master_port", str(free_port())]
    start([*launcher, str(ENGINE), str(folder / "cases.json"), str(folder / "out")])
    ranks = [json.loads((folder / f"out-{rank}.json").read_text()) for rank in range(REAL)]
    return {name: max(peak(rank[number]) for rank in ranks) for number, name in enumerate(names)}


@pytest.fixture(scope="module")
def some(tmp_path_factory) -> dict[str, float]:
    return measured(tmp_path_factory.mktemp("some"), SOME)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, float]:
    return measured(tmp_path_factory.mktemp("others"), OTHERS)


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> dict[str, float]:
    """The same of rank 0 of a group that is not there."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "cases.json").write_text(json.dumps(list(cases(FAKE).values())))
    start([sys.executable, str(ENGINE), str(folder / "cases.json"), str(folder / "out"), "--fake", str(FAKE)])
    found = json.loads((folder / "out-0.json").read_text())
    return {name: peak(found[number]) for number, name in enumerate(cases(FAKE))}


def peak(steps: list[dict[str, float]]) -> float:
    return max(steps[-1][part] for part in ("forward", "backward", "step"))


def assert_near(name: str, found: dict[str, float]) -> None:
    planned = predicted(cases(REAL)[name]).total
    print(f"{name}: planned {planned:,}, measured {found[name]:,}, {planned / found[name] - 1:+.2%}")
    assert planned == pytest.approx(found[name], rel=TOLERANCE)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.supports("planner", on="2 ranks")
def test_the_planned_peak_is_that_of_two_real_processes(name: str, some: dict[str, float]) -> None:
    assert_near(name, some)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OTHERS)
def test_so_it_is_of_other_shapes_and_ways_to_train(name: str, others: dict[str, float]) -> None:
    assert_near(name, others)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", cases(FAKE))
def test_the_share_of_deepspeed_is_that_of_the_engine_at_other_numbers_of_ranks(
    name: str, fake: dict[str, float]
) -> None:
    planned = predicted(cases(FAKE)[name]).total
    print(f"{name}: planned {planned:,}, engine {fake[name]:,}, {planned / fake[name] - 1:+.2%}")
    assert planned == pytest.approx(fake[name], rel=TOLERANCE)
