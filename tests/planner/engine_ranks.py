"""The real DeepSpeed engine on planned rows, real or fake tensors: how many bytes it holds, by our own count.

    torchrun --nproc_per_node 2 engine_ranks.py CASES.json OUT      real tensors, gloo
    python engine_ranks.py CASES.json OUT --fake 64                 fake tensors, fake process group of 64 ranks

A case is [config.json's content, model settings, train settings, row fields, ds_config, ranks that share a row].
OUT-RANK.json gets, for each and every step, the peaks of forward, backward and the optimizer's step, in bytes.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from phi3v_dist.config import ModelSettings, TrainSettings
from phi3v_dist.model.backends import Backend
from phi3v_dist.model.mlp import FeedForward
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.parallel import zero
from phi3v_dist.parallel.topology import Topology, switch_off_shm_op
from phi3v_dist.parallel.ulysses import SequenceGroup
from phi3v_dist.planner import row as rows
from phi3v_dist.planner.trace import Ledger
from phi3v_dist.train.optim import build_optimizer

SDPA = Backend("sdpa")
NUM_STEPS = 4  # DeepSpeed knows the order of modules from the third on


def main(cases: Path, out: Path, fake_ranks: int | None) -> None:
    torch.set_num_threads(1)
    switch_off_shm_op()
    if fake_ranks:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        os.environ |= {"RANK": "0", "WORLD_SIZE": str(fake_ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": "29500"}  # fmt: skip
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=fake_ranks)
        _patch_for_fakes()
    else:
        dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    found = [measure(*case, fake=bool(fake_ranks)) for case in json.loads(cases.read_text())]
    (out.parent / f"{out.name}-{dist.get_rank()}.json").write_text(json.dumps(found))


def _patch_for_fakes() -> None:
    """What a fake tensor or group cannot answer (PLANNER.md §4)."""
    from deepspeed.runtime.zero import partitioned_param_coordinator

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda *_: None
    torch.nn.Module.to = lambda self, *_, **__: self
    torch.nn.Module.bfloat16 = lambda self: self


def measure(
    config: Any, model: Any, train: Any, row: Any, ds_config: Any, sequence: int, fake: bool
) -> list[dict[str, Any]]:
    shape = rows.RowShape(**{k: tuple(map(tuple, v)) if k == "images" else tuple(v) if isinstance(v, list) else v
                             for k, v in row.items()})  # fmt: skip
    model, train = ModelSettings(path=Path("none"), **model), TrainSettings(steps=1, **train)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    torch.manual_seed(0)
    ledger, group = Ledger(), rows.TracedGroup(sequence, sequence - 1)
    if not fake:
        group = SequenceGroup.form(Topology(dist.get_rank(), dist.get_world_size()), sequence)
    arguments = rows.inputs_of(shape, group if sequence > 1 else rows.ALONE)
    with mode:
        if fake:
            arguments = rows.faked(arguments, mode)
        with ledger:
            made = zero.build_partitioned(lambda: Phi3VForCausalLM(config, model.longrope, SDPA), ds_config)
            rows.prepare(made, model, train)
            for parameter in made.parameters():
                # Never set until now, and a step that is not finite would be skipped. Adapters are whole as yet.
                getattr(parameter, "ds_tensor", parameter.data).normal_(0, 0.02)
            zero.gather_whole(made, FeedForward)
            engine = zero.initialize(made, build_optimizer(made, train), ds_config)
            arguments["pixel_values"] = rows.crops_of(shape, group)
            for tensor in rows.tensors_of(arguments):
                ledger.add(tensor, 0)
            peaks = []
            for _ in range(NUM_STEPS):
                ledger.mark("forward", "")
                resting = ledger.total
                loss = engine(**arguments).token_losses.sum()
                ledger.mark("backward", "")
                engine.backward(loss * 1.0, scale_wrt_gas=False)
                del loss
                ledger.mark("step", "")
                engine.step()
                ledger.mark("rest", "")
                most = {key: sum(row[1]) for (key, _), row in zip(ledger.keys[-3:], ledger.rows[-3:], strict=True)}
                peaks.append(most | {"resting": resting})
    return peaks


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4]) if "--fake" in sys.argv else None)
