"""Record what each kind of work takes in a small run of two ranks, for test_recorded.py.

    python tests/watch/record_intervals.py      writes tests/watch/recorded_intervals.json, in about a minute

The run trains, evaluates and saves, on rows of up to 6,000 tokens and prompts of 30 to 5,000.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).parent / "recorded_intervals.json"
FOLDER = "RECORD_INTERVALS_IN"
WORDS = (10, 5000, 40, 700, 12, 2500, 60)  # in a question, one after the other


def record_rank() -> None:
    """Train as `launch/train.py` does, and write down each interval: rank, lane, kind, work, seconds."""
    from phi3v_dist.cli.train import main
    from phi3v_dist.watch import heartbeat, limits

    rows: list[tuple] = []
    path = Path(os.environ[FOLDER]) / f"rank-{os.environ['RANK']}.json"
    add = limits.Limits.add

    def recorded(self: limits.Limits, kind: str, work: float, seconds: float) -> None:
        lane = next(name for name, lane in heartbeat._heart.lanes.items() if lane.kind == kind)
        rows.append((int(os.environ["RANK"]), lane, kind, work, round(seconds, 5)))
        add(self, kind, work, seconds)

    limits.Limits.add = recorded
    try:
        main()
    finally:
        path.write_text(json.dumps(rows))


def write_shard(path: Path, numbers: range) -> None:
    import webdataset
    from conftest import COLOURS, picture

    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for n in numbers:
            colour, question = COLOURS[n % 4], [{"type": "text", "text": "hello " * WORDS[n % len(WORDS)]}]
            sample = {"__key__": f"{n:05d}"}
            if n % 2:
                sample["0.jpg"] = picture(colour, 400, 300)
                question.insert(0, {"type": "image", "image": "0.jpg"})
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"A {colour} square"}]
            tar.write(sample | {"json": json.dumps({"messages": turns}).encode()})


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import yaml
    from conftest import COLOURS, REPOSITORY, TINY_SIZES, environment
    from launching import free_port

    from phi3v_dist.model.tiny import write_tiny

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shard(folder / "train-000.tar", range(60))
        write_shard(folder / "validation-000.tar", range(100, 114))
        sentences = [f"A {colour} square, Price: 0123456789. What is it? Say hello." for colour in COLOURS]
        write_tiny(folder / "model", sentences, **TINY_SIZES)
        tree = {
            "run": {"name": "run", "root": str(folder / "runs")},
            "model": {"path": str(folder / "model"), "gradient_checkpointing": False},
            "data": {
                "num_crops": 1, "row_length_tokens": 6000, "window_samples": 30,
                "train": [{"shards": str(folder / "train-*.tar")}],
                "validation": [{"shards": str(folder / "validation-*.tar")}],
            },
            "train": {"steps": 12, "rows_per_step": 2, "learning_rate": {"text": 1e-3}},
            "checkpoint": {"every_steps": 4, "keep": 1},
            "eval": {"base": True, "every_steps": 6, "samples": 14, "max_new_tokens": 6, "batch_samples": 2},
            "observe": {"wandb": "disabled"},
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        words = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), __file__]
        subprocess.run(
            [*words, "--config", str(folder / "config.yaml")], env=environment(**{FOLDER: name}), cwd=REPOSITORY,
            check=True,
        )  # fmt: skip
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]

    lines = ",\n".join(json.dumps(row) for rows in ranks for row in rows)
    OUT.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    record_rank() if FOLDER in os.environ else main()
