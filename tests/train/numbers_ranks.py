"""Trains a tiny Phi-3-V under real ZeRO-3 while numbers go wrong, and notes what every rank saw.

    python numbers_ranks.py FOLDER 2:skips:fp32 2:skips:bf16 …      leaves FOLDER/TRIAL.json

A trial is ranks : what goes wrong : dtype. Surprise: model, rows and the way of starting ranks are those of
../parallel/collective_ranks.py. Asserting is done by the tests that call this.
"""

import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import collective_ranks
import xxhash
from deepspeed.comm import comm
from forked_ranks import fork_ranks, joined, num_ranks

from phi3v_dist.config import Settings
from phi3v_dist.data.samples import BadSample
from phi3v_dist.errors import CorruptedError, Phi3VError
from phi3v_dist.model.build import partitioned_model, proven_backend
from phi3v_dist.model.tiny import write_tiny
from phi3v_dist.observe import stragglers
from phi3v_dist.parallel import replicas, waits, zero
from phi3v_dist.parallel.local_gradients import LocalGradients
from phi3v_dist.parallel.partitions import Partitions
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.train.optim import build_optimizer
from phi3v_dist.train.step import train_step
from phi3v_dist.watch import faults

RATES, STEPS = collective_ranks.RATES, 6
CLEAN_STEPS = {"fp32": 8, "bf16": 20}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "offload": torch.bfloat16, "nvme": torch.bfloat16}
# Large enough for DeepSpeed to move optimizer states to a disk, which begins at 1 MiB.
WIDE = collective_ranks.DECODER | {"hidden_size": 128, "intermediate_size": 512}
# Step → what goes wrong in it
SKIPPED = {2: "loss", 3: "gradients", 4: "inf", 5: "labels"}


class Rows(collective_ranks.Mix):
    """Two micro-steps a step, and an empty row; no sample of step 5 can be decoded."""

    def example(self, sample_id, planned_tokens, out, rank):
        if SKIPPED.get(sample_id // self.rows_per_step + 1) == "labels":
            raise BadSample("drawn", str(sample_id), "none of its step can be decoded")
        return super().example(sample_id, planned_tokens, out, rank)


def decoder_of(dtype: str) -> dict[str, int]:
    return WIDE if dtype == "nvme" else collective_ranks.DECODER


def build(folder: Path, topology: Topology, rows: Rows, dtype: str, threshold: int = 200):
    """As run.py does it; tensors of up to `threshold` elements stay whole on every rank."""
    settings = Settings.model_validate(
        {"model": {"path": folder, "vision_chunk_crops": collective_ranks.CHUNK_CROPS,
                   "dtype": "fp32" if dtype == "fp32" else "bf16"},
         "data": {"train": [{"shards": "none"}]}, "train": {"steps": 1000, "rows_per_step": rows.rows_per_step},
         "parallel": {"deepspeed": Path(__file__).parents[2] / "ds_configs" / "zero3.json"}}
    )  # fmt: skip
    hidden_size = decoder_of(dtype)["hidden_size"]
    ds_config = zero.resolve(settings, topology.world_size, DTYPES[dtype], hidden_size)
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    if dtype == "offload":
        ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if dtype == "nvme":
        disk = {"device": "nvme", "nvme_path": str(folder / "nvme"), "pin_memory": False, "buffer_count": 4}
        ds_config["zero_optimization"]["offload_optimizer"] = disk
    model = partitioned_model(settings, proven_backend(settings, topology.device), ds_config)
    return zero.initialize(model.train(), build_optimizer(model, settings.train), ds_config)


def digests(engine) -> dict[str, str]:
    """This rank's masters, moments, counts of updates, computing weights and learning rates."""
    parts = Partitions(engine)
    found = {}
    for piece in parts.pieces():
        for state, tensor in piece.states.items():
            found[f"{state}/{piece.name}"] = xxhash.xxh3_64_hexdigest(tensor.contiguous().view(torch.uint8).numpy())
    for name, parameter in engine.module.named_parameters():
        own = parameter.ds_tensor[: max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel))]
        found[f"computing/{name}"] = xxhash.xxh3_64_hexdigest(own.detach().contiguous().view(torch.uint8).numpy())
    settings = parts.settings()
    return found | {"scalars": json.dumps(settings["optimizer_scalars"])}


def set_fault(text: str) -> None:
    os.environ[faults.VARIABLE] = text


def run_skips(folder: Path, topology: Topology, dtype: str) -> dict:
    """Steps of which some go wrong; and beside them, from the same start, the others alone."""
    rows = Rows(collective_ranks.EVERY, 2 * topology.world_size - 1)
    engine = build(folder, topology, rows, dtype)
    overflowing: list[bool] = []  # as one layer's own backward would make them
    engine.module.lm_head.weight.register_hook(lambda gradient: gradient * math.inf if overflowing else None)
    gradients = LocalGradients(engine.module, engine.device)
    set_fault("1:forward:2:nan,1:backward:3:nan")
    notes: dict = {"steps": []}
    for plan, batches in islice(rows.loader(topology.rank, topology.world_size, STEPS), STEPS):
        overflowing[:] = [True] * (SKIPPED.get(plan.number) == "inf" and topology.rank == 0)
        before = digests(engine)
        result = train_step(engine, plan, batches, RATES, topology, gradients)
        after = digests(engine)
        counters = {name: getattr(engine, name) for name in ("global_steps", "skipped_steps", "micro_steps")}
        notes["steps"].append(
            {"loss": str(result.loss), "skipped": result.skipped, "not_finite_on": result.not_finite_on,
             "changed": [name for name in after if before.get(name) != after[name]], "counters": counters}
        )  # fmt: skip
    notes["end"] = digests(engine)

    set_fault("")
    other = build(folder, topology, rows, dtype)
    for plan, batches in islice(rows.loader(topology.rank, topology.world_size, STEPS), STEPS):
        if plan.number in SKIPPED:
            for _ in batches:
                pass
        else:
            train_step(other, plan, batches, RATES, topology)
    notes["end of the others alone"] = digests(other)
    return notes


def run_mismatch(folder: Path, topology: Topology, dtype: str) -> dict:
    """A rank that gets one batch fewer in step 2, and says so instead of letting the others wait for ever."""
    rows = Rows([(collective_ranks.TEXT, True)], 2 * topology.world_size)
    engine = build(folder, topology, rows, dtype)
    problem = ""
    for plan, batches in islice(rows.loader(topology.rank, topology.world_size, 2), 2):
        fewer = 1 if plan.number == 2 and topology.rank == 1 else 2
        try:
            train_step(engine, plan, islice(batches, fewer), RATES, topology)
        except Phi3VError as error:
            problem = error.report()
            break
        except RuntimeError as error:  # gloo's, when the other rank is gone
            problem = f"gloo: {error}"[:300]
    (folder / f"mismatch-{topology.rank}.txt").write_text(problem)
    os._exit(0)  # the process group cannot be left in order any more


def flip(tensor: torch.Tensor, element: int) -> None:
    """One bit, the highest of the exponent: it shows in every type."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().view(-1)[element : element + 1].view(integers)
    bits ^= 1 << (8 * tensor.element_size() - 3)


def run_flips(folder: Path, topology: Topology, dtype: str) -> dict:
    """Clean steps with a comparison after each; then one bit at a time is flipped on one rank, and flipped back."""
    rows = Rows([(collective_ranks.ONE, True), (collective_ranks.TEXT, True)], topology.world_size)
    engine = build(folder, topology, rows, dtype)
    set_fault("1:forward:3:nan")  # a skipped step leaves nothing gathered
    seconds, step_seconds = [], []
    for plan, batches in islice(
        rows.loader(topology.rank, topology.world_size, CLEAN_STEPS[dtype]), CLEAN_STEPS[dtype]
    ):
        began = time.perf_counter()
        train_step(engine, plan, batches, RATES, topology)
        compared = time.perf_counter()
        replicas.compare(engine, topology)
        seconds.append(time.perf_counter() - compared)
        step_seconds.append(compared - began)
    notes: dict = {"compare_s": statistics.median(seconds), "step_s": statistics.median(step_seconds), "found": {}}
    name = "model.norm.weight"
    whole = next(param for known, param in engine.module.named_parameters() if known == name)
    owned = engine.module.lm_head.weight
    sub_group, offset, _ = engine.optimizer.grad_position[owned.ds_id]
    group = engine.optimizer.param_groups[0]
    buffer = next(engine.module.buffers())
    for what, rank, tensor in (
        ("gathered", 1, whole.data),
        ("master", topology.world_size - 1, engine.optimizer.fp32_partitioned_groups_flat[sub_group][offset:]),
        ("computing", 0, owned.ds_tensor),
        ("buffer", 1, buffer),
    ):
        if topology.rank == rank:
            flip(tensor, 3)
        notes["found"][what] = compared_error(engine, topology)
        if topology.rank == rank:
            flip(tensor, 3)
    rate = group["lr"]
    group["lr"] = rate * 2 if topology.rank == 1 else rate
    notes["found"]["learning rate"] = compared_error(engine, topology)
    group["lr"] = rate
    notes["found"]["nothing"] = compared_error(engine, topology)
    return notes


def compared_error(engine, topology: Topology) -> str:
    try:
        replicas.compare(engine, topology)
    except CorruptedError as error:
        return error.report()
    return ""


def run_waits(folder: Path, topology: Topology, dtype: str) -> dict:
    """Rank 1 is slow: by sleeping in its forward passes, then because it is stopped most of the time."""
    num_steps, num_windows = 4, 2
    rows = Rows([(collective_ranks.TEXT, True)], topology.world_size)
    engine = build(folder, topology, rows, dtype)
    said: list[str] = []
    stragglers.log.warning = lambda text, *values: said.append(text % values)
    steps = iter(rows.loader(topology.rank, topology.world_size, 3 * num_steps))
    notes: dict = {}
    slow_pid = topology.gather(os.getpid())[1]
    for what in ("sleeps", "is stopped"):
        if what == "sleeps":
            next_step(engine, steps, topology)  # the first traces modules
        faults.SLOW_S = 1.5  # long beside a step on a busy machine
        set_fault("1:forward:*:slow" if what == "sleeps" else "")
        waits.WAITS.watch(topology)
        is_over = threading.Event()
        if what == "is stopped" and topology.is_main:
            threading.Thread(target=hold_back, args=(slow_pid, is_over), daemon=True).start()
        hosts = topology.gather(topology.host)
        watch = stragglers.Stragglers(hosts, hosts)
        rows_logged = []
        for _ in range(num_windows):
            done = [next_step(engine, steps, topology) for _ in range(num_steps // num_windows)]
            rows_logged.append(looked(watch, done, topology))
        is_over.set()
        waits.WAITS.stop()
        notes[what] = {"said": list(said), "rows": rows_logged}
        said.clear()
    assert not any(name in vars(comm.cdb) for name in waits.COLLECTIVES), "the backend is not as it was"
    return notes


def looked(watch: stragglers.Stragglers, results: list, topology: Topology) -> dict:
    """What rank 0 makes of a window; the others keep quiet."""
    mine = [(each.own.data_s, each.own.compute_s, sum(each.seconds.values())) for each in results]
    data_s, compute_s, step_s = np.array(topology.gather(np.mean(mine, axis=0))).T
    last = results[-1].step
    return watch.look((results[0].step, last), data_s, compute_s, step_s.mean()) if topology.is_main else {}


def next_step(engine, steps, topology: Topology):
    plan, batches = next(steps)
    return train_step(engine, plan, batches, RATES, topology)


def hold_back(pid: int, is_over: threading.Event) -> None:
    """A process gets a quarter of its time, as on a busy node."""
    while not is_over.is_set():
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.15)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)


TRIALS = {"waits": run_waits, "flips": run_flips, "skips": run_skips, "mismatch": run_mismatch}


def run_rank(rank: int, world_size: int, port: int, trials: list[str], folder: Path) -> None:
    with joined(rank, world_size, port, collective_ranks.TIMEOUT_S) as topology:
        for trial in trials:
            _, name, dtype = trial.split(":")
            set_fault("")
            notes = topology.gather(TRIALS[name](folder / "model", topology, dtype))
            if topology.is_main:
                (folder / f"{trial}.json").write_text(json.dumps(notes))


def main() -> None:
    folder, trials = Path(sys.argv[1]), sys.argv[2:]
    decoder = decoder_of(trials[0].split(":")[2])
    write_tiny(folder / "model", ["A red coat costs 12."], clip=collective_ranks.CLIP, decoder=decoder)
    fork_ranks(run_rank, sorted(trials, key=num_ranks), folder)


if __name__ == "__main__":
    main()
