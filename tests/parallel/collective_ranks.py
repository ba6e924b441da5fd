"""Trains a tiny Phi-3-V under real ZeRO-3 on rows that differ from rank to rank, and compares every step's gradients.

    python collective_ranks.py FOLDER 2:every:trained:4 4:packed:lora:3:2 …      leaves FOLDER/TRIAL.json

A trial is ranks : mix : how parts are trained : steps, and : ranks that share a row where it is not 1, and : a mistake
of `MISTAKES` that the engine's forward makes. Beside the engine, rank 0 runs a plain copy of its weights over the rows
of all ranks, one after another, each row whole and nothing recomputed. Surprise: ranks are forked from this process, as
in ../survive/checkpoint_ranks.py, and join as torchrun's would. Tests: test_equal_collectives.py, test_sequence.py.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch._inductor.compile_fx  # a first deepspeed.initialize imports it: once here, for all groups
from deepspeed.utils import safe_get_full_grad

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked_ranks import fork_ranks, joined, num_ranks

from phi3v_dist.config import Settings
from phi3v_dist.data.batch import Example
from phi3v_dist.data.loader import Loader
from phi3v_dist.data.plan import Lengths, Planner
from phi3v_dist.data.samples import BadSample
from phi3v_dist.evaluate.generate import plain_linear
from phi3v_dist.model import attention
from phi3v_dist.model.adapters import choose_trained
from phi3v_dist.model.attention import Layout
from phi3v_dist.model.backends import Backend
from phi3v_dist.model.build import partitioned_model, proven_backend
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.placement import num_crops_of, num_image_tokens
from phi3v_dist.model.rope import LongRope
from phi3v_dist.model.tiny import write_tiny
from phi3v_dist.model.vision import Normalization
from phi3v_dist.parallel import zero
from phi3v_dist.parallel.partitions import gathered
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.parallel.ulysses import ALONE, SequenceGroup
from phi3v_dist.train.optim import build_optimizer
from phi3v_dist.train.step import train_step

CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
           "num_key_value_heads": 2}  # fmt: skip
CHUNK_CROPS = 2
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}  # among 4 ranks, keys and values are repeated
ORIGINAL_TOKENS = 400  # of the model with these heads: one picture is below, two are above
PACKED_TOKENS = 1450
CHUNK_TOKENS = 100  # of the feed-forward part
TEXT_TOKENS, LABEL_TOKENS = 20, 12
REPOSITORY = Path(__file__).parents[2]
RATES = {"text": 1e-3, "vision": 1e-3, "projector": 1e-3}
TIMEOUT_S = 240.0

# Kinds of samples: padded pictures' (height, width). 0, 2 and 5 crops: the last takes three chunks.
TEXT, ONE, SEVERAL = (), ((336, 336),), ((672, 336), (336, 336))
EVERY = [(TEXT, True), (ONE, True), (SEVERAL, True), (TEXT, True), (SEVERAL, False)]  # False: cannot be decoded
HERE = "here"  # can be decoded by all ranks but the second of those that share a row
PACKED = [(SEVERAL, True), (TEXT, True), (ONE, True), (ONE, HERE), (TEXT, True), (TEXT, True)]
PARTS = {
    "trained": {}, "frozen": {"vision": "frozen"}, "lora": {"text": "lora", "vision": "frozen", "projector": "lora"},
}  # fmt: skip


@dataclass(frozen=True)
class Mix:
    """Sample k of the endless stream is of kind k modulo their number; two micro-steps a step."""

    kinds: list
    rows_per_step: int
    packing: bool = False
    samples_per_row: int = 1

    @classmethod
    def named(cls, name: str, num_consumers: int) -> "Mix":
        if name == "one":  # a picture on one rank, text on all others
            return cls([(ONE, True)] + [(TEXT, True)] * (2 * num_consumers - 1), 2 * num_consumers)
        if name.startswith("packed"):  # several documents in a row; `packed1`: one micro-step a step
            num_rows = num_consumers if name == "packed1" else 2 * num_consumers - 1
            return cls(PACKED, num_rows, packing=True, samples_per_row=4)
        if name == "texts":  # half of the row is half of the second text
            return cls([(TEXT, True)], num_consumers, packing=True, samples_per_row=3)
        return cls(EVERY, 2 * num_consumers - 1)  # and an empty row

    def loader(self, consumer: int, num_consumers: int, num_steps: int, sequence: SequenceGroup = ALONE) -> Loader:
        num_samples = num_steps * self.rows_per_step * self.samples_per_row
        pictures = [self.kinds[i % len(self.kinds)][0] for i in range(num_samples)]
        tokens = np.array([TEXT_TOKENS + sum(num_image_tokens(*size) for size in sizes) for sizes in pictures])
        lengths = Lengths(
            tokens,
            np.full(num_samples, LABEL_TOKENS),
            np.array([sum(num_crops_of(*size) for size in sizes) for sizes in pictures]),
            full_tokens=tokens,
            bad={},
        )
        planner = Planner(
            lambda begin, end: np.arange(begin, end), lengths, rows_per_step=self.rows_per_step,
            row_length_tokens=PACKED_TOKENS, window_samples=self.rows_per_step * self.samples_per_row,
            packing=self.packing, seed=0, end=num_samples,
        )  # fmt: skip
        micro_steps = -(-self.rows_per_step // num_consumers)
        rank = sequence.rank if sequence.size > 1 else 1
        decoder = SimpleNamespace(
            example=partial(self.example, rank=rank), normalization=Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
            processor=SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)),
        )  # fmt: skip
        return Loader(
            planner, decoder, lengths, consumer, num_consumers, micro_steps, 1, 1, CHUNK_CROPS, sequence=sequence
        )

    def example(self, sample_id: int, planned_tokens: int, out: torch.Tensor, rank: int) -> Example:
        """Drawn from its number; the same on every rank."""
        sizes, is_good = self.kinds[sample_id % len(self.kinds)]
        if not is_good or (is_good == HERE and rank == 1):
            raise BadSample("drawn", str(sample_id), "this kind cannot be decoded")
        generator = torch.Generator().manual_seed(sample_id)
        words = torch.randint(3, 300, (TEXT_TOKENS,), generator=generator)
        places = [torch.full((num_image_tokens(*size),), -k) for k, size in enumerate(sizes, start=1)]
        ids = torch.cat([*places, words])
        labels = torch.full_like(ids, -100)
        labels[-LABEL_TOKENS:] = ids[-LABEL_TOKENS:]
        num_crops = sum(num_crops_of(*size) for size in sizes)
        tiles = torch.randint(0, 256, (num_crops, 3, 12, 12), generator=generator, dtype=torch.uint8)
        crops = tiles.repeat_interleave(28, dim=2).repeat_interleave(28, dim=3)
        return Example(sample_id, ids, labels, crops, torch.tensor(sizes, dtype=torch.int64).view(-1, 2))


@dataclass(frozen=True)
class Trial:
    """What one name on the command line means."""

    name: str
    world_size: int
    mix: Mix
    parts: str
    num_steps: int
    sequence: int
    mistake: str | None

    @classmethod
    def named(cls, name: str) -> "Trial":
        world_size, mix, parts, num_steps, *rest = name.split(":")
        sequence, mistake = int(rest[0]) if rest else 1, rest[1] if rest[1:] else None
        rows = Mix.named(mix, int(world_size) // sequence)
        return cls(name, int(world_size), rows, parts, int(num_steps), sequence, mistake)

    def settings(self, folder: Path) -> Settings:
        own = {"vision_chunk_crops": CHUNK_CROPS, "mlp_chunk_tokens": CHUNK_TOKENS}
        return Settings.model_validate(
            {"model": {"path": folder / ("grouped" if self.mix.packing or self.sequence > 2 else "model"), **own},
             "data": {"train": [{"shards": "none"}]},
             "train": {"steps": 1000, "rows_per_step": self.mix.rows_per_step, "parts": PARTS[self.parts]},
             "parallel": {"deepspeed": REPOSITORY / "ds_configs" / "zero3.json", "sequence": self.sequence}}
        )  # fmt: skip


def build(settings: Settings, topology: Topology):
    """As run.py does it, every tensor partitioned however small."""
    hidden_size = DECODER["hidden_size"]
    ds_config = zero.resolve(settings, topology.world_size, torch.float32, hidden_size)
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    backend = proven_backend(settings, topology.device)
    model = partitioned_model(settings, backend, ds_config)
    return zero.initialize(model.train(), build_optimizer(model, settings.train), ds_config)


def plain_copy(engine, settings: Settings) -> Phi3VForCausalLM:
    """The same model, adapters included, in one process, with the weights that the engine has now. Collective."""
    copy = Phi3VForCausalLM(engine.module.config, engine.module.longrope, engine.module.attention)
    choose_trained(copy, settings.train, settings.run.seed)
    theirs = dict(engine.module.named_parameters())
    for name, parameter in copy.named_parameters():
        with gathered([theirs[name]]), torch.no_grad():
            parameter.copy_(theirs[name])
    return copy.train()


def local_factors(rope: LongRope, own: torch.Tensor, longest: int, row_length: int) -> torch.Tensor:
    """LongRoPE's factors for all tokens of a slice by the largest position in it, as it sees it."""
    return torch.full_like(own, min(longest, len(own)))


def shift_after_the_cut(layout: Layout, begin: int, end: int) -> Layout:
    """Labels shifted within the slice: its last token has no next one."""
    found = CUT(layout, begin, end)
    inside = found.target_positions < end - begin - 1
    return replace(found, target_positions=found.target_positions[inside], targets=found.targets[inside])


def one_block(query, key, value, layout: Layout, backend: Backend, scaling: float) -> torch.Tensor:
    """Documents see those before them."""
    return ATTEND(query, key, value, replace(layout, lengths=(sum(layout.lengths),)), backend, scaling)


CUT, ATTEND = Layout.cut, attention.attend_documents
MISTAKES = {  # what others have got wrong, without any message (SEQUENCE.md §2)
    "local_factors": (LongRope, "deciding", local_factors),
    "late_shift": (Layout, "cut", shift_after_the_cut),
    "one_block": (attention, "attend_documents", one_block),
}


@contextmanager
def making(mistake: str | None) -> Iterator[None]:
    """Make it for the length of a `with`."""
    if mistake is None:
        yield
        return
    owner, name, wrong = MISTAKES[mistake]
    right = getattr(owner, name)
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, right)


@contextmanager
def listed_collectives() -> Iterator[list[str]]:
    """Names of all collectives that this rank starts for the length of a `with`, ZeRO's and ours."""
    found: list[str] = []
    names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_reduce", "broadcast")
    theirs = {name: getattr(torch.distributed, name) for name in names}

    def listed(name: str, *args, **kwargs):
        found.append(name)
        return theirs[name](*args, **kwargs)

    for name in names:
        setattr(torch.distributed, name, partial(listed, name))
    try:
        yield found
    finally:
        for name, call in theirs.items():
            setattr(torch.distributed, name, call)


def run_trial(folder: Path, topology: Topology, trial: Trial) -> dict:
    settings, mix, num_steps = trial.settings(folder), trial.mix, trial.num_steps
    engine = build(settings, topology)
    sequence = SequenceGroup.form(topology, trial.sequence)
    gradients: dict[str, torch.Tensor] = {}
    calls: list[int] = []  # of the tower, recomputation included, by this rank
    engine.module.model.vision_embed_tokens.img_processor.register_forward_pre_hook(lambda *_: calls.append(1))
    update = engine.step

    def look_then_update() -> None:
        if engine.is_gradient_accumulation_boundary():
            for parameter_name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    gradients[parameter_name] = safe_get_full_grad(parameter)
        update()

    engine.step = look_then_update
    num_consumers = topology.world_size // sequence.size
    ours = mix.loader(topology.rank // sequence.size, num_consumers, num_steps, sequence)
    steps = zip(ours, iter(mix.loader(0, 1, num_steps)) if topology.is_main else count(), strict=False)
    differences: dict[str, float] = {}
    losses, by_step, off, documents, quarantined = [], [], [], [], []
    orders, num_exchanges = [], []
    for (plan, batches), rows_alone in islice(steps, num_steps):
        copy = plain_copy(engine, settings)
        calls.clear()
        with making(trial.mistake), listed_collectives() as collectives:
            result = train_step(engine, plan, batches, RATES, topology)
        orders.append(len({tuple(of_rank) for of_rank in topology.gather(collectives)}))
        num_exchanges.append(collectives.count("all_to_all_single"))
        by_step.append(topology.gather(len(calls)))
        losses.append(result.loss)
        quarantined.append(result.quarantined)
        if topology.is_main:
            loss, found, lengths = compare(copy, rows_alone[1], gradients)
            off.append(abs(result.loss - loss))
            documents += lengths
            for parameter_name, difference in found.items():
                differences[parameter_name] = max(difference, differences.get(parameter_name, 0.0))
    assert len(losses) == num_steps
    return {
        "losses": losses, "off": off, "calls": by_step, "differences": differences, "documents": documents,
        "quarantined": quarantined, "orders": orders, "exchanges": num_exchanges,
    }  # fmt: skip


def compare(
    copy: Phi3VForCausalLM, batches: Iterable, gradients: dict[str, torch.Tensor]
) -> tuple[float, dict[str, float], list[tuple[int, ...]]]:
    """The copy's loss; per tensor the norm of the difference relative to max(own norm, 1e-6 x global norm), for
    k_proj.bias, 0 in theory, relative to the global norm; and the lengths of the rows' documents."""
    total_loss, num_labels, lengths = 0.0, 0, []
    with plain_linear():
        for batch in batches:
            losses = copy(**batch.inputs(torch.device("cpu"))).token_losses.sum()
            (losses / batch.plan.label_tokens).backward()
            total_loss, num_labels = total_loss + losses.item(), num_labels + batch.label_tokens
            lengths.append(batch.layout.lengths)
    wanted = {name: parameter.grad for name, parameter in copy.named_parameters() if name in gradients}
    total = float(torch.cat([gradient.flatten() for gradient in wanted.values()]).norm())
    differences = {}
    for name, gradient in wanted.items():
        scale = total if name.endswith("k_proj.bias") else max(float(gradient.norm()), 1e-6 * total)
        differences[name] = float((gradients[name] - gradient).norm()) / scale
    return total_loss / num_labels, differences, lengths


def run_rank(rank: int, world_size: int, port: int, trials: list[str], folder: Path) -> None:
    with joined(rank, world_size, port, TIMEOUT_S) as topology:
        for trial in trials:
            notes = run_trial(folder, topology, Trial.named(trial))
            if topology.is_main:
                (folder / f"{trial}.json").write_text(json.dumps(notes))


def main() -> None:
    folder, trials = Path(sys.argv[1]), sys.argv[2:]
    write_tiny(folder / "model", ["A red coat costs 12."], clip=CLIP, decoder=DECODER)
    write_tiny(folder / "grouped", ["A red coat costs 12."], clip=CLIP, decoder=DECODER | GROUPED)
    config = json.loads((folder / "grouped" / "config.json").read_text())
    config["original_max_position_embeddings"] = ORIGINAL_TOKENS
    (folder / "grouped" / "config.json").write_text(json.dumps(config))
    fork_ranks(run_rank, sorted(trials, key=num_ranks), folder)


if __name__ == "__main__":
    main()
