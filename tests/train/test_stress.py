"""Two real ranks that are killed again and again and started again by a plain loop: how much of the time trains.

Only the command line and the run folder are used. The same kills are then given to the simulation, with the step time,
save cost and restart time that were measured, and it must come to the same goodput.
"""

import contextlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, environment
from launching import TIMEOUT_S, free_port

from phi3v_dist.observe.tracker import read_rows
from phi3v_dist.survive.goodput import Goodput, costs_of, measured, simulate

SEED = 20
NUM_RANKS = 2
EVERY_STEPS = 5
TRIAL_S = 20 * 60
IMPORT_LINE = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|", re.MULTILINE)  # microseconds of this module alone


@dataclass(frozen=True)
class Trial:
    """What the loop saw; moments are unix seconds. kills_s: when each attempt but the last lost its first rank."""

    launches_s: list[float]
    kills_s: list[float]
    import_s: float


def start(config: Path, folder: Path, attempt: int) -> list[subprocess.Popen]:
    """One process for each rank, as srun would; each writes down what its imports take."""
    port, processes = str(free_port()), []
    for rank in range(NUM_RANKS):
        ranks = {"RANK": rank, "WORLD_SIZE": NUM_RANKS, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": NUM_RANKS}
        extra = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with (folder / f"{attempt:03d}-{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "launch/train.py", "--config", str(config)], cwd=REPOSITORY, stdout=log,
                    stderr=subprocess.STDOUT, env=environment(PYTHONPROFILEIMPORTTIME="1", **extra),
                )
            )  # fmt: skip
    return processes


def import_s(folder: Path, attempt: int) -> float:
    """Seconds for which the rank that imported longest imported."""
    logs = (path.read_text(errors="replace") for path in folder.glob(f"{attempt:03d}-*.log"))
    return max(sum(map(int, IMPORT_LINE.findall(log))) for log in logs) / 1e6


def wait_for_a_step(run: Path, processes: list[subprocess.Popen], folder: Path, attempt: int) -> None:
    record = run / "metrics.jsonl"
    before = record.stat().st_size if record.exists() else 0
    deadline = time.monotonic() + TIMEOUT_S
    while not record.exists() or record.stat().st_size == before:
        said = (folder / f"{attempt:03d}-0.log").read_text(errors="replace")
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline, said[-3000:]
        time.sleep(0.05)


def kill(processes: Iterable[subprocess.Popen]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    for process in processes:
        process.wait()


def stress(config: Path, run: Path, folder: Path, lives_s: Iterator[float], rng: random.Random) -> Trial:
    """Start, kill, start again, until `lives_s` ends: how long an attempt trains before the next kill, in seconds."""
    folder.mkdir()
    trial = Trial([], [], 0.0)
    for attempt, life_s in enumerate(lives_s, start=1):
        processes = start(config, folder, attempt)
        try:
            trial.launches_s.append(time.time())
            wait_for_a_step(run, processes, folder, attempt)
            time.sleep(life_s)
            victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
            trial.kills_s.append(time.time())
            kill(victims)
        finally:
            kill(processes)  # what a launcher does when one of its ranks has died
        trial = replace(trial, import_s=trial.import_s + import_s(folder, attempt))
    return replace(trial, kills_s=trial.kills_s[:-1])  # the last one only ends the trial


def replay(trial: Trial, run: Path, total_s: float) -> Goodput:
    """The simulation, fed with what was measured."""
    steps = [row for row in read_rows(run) if "time/step_s" in row]
    first = {row["run/attempt"]: row["time"] - row["time/step_s"] for row in reversed(steps)}
    begins_s = [trial.launches_s[0], *trial.kills_s]
    restarts_s = [first_s - begin_s for begin_s, first_s in zip(begins_s, sorted(first.values()), strict=True)]
    costs = replace(costs_of(run), restart_s=sum(restarts_s) / len(restarts_s))
    print(f"fed with {costs}")
    failures_s = [moment_s - begins_s[0] for moment_s in trial.kills_s]
    return simulate(failures_s, costs, total_s, 0.0, EVERY_STEPS, restarts_s)


def prove(settings_tree: dict, folder: Path, lives_s: Iterator[float], tolerance: float) -> Goodput:
    print(f"seed {SEED}")
    tree = settings_tree
    tree["data"] |= {"validation": [], "row_length_tokens": 400}
    tree["train"] |= {"steps": 1_000_000, "rows_per_step": 2}
    tree["checkpoint"] = {"every_steps": EVERY_STEPS, "keep": 2}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    run = Path(tree["run"]["root"]) / tree["run"]["name"]
    trial = stress(config, run, folder / "logs", lives_s, random.Random(SEED))
    real = measured(run, trial.import_s)
    real = replace(real, wall_s=read_rows(run)[-1]["time"] - trial.launches_s[0])  # as the loop saw it
    simulated = replace(replay(trial, run, real.wall_s), import_s=real.import_s)
    print(f"measured  {real}\nsimulated {simulated}")
    print(
        f"{len(trial.kills_s)} kills in {real.wall_s:.0f} s: goodput {real.frac:.3f}, simulated {simulated.frac:.3f}; "
        f"without imports {real.frac_without_imports:.3f}, simulated {simulated.frac_without_imports:.3f}"
    )
    assert real.num_launches == len(trial.launches_s)
    assert simulated.frac == pytest.approx(real.frac, abs=tolerance)
    return real


@pytest.mark.slow
@pytest.mark.fault(8)
def test_the_simulation_comes_to_the_goodput_of_real_ranks_that_are_killed(settings_tree: dict, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    prove(settings_tree, tmp_path, (rng.uniform(1.0, 3.0) for _ in range(3)), tolerance=0.05)


@pytest.mark.slow
@pytest.mark.fault(8)
@pytest.mark.timeout(3000)
def test_a_run_killed_every_minute_for_20_minutes_trains_most_of_the_time(settings_tree: dict, tmp_path: Path) -> None:
    rng, end_s = random.Random(SEED), time.monotonic() + TRIAL_S

    def lives_s() -> Iterator[float]:
        while time.monotonic() < end_s:
            yield rng.uniform(30, 70)  # and some seconds to start

    real = prove(settings_tree, tmp_path, lives_s(), tolerance=0.04)
    assert real.num_lost_steps > 0 and real.frac_without_imports >= 0.7
