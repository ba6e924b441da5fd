"""The page to read first: `build` names every part of a run once, in the order in which data flows.

    shards → order → plan → loader → model → engine → checkpoints → evaluator → tracker

What comes in: `Settings` and a `Topology`. What goes out: a `Run`, which `train/loop.py` drives. Surprise: everything
that can be wrong with settings, files and arithmetic is found by `problems`, before the first process group or weight
exists.
"""

import hashlib
import json
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from phi3v_dist import config
from phi3v_dist.attempt import continuing, environment
from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.attempt.requests import Requests
from phi3v_dist.config import Settings, SourceSettings
from phi3v_dist.data import outcomes, quarantine, store
from phi3v_dist.data.cache import ShardCache
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.fit import FitPolicy
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.loader import Decoder, Loader
from phi3v_dist.data.order import Order, permute
from phi3v_dist.data.plan import Lengths, Planner, accumulation, overfit
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import DataError
from phi3v_dist.evaluate.evaluator import Evaluator
from phi3v_dist.model import build as model_build
from phi3v_dist.model.flops import flops
from phi3v_dist.model.official_config import read_config
from phi3v_dist.observe import sinks
from phi3v_dist.observe.collect import Collector
from phi3v_dist.observe.gather import Nodes
from phi3v_dist.observe.health import SpikeWatch
from phi3v_dist.observe.profiles import Profiles
from phi3v_dist.observe.tracker import NoTracker, Tracker
from phi3v_dist.observe.window import Whole
from phi3v_dist.parallel import zero
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.parallel.ulysses import SequenceGroup
from phi3v_dist.planner import at_start
from phi3v_dist.planner.gpus import gpu_of
from phi3v_dist.progress import show_progress
from phi3v_dist.survive import best
from phi3v_dist.survive.checkpoint import Checkpoints
from phi3v_dist.survive.durable import write_durably
from phi3v_dist.survive.interval import Earlier, Interval
from phi3v_dist.survive.saver import Saver
from phi3v_dist.train.accounts import Accounts
from phi3v_dist.train.guards import Guards
from phi3v_dist.train.optim import build_optimizer
from phi3v_dist.train.skipped import SkippedSteps

STEPS_NAME = "steps.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """One side of the data, ready to be read: shards, how long each sample is, and how to decode one."""

    table: ShardTable
    lengths: Lengths
    decoder: Decoder

    @classmethod
    def open(cls, sources: list[SourceSettings], settings: Settings, known_digest: str | None = None) -> "Data":
        """Find, index and measure the shards of some sources. Raises DataError naming every shard that is wrong.

        known_digest: of the table as another rank has just opened it, so that no shard need be looked at again.
        """
        table = ShardTable.open(sources, known_digest)
        cache = ShardCache.of(settings.data.cache)
        if cache is None:
            store.require_ranges(table.shards)
        policy = FitPolicy(settings.data.fit, settings.data.row_length_tokens)
        processor = Phi3VProcessor.from_pretrained(settings.model.path, settings.data.num_crops, policy)
        num_threads, is_counted = settings.data.num_workers, False

        def on_count(done: int, total: int) -> None:
            nonlocal is_counted
            is_counted = True
            report("counting tokens", done, total)

        with show_progress("shards") as report:
            lengths = measure(table, processor, num_threads, on_count, cache)
        if is_counted:
            _log_sources(table)
        return cls(table, lengths, Decoder(table, Fetcher(table, cache), processor, settings.data.crops))

    @classmethod
    def open_together(cls, sources: list[SourceSettings], settings: Settings, topology: Topology) -> "Data":
        """As `open`, on all ranks: rank 0 looks at every shard, and the others take its word."""
        ours = cls.open(sources, settings) if topology.is_main else None
        digest = topology.broadcast(ours.table.digest if ours else None)
        ours = ours or cls.open(sources, settings, digest)
        if ours.table.digest != digest:
            raise DataError(f"the shards on {topology.host} are not those of rank 0; all nodes must see the same files")
        return ours

    def usable(self, limit_tokens: int) -> int:
        """Number of samples that fit into a row."""
        return int(((self.lengths.tokens > 0) & (self.lengths.tokens <= limit_tokens)).sum())

    def why_left_out(self) -> str:
        """How many samples are left out, by reason, each with an example; empty when none is."""
        reasons = outcomes.left_out(self.lengths, self.decoder.processor.fit_policy)
        first = [outcomes.names(reason, self.table, self.lengths, 1)[0] for reason in reasons]
        return "; ".join(f"{reason}, for example {name}" for reason, name in zip(reasons, first, strict=True))


@dataclass(frozen=True)
class Run:
    """All parts of a run, and the few facts that the loop needs beside them."""

    settings: Settings
    topology: Topology
    attempt: Attempt
    requests: Requests
    sequence: SequenceGroup
    train: Data
    planner: Planner
    num_steps: int
    engine: Any
    saver: Saver
    evaluator: Evaluator | None
    tracker: Tracker
    run_id: str
    resolved: dict[str, Any]
    reference: dict[str, float]

    @property
    def folder(self) -> Path:
        return self.settings.run.folder

    @property
    def num_consumers(self) -> int:
        """Takers of rows: ranks, or groups of ranks that share each row."""
        return self.topology.world_size // self.sequence.size

    @property
    def config_digest(self) -> str:
        return hashlib.sha256(json.dumps(self.resolved, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def record(self) -> dict[str, Any]:
        """The resolved settings and what they ran with: config.yaml, and the config that W&B shows."""
        ran_with = {
            "versions": environment.versions(continuing.RECORDED),
            "commit": environment.commit(),
            "world_size": self.topology.world_size,
        }
        return self.resolved | {"environment": ran_with}

    def accounts(self, state: dict[str, Any] | None) -> Accounts:
        """Ledger and quarantine, from a checkpoint's state on; None: from the beginning."""
        return Accounts.open(
            self.folder, self.topology, self.train.table, self.train.lengths, self.planner,
            self.settings.data.max_bad_frac, self.attempt.number, state, self.num_consumers,
        )  # fmt: skip

    def guards(self) -> Guards:
        """What looks at each step."""
        watch, name = self.settings.watch, self.train.table.sample_name
        return Guards(
            self.engine, self.topology, SpikeWatch(name, is_main=self.topology.is_main),
            SkippedSteps(watch.bad_steps, name, self.saver.checkpoints.newest, self.topology.is_main),
            watch.compare_every_steps,
        )  # fmt: skip

    def profiles(self) -> Profiles:
        """What records steps when a person asks for it."""
        return Profiles(self.folder, self.topology, self.requests, self.num_steps)

    def collector(self, loader: Loader) -> Collector:
        """What gathers every rank's numbers; made by all ranks together."""
        settings, topology, device = self.settings, self.topology, self.topology.device
        whole = None
        if topology.is_main:
            gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
            asked = settings.observe.peak_tflops
            whole = Whole(
                flops(read_config(settings.model.path), settings.train.parts), topology.world_size,
                asked * 1e12 if asked else gpu.flops if gpu else None, self.train.lengths, self.train.table,
                Order(self.train.table, settings.run.seed).shares, settings.train.grad_clip,
            )  # fmt: skip
        return Collector(
            Nodes.meet(topology), device, self.tracker, self.folder, self.attempt.number,
            settings.observe.log_every_steps, loader.meter, lambda: self.saver.committed_step, whole,
        )  # fmt: skip

    def loader(self, state: dict[str, Any] | None) -> Loader:
        """Batches from where `state` says the run goes on; None: from the beginning."""
        data, topology, model = self.settings.data, self.topology, self.settings.model
        work = flops(read_config(model.path), self.settings.train.parts, recompute=model.gradient_checkpointing)
        planner = self.planner.resume(state) if state else self.planner
        return Loader(
            steps=overfit(planner) if self.settings.train.overfit_one_batch else planner,
            decoder=self.train.decoder, lengths=self.train.lengths, consumer=topology.rank // self.sequence.size,
            num_consumers=self.num_consumers, num_workers=data.num_workers, prefetch_rows=data.prefetch_rows,
            micro_steps=self.engine.gradient_accumulation_steps(), vision_chunk_crops=model.vision_chunk_crops,
            cost=work.of_row, sequence=self.sequence,
        )  # fmt: skip


def problems(settings: Settings, world_size: int) -> list[str]:
    """Everything wrong with the files and numbers that the settings name; one message each. Builds missing indexes."""
    found = zero.problems(settings, world_size)
    for sources in filter(None, (settings.data.train, settings.data.validation)):
        found += _shard_problems(sources)
    found += model_build.problems(settings, Topology.from_environment().device)
    found += environment.links_out(settings.run.folder) + continuing.problems(settings) + sinks.problems(settings)
    found += best.problems(settings)
    for line in continuing.warnings(settings):
        log.warning("%s", line)
    try:
        _reference(settings.eval.reference)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        found.append(f"`eval.reference` {settings.eval.reference}: not a JSON file of figures: {error}")
    if not found:
        sides = {"train": settings.data.train, "validation": settings.data.validation}
        for side, sources in sides.items():
            data = Data.open(sources, settings) if sources else None
            if data and not data.usable(settings.data.row_length_tokens):
                found.append(f"`data.{side}` is empty: {len(data.table)} samples, {data.why_left_out()}")
            elif data and side == "train":
                found += _too_many_unusable(data, settings.data.max_bad_frac)
    return found


def _log_sources(table: ShardTable) -> None:
    """A line for each source whose shards were looked at for the first time, however many they are."""
    for number in range(len(table.sources)):
        shards = np.flatnonzero(table.source_of_shard == number)
        num_samples = int(np.diff(table.start)[shards].sum())
        name = table.source_name(int(shards[0]))
        log.info("prepared %s: %s samples, %s shards, tokens counted", name, f"{num_samples:,}", f"{len(shards):,}")


def _shard_problems(sources: list[SourceSettings]) -> list[str]:
    """What is wrong with the shards; one source must not hide what is wrong with the next."""
    try:
        ShardTable.open(sources)
    except DataError as error:
        if len(sources) == 1:
            return error.problems
        return [problem for source in sources for problem in _shard_problems([source])] or error.problems
    return []


def _too_many_unusable(data: Data, limit_frac: float) -> list[str]:
    """Damage that is known before the first step. Samples that `data.fit` leaves out are no damage."""
    num_bad = len(data.lengths.bad)
    if not quarantine.too_many(num_bad, len(data.table), limit_frac, at_end=True):
        return []
    summary = quarantine.summarize_unusable(data.table, data.lengths)
    return [
        f"`data.train`: {num_bad} of {len(data.table)} samples cannot be used, more than `data.max_bad_frac` "
        f"{limit_frac:g}; {summary}. Mend the shards, or raise the limit"
    ]


def build(settings: Settings, topology: Topology, attempt: Attempt, requests: Requests) -> Run:
    """Put a run together. Rank 0 has looked at everything through `problems` before."""
    torch.manual_seed(settings.run.seed)
    topology.barrier()  # rank 0 may still be writing indexes
    start = topology.broadcast(model_build.pinned_start(settings) if topology.is_main else None)
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"init_from": start})})
    resolved = config.dump(settings)
    environment.require_alike(topology, resolved)
    train = Data.open_together(settings.data.train, settings, topology)
    planner = plan(settings, train)
    num_steps = topology.broadcast(count_steps(settings, planner) if topology.is_main else 0)
    device = topology.device
    engine = _engine(settings, topology)
    evaluator = None
    if settings.data.validation:
        validation = Data.open_together(settings.data.validation, settings, topology)
        sample_ids = fixed_order(validation.lengths, settings.data.row_length_tokens)
        seed = settings.run.seed
        evaluator = Evaluator(validation.decoder, validation.lengths, sample_ids, settings.eval, topology, seed)
    tracker = sinks.build(settings, attempt, num_steps) if topology.is_main else NoTracker()
    run_id = topology.broadcast(_run_id(settings.run.folder) if topology.is_main else "")
    run = Run(
        settings=settings, topology=topology, attempt=attempt, requests=requests,
        sequence=SequenceGroup.form(topology, settings.parallel.sequence), train=train, planner=planner,
        num_steps=num_steps, engine=engine,
        saver=_saver(settings, topology, attempt, requests, tracker, run_id), evaluator=evaluator, tracker=tracker,
        run_id=run_id, resolved=resolved, reference=_reference(settings.eval.reference),
    )  # fmt: skip
    if topology.is_main:
        write_durably(run.folder / "config.yaml", yaml.safe_dump(run.record, sort_keys=False))
        write_durably(run.folder / STEPS_NAME, json.dumps(_steps_record(planner, num_steps)) + "\n")
        model = engine.module
        log.info(
            "model    %s · %s parameters · %s on %d x %s · LongRoPE by %s",
            settings.model.path, f"{_num_parameters(model):,}", str(model.lm_head.weight.dtype).removeprefix("torch."),
            topology.world_size, device.type, settings.model.longrope,
        )  # fmt: skip
        for line in describe(settings, train, num_steps, topology.world_size):
            log.info(line)
        at_start.write_plan(settings, topology.world_size, device, next(iter(planner)).rows)
        log.info("saves    %s", run.saver.interval)
    return run


def _saver(
    settings: Settings, topology: Topology, attempt: Attempt, requests: Requests, tracker: Tracker, run_id: str
) -> Saver:  # fmt: skip
    choice = settings.checkpoint
    checkpoints = Checkpoints(
        settings.run.folder / "checkpoints", choice.keep, attempt=attempt.number, write_mb_per_s=choice.write_mb_per_s,
        local=choice.local and choice.local / run_id / "checkpoints", shared_every=choice.shared_every,
    )  # fmt: skip
    earlier = Earlier.of(settings.run.folder, attempt.number) if topology.is_main else Earlier()
    interval = Interval(choice, num_nodes=-(-topology.world_size // topology.local_world_size), earlier=earlier)
    kept = None
    if choice.best and topology.is_main:
        kept = best.BestCheckpoint(settings.run.folder, choice.best, settings.eval.fields, attempt.number)
    return Saver(topology, attempt, requests, checkpoints, interval, tracker, kept)


def plan(settings: Settings, train: Data) -> Planner:
    """The rows of the run, from its beginning."""
    order = Order(train.table, settings.run.seed)
    epochs = settings.train.epochs
    return Planner(
        order.sample_ids, train.lengths, rows_per_step=settings.train.rows_per_step,
        row_length_tokens=settings.data.row_length_tokens, packing=settings.data.packing, seed=settings.run.seed,
        window_samples=min(settings.data.window_samples, order.num_samples),
        end=round(epochs * order.num_samples) if epochs else None, order_digest=order.digest,
    )  # fmt: skip


def count_steps(settings: Settings, planner: Planner) -> int:
    """`train.steps`, or what `train.epochs` come to: counted in about 10 s a million samples, or as an earlier attempt
    wrote into the run folder. Raises DataError when they end before the warm-up does."""
    train = settings.train
    if train.steps:
        return train.steps
    path = settings.run.folder / STEPS_NAME
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known == _steps_record(planner, known.get("steps")):
        return known["steps"]
    num_steps = 0
    with show_progress("steps") as report:
        for _ in planner:
            num_steps += 1
            report("counting", num_steps, None)
    if (train.warmup_steps or 0) >= num_steps:
        raise DataError(
            f"{train.epochs} epochs give only {num_steps} steps, but `train.warmup_steps` is {train.warmup_steps}"
        )
    return num_steps


def _steps_record(planner: Planner, num_steps: int | None) -> dict[str, Any]:
    return {"plan": planner.digest, "rows_per_step": planner.rows_per_step, "steps": num_steps}


def _engine(settings: Settings, topology: Topology) -> Any:
    """The model, its weights read straight into ZeRO-3's partitions, and DeepSpeed around it."""
    device = topology.device
    hidden_size = read_config(settings.model.path)["hidden_size"]
    dtype = model_build.compute_dtype(settings.model.dtype, device)
    ds_config = zero.resolve(settings, topology.world_size, dtype, hidden_size)
    backend = model_build.proven_backend(settings, device)
    model = model_build.partitioned_model(settings, backend, ds_config)
    optimizer = build_optimizer(model, settings.train, on_host=zero.steps_on_host(ds_config))
    return zero.initialize(model, optimizer, ds_config)


def fixed_order(lengths: Lengths, limit_tokens: int) -> tuple[int, ...]:
    """Usable sample ids in an order that mixes shards and is the same in every run."""
    ids = permute(np.arange(len(lengths)), len(lengths), key=0)
    tokens = lengths.tokens[ids]
    return tuple(ids[(tokens > 0) & (tokens <= limit_tokens)].tolist())


def _run_id(folder: Path) -> str:
    """The run's name for other systems; drawn once, kept over all attempts."""
    path = folder / "run-id"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _reference(path: Path | None) -> dict[str, float]:
    """The `best_…` and `chance_…` figures of `eval.reference`, as metrics to stand beside the scores."""
    figures = json.loads(path.read_text()) if path else {}
    return {f"eval/{name}": float(value) for name, value in figures.items() if name.startswith(("best_", "chance_"))}


def describe(settings: Settings, train: Data, num_steps: int, world_size: int) -> list[str]:
    """What is about to happen, as sums a person can check."""
    data, rows = settings.data, settings.train.rows_per_step
    num_consumers = world_size // settings.parallel.sequence
    micro_steps = accumulation(rows, num_consumers)
    empty = micro_steps * num_consumers - rows
    sharing = f"{num_consumers} x {settings.parallel.sequence}"
    who = f"{world_size if num_consumers == world_size else sharing} ranks"
    usable = train.usable(data.row_length_tokens)
    lines = [
        f"run      {settings.run.folder} · {num_steps:,} steps · seed {settings.run.seed}",
        *model_build.describe(settings, Topology.from_environment().device),
        f"data     {usable:,} of {len(train.table):,} samples in {len(train.table.shards):,} shards",
        f"batch    {rows} rows of up to {data.row_length_tokens:,} tokens = {who} x {micro_steps} "
        f"micro-steps{f' - {empty} empty' if empty else ''}",
    ]
    bad = train.table.bad_counts
    if bad.damaged_places:
        lines.append(
            f"damage   {bad.damaged_places:,} places of the shards cannot be read ({bad.empty_shards} shards at "
            "all); phi3v-prepare lint names them"
        )
    cut = outcomes.cut(train.lengths, train.decoder.processor.fit_policy)
    lines += best.describe(settings)
    if data.fit != "drop":
        lines.append(f"fit      {cut[0] if cut else f'`data.fit: {data.fit}` had nothing to cut'}")
    if why := train.why_left_out():
        lines.append(f"left out {why}")
    if settings.train.overfit_one_batch:
        lines.append("overfit  the first step's rows again and again: the loss must go to about 0")
    return lines


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
