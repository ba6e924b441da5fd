"""What all metrics cost: the same steps of two ranks under ZeRO-3 with everything on and everything off, in turn.

What comes in: a folder. What goes out: `Figure`s. Surprise: the comparison is against itself too. Steps go on, off,
off, on, and the two kinds of "off" say how much of a difference is noise; and each "on" step waits for the thread that
gathers, which in training works beside the next steps, so that all of its work is counted.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from figures import Figure

RANKS_SIMULATED = 16_384
STEPS = 160  # a multiple of 4 x 10
WARM_UP = 8
WINDOW = 10  # of the steps that are observed, as `observe.log_every_steps` has it
KEYS = 60


def figures(folder: Path) -> list[Figure]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    write_model(folder / "model")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdout=subprocess.DEVNULL,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.wait() for rank in ranks] == [0, 0]
    seen = json.loads((folder / "seen.json").read_text())
    return [*overhead(seen), reduction(), logging_cost(folder)]


def overhead(seen: dict) -> list[Figure]:
    """By wall time, and by processor time of both ranks with all their threads. Fours of steps in which a window ends
    are apart: one in five, and dearer."""
    ends = np.array(seen["ends a window"])
    weights = ((~ends, 1 - 2 / WINDOW), (ends, 2 / WINDOW))
    found = []
    for clock, name in (("wall_s", "wall"), ("cpu_s", "processor")):
        on, first_off, second_off = (np.array(seen[clock][kind]) for kind in ("on", "first off", "second off"))
        off = (first_off + second_off) / 2  # of the same four steps
        base = median(off)
        more_s = sum(weight * median((on - off)[which]) for which, weight in weights)
        found.append(
            Figure(
                f"all metrics on against off, {name} time", f"{100 * more_s / base:+.2f} %", "≤ 0.5 %",
                f"step {1e3 * base:.0f} ms, {len(on)} fours of steps; off against off "
                f"{100 * median(second_off - first_off) / base:+.2f} %, goal within 1 %",
            )
        )  # fmt: skip
    for what, name in (("cpu_s", "in all threads, processor time"), ("wall_s", "on the training thread, wall time")):
        observing_s, all_s = np.sum(seen[f"observing {what}"], axis=0)
        share = f"{100 * observing_s / all_s:.2f} %"
        found.append(Figure(f"metrics {name}", share, "≤ 0.5 %", "timed call by call and added up, rank 0"))
    return found


def reduction() -> Figure:
    """What rank 0's thread does with the numbers of a large job."""
    from phi3v_dist.observe import columns
    from phi3v_dist.observe.stragglers import Stragglers

    table = np.random.default_rng(0).lognormal(0, 0.01, size=(RANKS_SIMULATED, len(columns.COLUMNS)))
    hosts = [f"node{rank // 8:04d}" for rank in range(RANKS_SIMULATED)]
    stragglers = Stragglers(hosts, hosts)
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        columns.reduce(table)
        stragglers.look((1, 10), columns.column(table, "health/data_s"), columns.column(table, "health/compute_s"), 1.0)
        seconds.append(time.perf_counter() - began)
    name = f"reduce, {RANKS_SIMULATED:,} ranks x {len(columns.COLUMNS)} columns"
    return Figure(name, f"{1e3 * median(seconds):.0f} ms", "≤ 50 ms", "median of 9, with the straggler scores")


def logging_cost(folder: Path) -> Figure:
    """A row of every sink that an offline run has by default, on the training thread."""
    from phi3v_dist.observe.registry import PLACEHOLDER, REGISTRY
    from phi3v_dist.observe.tracker import AllOf, JsonlTracker
    from phi3v_dist.observe.wandb_tracker import WandbTracker

    names = [metric.name for metric in REGISTRY if not PLACEHOLDER.search(metric.name) and metric.unit != "table"]
    tracker = AllOf(JsonlTracker(folder / "log", 1), [WandbTracker(folder / "log", "offline")])
    tracker.start({})
    seconds = []
    for step in range(60):
        row = {name: float(step) for name in names[1:KEYS]} | {"train/step": step}
        began = time.perf_counter()
        tracker.log(row)
        seconds.append(time.perf_counter() - began)
        time.sleep(0.01)
    tracker.finish({})
    return Figure(
        f"log {KEYS} keys", f"{1e3 * median(seconds):.2f} ms", "< 5 ms", "record and W&B offline, median of 60"
    )


def write_model(folder: Path) -> None:
    from phi3v_dist.model.tiny import write_tiny

    write_tiny(folder, ["A red coat costs 12."])


def run(folder: Path) -> dict:
    """One rank: steps in fours, of which the first and last are observed or not in turn."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
    import collective_ranks
    import numbers_ranks

    from phi3v_dist.config import PartsSettings, SourceSettings
    from phi3v_dist.data.shards import ShardTable
    from phi3v_dist.model.flops import flops
    from phi3v_dist.model.official_config import read_config
    from phi3v_dist.observe.collect import Collector
    from phi3v_dist.observe.gather import Nodes
    from phi3v_dist.observe.metrics import step_row
    from phi3v_dist.observe.tracker import AllOf, JsonlTracker, NoTracker
    from phi3v_dist.observe.wandb_tracker import WandbTracker
    from phi3v_dist.observe.window import Whole
    from phi3v_dist.parallel.topology import Topology
    from phi3v_dist.parallel.waits import WAITS
    from phi3v_dist.train.laps import Laps
    from phi3v_dist.train.step import train_step

    topology = Topology.from_environment()
    topology.start(120.0)
    torch.set_num_threads(1)
    WAITS.watch(topology)
    rows = collective_ranks.Mix([(collective_ranks.ONE, True)], topology.world_size)
    engine = numbers_ranks.build(folder / "model", topology, rows, "fp32")
    loader = rows.loader(topology.rank, topology.world_size, STEPS + WARM_UP)
    tracker = NoTracker()
    if topology.is_main:
        tracker = AllOf(JsonlTracker(folder, 1), [WandbTracker(folder, "offline")])
    tracker.start({})
    config = read_config(folder / "model")
    table = ShardTable(
        (SourceSettings(shards=["drawn"]),), ("drawn",), np.array([0, len(loader.lengths)]), np.array([0])
    )  # fmt: skip
    whole = Whole(flops(config, PartsSettings()), topology.world_size, 1e12, loader.lengths, table, [1], 1.0)
    seen: dict = {clock: {kind: [] for kind in ("on", "first off", "second off")} for clock in ("wall_s", "cpu_s")}
    seen |= {"observing wall_s": [], "observing cpu_s": [], "ends a window": []}
    num_observed = 0
    nodes = Nodes.meet(topology)
    collector = Collector(
        nodes, topology.device, tracker, folder, 1, WINDOW, loader.meter, lambda: 0, whole if topology.is_main else None
    )  # fmt: skip
    kinds = [("on", "first off", "second off", "on2"), ("first off", "on", "on2", "second off")]
    four: dict[str, tuple[float, float]] = {}
    with collector:
        for number, (plan, batches) in enumerate(loader):
            place = (number - WARM_UP) % 4
            kind = kinds[(number - WARM_UP) // 4 % 2][place] if number >= WARM_UP else "warm"
            laps = Laps(topology.device)
            topology.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            result = train_step(engine, plan, batches, collective_ranks.RATES, topology, laps=laps)
            if kind.startswith("on"):
                began, began_cpu = time.perf_counter(), time.process_time()
                num_observed += 1
                result = replace(result, step=num_observed)  # windows of observed steps
                collector.add(plan, result, laps.take())
                tracker.log(step_row(result, collective_ranks.PACKED_TOKENS, topology.world_size))
                observing_s = time.perf_counter() - began
                collector._windows.join()
                observing_cpu_s = time.process_time() - began_cpu
            mine = time.perf_counter() - wall, time.process_time() - cpu
            wall_s, cpu_s = topology.max([mine[0]])[0], topology.sum([mine[1]])[0]
            if kind == "warm":
                continue
            if kind.startswith("on"):
                seen["observing wall_s"].append((observing_s, mine[0]))
                seen["observing cpu_s"].append((observing_cpu_s, mine[1]))
            four[kind] = wall_s, cpu_s
            if place == 3:
                seen["ends a window"].append(num_observed % WINDOW == 0)
                for at, clock in enumerate(("wall_s", "cpu_s")):
                    seen[clock]["on"].append((four["on"][at] + four["on2"][at]) / 2)
                    for each in ("first off", "second off"):
                        seen[clock][each].append(four[each][at])
    tracker.finish({})
    topology.stop()
    return seen


if __name__ == "__main__":
    target = Path(sys.argv[1])
    found = run(target)
    if os.environ["RANK"] == "0":
        (target / "seen.json").write_text(json.dumps(found))
