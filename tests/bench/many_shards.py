"""100,000 small shards → what it costs to open them, and to get a first batch from anywhere in an epoch.

    python tests/bench/many_shards.py --folder /tmp/many --shards 100000

What goes out: `Figure`s for run.py. Surprise: every figure is taken in a process
of its own, which has imported everything before it begins to count. Else one would measure imports and leftovers.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from figures import Figure

KINDS = (3, 4, 5)  # samples in a shard, in turn
ROW_TOKENS, ROWS_PER_STEP, WINDOW = 512, 8, 1024


def figures(folder: Path, num_shards: int = 100_000) -> list[Figure]:
    """Make the shards if they are not there, then measure. The manifest is made by the first open."""
    from phi3v_dist.model.tiny import write_tiny

    tiny, pattern, state = folder / "tiny", str(folder / "*.tar"), folder / "state-90.json"
    if not (tiny / "config.json").exists():
        write_tiny(tiny, ["A red square, hello. What is it?"])
    write_shards(folder, tiny, num_shards)
    first, opened, trusted = (_child(what, pattern, tiny) for what in ("open", "open", "trusted"))
    if not state.exists():
        state.write_text(json.dumps(_child("state", pattern, tiny)))
    begin = _child("first_batch", pattern, tiny)
    resumed = _child("first_batch", pattern, tiny, str(state))
    goal_s = 1.2 * begin["wall_s"] + 0.2
    return [
        Figure(
            f"open {num_shards:,} shards, CPU", f"{opened['cpu_s']:.2f} s", "<= 1 s", f"{opened['samples']:,} samples"
        ),
        Figure("private memory for it", f"{opened['private_mib']:.0f} MiB", "<= 64 MiB"),
        Figure("the same without a manifest, CPU", f"{first['cpu_s']:.1f} s"),
        Figure("the same on another rank, CPU", f"{trusted['cpu_s']:.2f} s"),
        Figure("to the first batch, at 0 %", f"{begin['wall_s']:.2f} s", "", f"CPU {begin['first_batch_cpu_s']:.2f} s"),
        Figure(
            "to the first batch, resumed at 90 %", f"{resumed['wall_s']:.2f} s", f"<= {goal_s:.2f} s",
            f"CPU {resumed['first_batch_cpu_s']:.2f} s",
        ),
    ]  # fmt: skip


def write_shards(folder: Path, tiny_model: Path, num_shards: int) -> None:
    """Shards with indexes and lengths. One of each kind is made by the package, the others are copies of its bytes."""
    from phi3v_dist.config import SourceSettings
    from phi3v_dist.data.lengths import measure
    from phi3v_dist.data.processor import Phi3VProcessor
    from phi3v_dist.data.shards import ShardTable

    if (folder / "done").exists() and (folder / "done").read_text() == str(num_shards):
        return
    kinds = folder / "kinds"
    kinds.mkdir(parents=True, exist_ok=True)
    for num_samples in KINDS:
        (kinds / f"{num_samples}.tar").write_bytes(_tar(num_samples))
    table = ShardTable.open([SourceSettings(shards=[str(kinds / "*.tar")])])
    measure(table, Phi3VProcessor.from_pretrained(tiny_model, num_crops=1))
    files = [
        [(path.name.removeprefix(f"{kind}.tar"), path.read_bytes()) for path in sorted(kinds.glob(f"{kind}.tar*"))]
        for kind in KINDS
    ]
    for number in range(num_shards):
        for ending, data in files[number % len(KINDS)]:
            descriptor = os.open(f"{folder}/{number:06d}.tar{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, data)
            os.close(descriptor)
    (folder / "done").write_text(str(num_shards))


def _tar(num_samples: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(num_samples):
            turns = [
                {"role": "user", "content": "What is it?"},
                {"role": "assistant", "content": "A red square" + ", hello" * (number + num_samples)},
            ]
            data = json.dumps({"messages": turns}).encode()
            entry = tarfile.TarInfo(f"{number:03d}.json")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _child(what: str, *arguments: object) -> dict:
    command = [sys.executable, __file__, "--child", what, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _private_mib() -> float:
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private")) / 1024


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _run_child(what: str, pattern: str, tiny_model: str, state: str | None = None) -> dict:
    from phi3v_dist.config import SourceSettings
    from phi3v_dist.data.fetch import Fetcher
    from phi3v_dist.data.lengths import measure
    from phi3v_dist.data.loader import Decoder, Loader
    from phi3v_dist.data.order import Order
    from phi3v_dist.data.plan import Planner
    from phi3v_dist.data.processor import Phi3VProcessor
    from phi3v_dist.data.shards import ShardTable

    sources = [SourceSettings(shards=[pattern])]
    processor = Phi3VProcessor.from_pretrained(tiny_model, num_crops=1)
    digest = ShardTable.open(sources).digest if what == "trusted" else None
    memory, cpu_s, begin = _private_mib(), _cpu_s(), time.perf_counter()
    table = ShardTable.open(sources, known_digest=digest)
    lengths = measure(table, processor)
    used = {"samples": len(table), "cpu_s": _cpu_s() - cpu_s, "private_mib": _private_mib() - memory}
    if what in ("open", "trusted"):
        return used
    order = Order(table, seed=0)
    planner = Planner(
        order.sample_ids, lengths, rows_per_step=ROWS_PER_STEP, row_length_tokens=ROW_TOKENS, window_samples=WINDOW,
        packing=True, seed=0, end=order.num_samples,
    )  # fmt: skip
    if what == "state":
        seen = 0
        for step in planner:
            seen += len(step.sample_ids)
            if seen >= 0.9 * order.num_samples:
                return step.state
    if state:
        planner = planner.resume(json.loads(Path(state).read_text()))
    loader = Loader(planner, Decoder(table, Fetcher(table), processor), lengths, 0, 1, ROWS_PER_STEP, 1, ROWS_PER_STEP)
    next(iter(loader))
    return used | {"wall_s": time.perf_counter() - begin, "first_batch_cpu_s": _cpu_s() - cpu_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/many_shards"))
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_run_child(*arguments.child)))
        return
    for figure in figures(arguments.folder, arguments.shards):
        print(*filter(None, figure), sep="  ")


if __name__ == "__main__":
    main()
