"""What a cluster adds to a synthetic run: window rows of every registered metric, ranks' files, a plan, bad samples.

    python tests/observe/synthetic_cluster.py /tmp/rich_run && python launch/report.py /tmp/rich_run

Surprise: rank 5 is slow in its loader from step 200 on, and in computing from step 400 on; a report that does not name
it is wrong.
"""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from synthetic_run import RESUMED_AT, STEPS, write_run

from phi3v_dist.observe.metrics import PLACEHOLDER, REGISTRY

EVERY, SLOW_RANK, SLOW_DATA_FROM, SLOW_COMPUTE_FROM = 10, 5, 200, 400
BEGAN_S, LATER_S = 1764000000.0, 60.0  # as in synthetic_run
SOURCES = {"catalogue": 0.55, "web_pages": 0.3, "invoices": 0.15}
HOSTILE = "<script>alert('a token')</script>"
TYPICAL = {
    "perf/mfu": 0.41, "perf/mfu_causal": 0.33, "perf/tflops_text": 120.0, "perf/tflops_attn": 60.0,
    "perf/tflops_vision": 35.0, "perf/attn_flops_frac": 0.28, "health/slowest_rank": SLOW_RANK,
    "health/slow_ranks": 1.0,
    "health/straggler_score_min": 0.7, "health/straggler_ratio": 1.4, "data/stall_pct": 3.0, "ckpt/gib": 4.2,
    "ckpt/gib_per_s": 1.1, "goodput/productive_pct": 88.0, "goodput/restarts": 1.0, "seq/len_p50": 700.0,
    "seq/len_p99": 1900.0, "seq/len_max": 2040.0,
}  # fmt: skip
BY_UNIT = {"s": 0.4, "GiB": 61.0, "frac": 0.3, "pct": 70.0, "°C": 66.0, "W": 520.0, "tokens": 900.0, "TFLOP/s": 600.0}
BY_STATISTIC = {"min": 0.8, "p50": 1.0, "mean": 1.02, "p99": 1.25, "max": 1.4, "sum": 4.0}


def write_rich_run(folder: Path, num_samples: int = 60, num_ranks: int = 16, num_nodes: int = 4) -> Path:
    """A run of four nodes with everything in its folder that the report can show."""
    write_run(folder, num_samples)
    write_windows(folder, num_nodes)
    write_ranks(folder, num_ranks, num_nodes, range(EVERY, STEPS + 1, EVERY))
    write_lists(folder)
    return folder


def write_windows(folder: Path, num_nodes: int) -> None:
    """A row every ten steps with every registered metric of the window, in the record's order of time."""
    with (folder / "metrics.jsonl").open() as file:
        lines = [line for line in file if line.endswith("\n")]
    whole = []
    for line in lines:
        whole.append(line)
        row = json.loads(line)
        if row["train/step"] % EVERY == 0 and "train/loss" in row:
            head = {name: row[name] for name in ("time", "run/attempt", "train/step")}
            window = _window(int(row["train/step"]), num_nodes)
            whole.append(
                json.dumps({**head, **{name: value for name, value in window.items() if name not in row}}) + "\n"
            )
    (folder / "metrics.jsonl").write_text("".join(whole))


def _window(step: int, num_nodes: int) -> dict[str, float]:
    chance = random.Random(step)
    values = {}
    for metric in REGISTRY:
        if metric.cadence == "window" and not PLACEHOLDER.search(metric.name):
            typical = TYPICAL.get(metric.name, BY_UNIT.get(metric.unit, 1.0)) * BY_STATISTIC.get(metric.reduction, 1.0)
            values[metric.name] = typical * (1 + 0.06 * chance.random())
    for place, part in enumerate(("data", "fwd", "bwd", "opt", "ckpt", "log")):
        values[f"time/{part}_s/mean"] = (0.04, 0.24, 0.41, 0.08, 0.02, 0.004)[place] * (1 + 0.1 * chance.random())
    for place, part in enumerate(("init", "restore", "data", "ckpt", "eval", "replay", "down", "other")):
        values[f"goodput/lost_{part}_s"] = (12, 4, 0.03 * step, 0.01 * step, 0.02 * step, 30, 24, 0.01 * step)[place]
    values |= {f"node/gpu_{node:02d}/own_s": 0.7 + 0.05 * node * chance.random() for node in range(num_nodes)}
    drift = 0.05 * math.sin(step / 90)
    values |= {
        f"data/mix/{name}": share + (drift if name == "web_pages" else -drift / 2) for name, share in SOURCES.items()
    }
    values |= {f"data/mix_drift/{name}": 0.02 * chance.gauss(0, 1) / math.sqrt(step) for name in SOURCES}
    return {**values, "ckpt/age_steps": step % 100, "health/slowest_rank": SLOW_RANK}


def write_ranks(folder: Path, num_ranks: int, num_nodes: int, steps: range) -> None:
    """One file a node, one line a window, as observe/collect.py writes them."""
    (folder / "ranks").mkdir()
    each = num_ranks // num_nodes
    for node in range(num_nodes):
        host, ranks = f"gpu-{node:02d}", list(range(node * each, (node + 1) * each))
        with (folder / "ranks" / f"{host}.jsonl").open("w") as file:
            for step in steps:
                file.write(json.dumps(rank_window(step, host, ranks), separators=(",", ":")) + "\n")


def rank_window(step: int, host: str, ranks: list[int]) -> dict[str, Any]:
    attempt = 1 if step < RESUMED_AT else 2
    own = []
    for rank in ranks:
        chance = random.Random(1000 * step + rank)
        data_s, compute_s = 0.03 + 0.006 * chance.random(), 0.62 + 0.02 * chance.random()
        if rank == SLOW_RANK and SLOW_DATA_FROM <= step < SLOW_COMPUTE_FROM:
            data_s += 0.3
        if rank == SLOW_RANK and step >= SLOW_COMPUTE_FROM:
            compute_s *= 1.5
        own.append((data_s, compute_s))
    slowest_s = 0.96 if step >= SLOW_DATA_FROM else 0.68
    end_s = BEGAN_S + 0.85 * step + LATER_S * (attempt - 1)
    values = {
        "health/data_s": [data_s for data_s, _ in own],
        "health/compute_s": [compute_s for _, compute_s in own],
        "comm/wait_s": [max(0.0, slowest_s - sum(both)) + 0.01 for both in own],
        "time/step_s": [slowest_s + 0.01 for _ in own],
        "gpu/temp_c": [None for _ in own],
    }
    spans = []
    for data_s, compute_s in own:
        laps, at_s = [], end_s - slowest_s
        for what, part_s in (("data", data_s), ("fwd", 0.35 * compute_s), ("bwd", 0.65 * compute_s)):
            laps.append([what, at_s, at_s + part_s])
            at_s += part_s
        spans.append(
            [*laps, ["opt", at_s, max(at_s, end_s - 0.02)], ["log", max(at_s, end_s - 0.02), max(at_s, end_s) + 0.01]]
        )
    return {
        "time": end_s, "train/step": step, "run/attempt": attempt, "host": host, "ranks": ranks, "values": values,
        "spans": spans,
    }  # fmt: skip


def write_lists(folder: Path) -> None:
    """The plan, the quarantine, and the samples with the highest loss."""
    plan = {"peak_bytes": 68 * 2**30, "traced_bytes": 63 * 2**30, "cost": {"step_s": 0.7, "tokens_per_s": 5200.0}}
    (folder / "plan.json").write_text(json.dumps(plan))
    reasons = ["picture cannot be decoded: truncated JPEG", "no answer in the conversation", f"label {HOSTILE}"]
    bad = [
        {"sample_id": n, "shard": "train-000003.tar", "key": f"{n:06d}", "reason": reasons[n % 7 % 3],
         "stage": "decode", "first_step": 10 * n}
        for n in range(23)
    ]  # fmt: skip
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in bad))
    evaluation = max(folder.glob("eval/step-*"))
    (evaluation / "highest_loss.jsonl").write_text(
        "".join(json.dumps(_hard_sample(place)) + "\n" for place in range(6))
    )


def _hard_sample(place: int) -> dict[str, Any]:
    chance = random.Random(place)
    words = f"title:  Burgundy {HOSTILE} scarf\ncategory: knit wear\nprice: 4 12".split(" ")
    tokens = [["<|assistant|>", None]] + [[f"{word} ", round(chance.expovariate(0.7), 3)] for word in words]
    return {
        "shard": "validation-000000.tar", "key": f"{place:06d}", "loss": 4.0 - place / 2,
        "prompt": f"What is this product? {HOSTILE}", "target": "title: …",
        "thumbnail": f"thumbnails/{place:06d}.jpg" if place else None, "tokens": tokens,
    }  # fmt: skip


if __name__ == "__main__":
    write_rich_run(Path(sys.argv[1]), num_samples=240)
