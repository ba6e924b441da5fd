"""Kills and other world sizes, with ranks that are simulated and with real ones: nothing lost, nothing twice."""

import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
import yaml
from conftest import REPOSITORY, environment
from launching import TIMEOUT_S, free_port
from simulated_run import open_data, planner_of

from phi3v_dist.config import of_run
from phi3v_dist.data import identity
from phi3v_dist.data.audit import audit
from phi3v_dist.data.ledger import Head, LedgerReader
from phi3v_dist.errors import DataError
from phi3v_dist.run import Data, count_steps, plan
from phi3v_dist.survive.manifest import read_manifest
from phi3v_dist.survive.retention import committed

WEIGHTS = (3.0, 1.0, 2.0)  # three sources, none of whose epochs are the run's
WORLD_SIZES = (8, 6, 16, 1)
WORDS = ("hello", "red", "green", "square", "white", "what", "price")


def write_texts(folder: Path, num_samples: int) -> list[dict]:
    """Three sources of 5, 3 and 2 tenths of the samples, in shards of unequal size."""
    rng = random.Random(num_samples)
    sources = []
    for name, tenths, weight in zip("abc", (5, 3, 2), WEIGHTS, strict=True):
        numbers = list(range(num_samples * tenths // 10))
        borders = [0, len(numbers) // 3, len(numbers) // 2, len(numbers)]
        for shard in range(3):
            with webdataset.TarWriter(str(folder / f"{name}-{shard}.tar"), mtime=0) as tar:
                for number in numbers[borders[shard] : borders[shard + 1]]:
                    answer = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
                    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]
                    tar.write({"__key__": f"{number:05d}", "json": json.dumps({"messages": turns}).encode()})
        sources.append({"name": name, "shards": [str(folder / f"{name}-*.tar")], "weight": weight})
    return sources


def simulate(folder: Path, num_samples: int, rows_per_step: int, num_kills: int) -> None:
    """Kills at random times, a part of them in the middle of a record; then the run comes to its end and is audited."""
    seed = 11
    rng = random.Random(seed)
    (folder / "run").mkdir(parents=True)
    (folder / "sources.json").write_text(json.dumps(write_texts(folder, num_samples)))
    lengths = np.random.default_rng(seed)
    tokens = np.clip(lengths.lognormal(5.5, 0.9, num_samples), 8, 3000).astype(np.int32)
    tokens[lengths.random(num_samples) < 0.005] = 0  # unusable
    np.savez(
        folder / "lengths.npz", tokens=tokens, label_tokens=tokens // 2, crops=np.zeros_like(tokens), full_tokens=tokens
    )  # fmt: skip
    table, opened = open_data(folder)
    unbroken = [row for step in planner_of(table, opened, rows_per_step) for row in step.rows]
    num_steps = len(unbroken) // rows_per_step
    slices = np.linspace(0, num_steps, num_kills + 2).astype(int)  # far enough apart for each to leave something
    deaths = [rng.randint((begin + end) // 2, end - 1) for begin, end in zip(slices[:-2], slices[1:-1], strict=True)]
    script = Path(__file__).with_name("simulated_run.py")
    saved_path, largest_state = folder / "run" / "checkpoint.json", 0
    for number, at_step in enumerate([*deaths, None]):
        world_size = WORLD_SIZES[number * len(WORLD_SIZES) // (num_kills + 1)]
        tears = number % 3 == 2 and at_step
        words = [sys.executable, str(script), str(folder), str(world_size), str(rows_per_step)]
        process = subprocess.Popen(
            [*words, str(at_step)] if tears else words, env=environment(), stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        for line in process.stdout:
            if at_step and not tears and line.strip() != "end" and int(line) >= at_step:
                time.sleep(rng.random() * 0.02)
                process.kill()
                break
        assert process.wait(TIMEOUT_S) == (-9 if at_step else 0)
        largest_state = max(largest_state, len(json.dumps(json.loads(saved_path.read_text())["data"])))
    reader = LedgerReader(folder / "run" / "ledger.bin")
    saved = json.loads(saved_path.read_text())
    print(f"killed at steps {deaths} of {num_steps}, largest state {largest_state} bytes")
    head = Head(*saved["data"]["ledger"])
    found = audit(reader, table, opened, planner_of(table, opened, rows_per_step), head)
    assert found.problems == () and found.torn_bytes == 0
    assert sum(source.lost + source.repeated + source.in_flight for source in found.sources) == 0
    trained = [row for record, _ in reader for row in record.rows]
    assert trained == [row.sample_ids for row in unbroken]
    assert found.chain == saved["data"]["chain"] == identity.chain_rows(identity.NO_ROWS_YET, trained)
    assert sum(saved["learned"]) == sum(row.tokens for row in unbroken)
    assert {attempt.world_size for attempt in found.attempts} == set(WORLD_SIZES)
    drawn = Counter(i for row in trained for i in row)
    for number, source in enumerate(found.sources):
        ids = np.flatnonzero(np.repeat(table.source_of_shard, np.diff(table.start)) == number)
        times = {drawn[int(i)] for i in ids if 0 < tokens[i] <= 2048}
        assert max(times) - min(times) <= 1 and min(times) == source.epochs


@pytest.mark.fault(63)
def test_kills_and_other_world_sizes_lose_and_repeat_nothing(tmp_path: Path) -> None:
    simulate(tmp_path, num_samples=1500, rows_per_step=8, num_kills=3)


@pytest.mark.slow
@pytest.mark.fault(63)
def test_twenty_kills_on_8_6_16_and_1_ranks_lose_and_repeat_nothing(tmp_path: Path) -> None:
    simulate(tmp_path, num_samples=10_000, rows_per_step=24, num_kills=20)


def kill(process: subprocess.Popen) -> None:
    """The launcher and all ranks, which have sessions of their own, at one moment."""
    for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def last_step(run: Path) -> int:
    """Steps in the ledger, as far as a look from outside tells."""
    try:
        return sum(1 for _ in LedgerReader(run / "ledger.bin"))
    except DataError:
        return 0  # not begun


def ranks(num_ranks: int, config: Path) -> list[str]:
    if num_ranks == 1:
        return [sys.executable, "launch/train.py", "--config", str(config)]
    port = str(free_port())
    launcher = ["torchrun", "--nproc_per_node", str(num_ranks), "--master_port", port]
    return [*launcher, "launch/train.py", "--config", str(config)]


def train(settings_tree: dict, folder: Path, num_samples: int, row_length_tokens: int, num_kills: int) -> Path:
    """Real processes on 2, 3, then 1 ranks, killed at random times, and then to the end; returns the run folder."""
    rng = random.Random(7)
    tree = settings_tree
    tree["data"] |= {"train": write_texts(folder, num_samples), "validation": []}
    tree["data"] |= {"row_length_tokens": row_length_tokens, "window_samples": 256}
    tree["train"] |= {"steps": None, "epochs": 3, "rows_per_step": 6}
    tree["checkpoint"] = {"every_steps": 2, "keep": 2}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    run = Path(tree["run"]["root"]) / tree["run"]["name"]
    for number in range(num_kills + 1):
        num_ranks = (2, 3, 1)[number * 3 // (num_kills + 1)]
        log = (folder / f"attempt-{number}.log").open("w")
        process = subprocess.Popen(
            ranks(num_ranks, config), cwd=REPOSITORY, env=environment(), stdout=log, stderr=subprocess.STDOUT
        )  # fmt: skip
        if number == num_kills:
            assert process.wait(3000) == 0, Path(log.name).read_text()[-3000:]
            break
        stop_at = last_step(run) + rng.randint(3, 6)
        while process.poll() is None and last_step(run) < stop_at:
            time.sleep(0.1)
        time.sleep(rng.random() * 0.5)
        assert process.poll() is None, Path(log.name).read_text()[-3000:]
        kill(process)
    return run


def prove(run: Path, num_ranks: set[int]) -> None:
    """What `audit` says, and that the rows are those of a run that nobody killed."""
    done = subprocess.run(
        [sys.executable, "launch/prepare.py", "audit", str(run)], cwd=REPOSITORY, env=environment(COLUMNS="160"),
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert "0 lost, 0 repeated" in done.stdout and "in flight:" not in done.stdout
    settings = of_run(run)
    data = Data.open(settings.data.train, settings)
    planner = plan(settings, data)
    records = [record for record, _ in LedgerReader(run / "ledger.bin")]
    assert [record.rows for record in records] == [tuple(row.sample_ids for row in step.rows) for step in planner]
    assert len(records) == count_steps(settings, planner) and {record.world_size for record in records} == num_ranks
    assert not any(record.not_trained for record in records)
    for folder in committed(run / "checkpoints"):
        state = read_manifest(folder)["position"]["loader"]
        assert len(json.dumps(state)) <= 64 * 1024


@pytest.mark.slow
@pytest.mark.fault(63)
def test_real_ranks_that_are_killed_lose_and_repeat_nothing(settings_tree: dict, tmp_path: Path) -> None:
    run = train(settings_tree, tmp_path, num_samples=300, row_length_tokens=160, num_kills=2)
    prove(run, {2, 3, 1})


@pytest.mark.slow
@pytest.mark.fault(63)
@pytest.mark.timeout(3600)
def test_ten_thousand_samples_and_twenty_kills_of_2_3_and_1_real_ranks(settings_tree: dict, tmp_path: Path) -> None:
    run = train(settings_tree, tmp_path, num_samples=10_000, row_length_tokens=1024, num_kills=20)
    prove(run, {2, 3, 1})
