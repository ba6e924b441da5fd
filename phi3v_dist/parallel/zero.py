"""ds_configs/*.json and the settings → a DeepSpeed engine.

What comes in: a DeepSpeed JSON in which every number that has a home in the YAML says "auto". What goes out: the
engine.
Surprise: a number given in both places is an error even when they agree; one number, one home. DeepSpeed itself clips
at 1.0 unless told otherwise, and opens its own W&B run if asked; both are decided here. Which files there are and what
each key does: ds_configs/README.md.
"""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.initialization import no_init_weights

from phi3v_dist.attempt.build_cache import is_built
from phi3v_dist.config import Settings
from phi3v_dist.data.plan import accumulation
from phi3v_dist.errors import ConfigError
from phi3v_dist.memory import returned_when_freed
from phi3v_dist.parallel.topology import Topology

ModuleT = TypeVar("ModuleT", bound=nn.Module)
HOMES = {  # DeepSpeed key → the setting that owns it
    "train_batch_size": "train.rows_per_step",
    "train_micro_batch_size_per_gpu": "one row per forward, always",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.grad_clip",
    "bf16.enabled": "model.dtype",
}
REFUSED = {
    "optimizer": "learning rates and weight decay are in `train`",
    "scheduler": "warmup and decay are in `train`",
    "fp16": "use bf16 or fp32 (`model.dtype`)",
    "wandb": "`observe.wandb`",
    "tensorboard": "`observe`",
}
QUANTIZED = "it rounds what ranks exchange to 8 bits and less, which changes the losses, and runs on no CPU to be tested"
REFUSED_ZERO = {  # keys of `zero_optimization`, unless they are off
    "zero_quantized_weights": QUANTIZED,
    "zero_quantized_gradients": QUANTIZED,
    "zero_quantized_nontrainable_weights": QUANTIZED,
    "zenflow": "its updates come late, which changes the losses, and no checkpoint holds its state",
    "mics_shard_size": "DeepSpeed 0.19 has no MiCS any more; ds_configs/zero3_hpz.json keeps gathers inside a node",
    "cpu_offload": "write `offload_optimizer`",
    "cpu_offload_param": "write `offload_param`",
}
AIO_OP = "async_io"  # what DeepSpeed reads and writes an NVMe with; compiled from source
KNOWN = {  # top-level keys of DeepSpeed 0.19 that may stand beside ours; it ignores all others without a word
    *(key.partition(".")[0] for key in HOMES), *REFUSED,
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather", "data_types",
    "torch_autocast", "activation_checkpointing", "aio", "compile", "checkpoint", "comms_logger", "flops_profiler",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers", "elasticity",
    "disable_python_gc", "managed_gradient_accumulation", "log_level", "seq_parallel_communication_data_type",
    "sparse_gradients", "sequence_parallel_size", "csv_monitor", "comet", "dataloader_drop_last",
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """The JSON as it is.

    Raises:
        ConfigError: no such file, not JSON, or without a ZeRO section.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"`parallel.deepspeed` {path}: no such file{hint}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"`parallel.deepspeed` {path}: not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise ConfigError(f"`parallel.deepspeed` {path}: not a JSON object with a `zero_optimization` object in it")
    return config


def problems(settings: Settings, world_size: int) -> list[str]:
    """What in the JSON or the batch arithmetic contradicts the settings; one message each."""
    try:
        found = _json_problems(read(settings.parallel.deepspeed), settings, world_size)
    except ConfigError as error:
        found = error.problems
    train = settings.train
    given, needed = train.gradient_accumulation_steps, accumulation(train.rows_per_step, world_size)
    if given is not None and given * world_size != train.rows_per_step:
        rows = given * world_size
        found.append(
            f"`train.gradient_accumulation_steps` {given} x {world_size} ranks = {rows} rows, but "
            f"`train.rows_per_step` is {train.rows_per_step}: leave the former out (then {needed} each), or "
            f"set the latter to {rows}"
        )
    return found


def _json_problems(config: dict[str, Any], settings: Settings, world_size: int) -> list[str]:
    path = settings.parallel.deepspeed
    found = [f"{path}: `{key}` does not belong here: {where}" for key, where in REFUSED.items() if key in config]
    for key in sorted(config.keys() - KNOWN):
        near = difflib.get_close_matches(key, KNOWN, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        found.append(f"{path}:{_line(path, key)}: `{key}` is no key of DeepSpeed, which would ignore it{hint}")
    for key, home in HOMES.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part, "auto") if isinstance(value, dict) else value
        if value != "auto":
            found.append(f'{path}: `{key}` is {value}; write "auto", its home is {home}')
    found += [f"{path}: {problem}" for problem in _zero_problems(config["zero_optimization"], settings, world_size)]
    allowed = {key: value for key, value in config.items() if key not in REFUSED}
    filled = _fill(allowed, settings, world_size, torch.float32, hidden_size=1)
    found += [f'{path}: nothing here fills in the "auto" of `{key}`; give a value' for key in _autos(filled)]
    return found


def _zero_problems(zero: dict[str, Any], settings: Settings, world_size: int) -> list[str]:
    """What does not work, or not with our checkpoints; see ds_configs/README.md."""
    found = []
    if zero.get("stage") != 3:
        found.append(
            f"`zero_optimization.stage` is {zero.get('stage')}; this harness shards weights, and its checkpoints are "
            "made of those shards, so it must be 3"
        )
    for key, why in REFUSED_ZERO.items():
        if zero.get(key) not in (None, False, -1):
            found.append(f"`zero_optimization.{key}` is {zero[key]}; leave it out: {why}")
    group = zero.get("zero_hpz_partition_size", 1)
    own = _ranks_per_node(world_size)
    group = own if group == "auto" else group
    if not isinstance(group, int) or group < 1 or world_size % group:
        found.append(
            f"`zero_optimization.zero_hpz_partition_size` is {group}, which does not divide {world_size} ranks: give "
            "every node as many ranks, or take ds_configs/zero3.json"
        )
    elif own % group:
        found.append(
            f"`zero_optimization.zero_hpz_partition_size` is {group}, but a node has {own} ranks, so groups would reach "
            'over nodes: write "auto"'
        )
    return found + _offload_problems(zero, settings)


def _offload_problems(zero: dict[str, Any], settings: Settings) -> list[str]:
    optimizer, parameters = (_offload(zero, name) for name in ("offload_optimizer", "offload_param"))
    where, found = "`zero_optimization.offload_", []
    for name, offload, devices in (("optimizer", optimizer, ("none", "cpu", "nvme")), ("param", parameters, ("none", "cpu"))):
        if offload.get("device", "none") not in devices:
            found.append(
                f"{where}{name}.device` is {offload['device']}; it can be {' or '.join(devices)}"
                + (": no checkpoint of ours holds weights on NVMe, and in host memory 4 B of them take 8 GB a node")
                * (name == "param")
            )
    if optimizer.get("ratio", 1.0) != 1.0 or optimizer.get("super_offload"):
        found.append(f"{where}optimizer` has `ratio` or `super_offload`: leave them out, no checkpoint holds its state")
    on_host, weights_on_host = optimizer.get("device", "none") != "none", parameters.get("device", "none") != "none"
    if weights_on_host and not on_host:
        found.append(f"{where}param` needs `offload_optimizer`, else every update goes to the GPU and back")
    if weights_on_host and zero.get("zero_hpz_partition_size", 1) != 1:
        found.append(f"{where}param` and `zero_hpz_partition_size`: the node's copy of the weights would be on the host")
    if optimizer.get("device") == "nvme":
        if optimizer.get("nvme_path") == "auto" and settings.parallel.nvme is None:
            found.append(f"{where}optimizer.nvme_path` is auto: set `parallel.nvme` to a folder on each node's own disk")
        elif "nvme_path" not in optimizer:
            found.append(f'{where}optimizer.nvme_path` is missing: write "auto", and set `parallel.nvme`')
        if not is_built(AIO_OP):
            found.append(
                f"{where}optimizer.device` is nvme, which needs DeepSpeed's `{AIO_OP}`, and that is not built here. With "
                "libaio's headers installed (libaio-dev), once on each node, before ranks start: "
                f"python -m phi3v_dist.attempt.build_cache {AIO_OP}"
            )
    return found


def _offload(zero: dict[str, Any], name: str) -> dict[str, Any]:
    return zero[name] if isinstance(zero.get(name), dict) else {}


def _ranks_per_node(world_size: int) -> int:
    """Of this job; outside of one, all ranks count as one node's."""
    topology = Topology.from_environment()
    return topology.local_world_size if topology.world_size == world_size else world_size


def _line(path: Path, key: str) -> int:
    """Of the file, from 1: where the key stands for the first time."""
    return path.read_text().partition(f'"{key}"')[0].count("\n") + 1


def resolve(
    settings: Settings, world_size: int, dtype: torch.dtype, hidden_size: int, ranks_per_node: int | None = None
) -> dict[str, Any]:
    """The JSON with every "auto" filled in, ready for DeepSpeed. ranks_per_node: None is this job's own."""
    return _fill(read(settings.parallel.deepspeed), settings, world_size, dtype, hidden_size, ranks_per_node)


def steps_on_host(config: dict[str, Any]) -> bool:
    """Whether the optimizer's states, and so its step, are on the CPU."""
    return _offload(config["zero_optimization"], "offload_optimizer").get("device", "none") != "none"


def _fill(
    config: dict[str, Any], settings: Settings, world_size: int, dtype: torch.dtype, hidden_size: int,
    ranks_per_node: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    micro_steps = accumulation(settings.train.rows_per_step, world_size)
    bf16 = config["bf16"] if isinstance(config.get("bf16"), dict) else {}
    zero = config["zero_optimization"]
    sizes = {
        "reduce_bucket_size": hidden_size**2,  # elements, as the next two: transformers' DeepSpeed integration
        "stage3_prefetch_bucket_size": hidden_size**2 * 9 // 10,
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_hpz_partition_size": ranks_per_node or _ranks_per_node(world_size),
    }
    filled = {key: size for key, size in sizes.items() if zero.get(key) == "auto"}
    optimizer = _offload(zero, "offload_optimizer")
    if optimizer.get("nvme_path") == "auto" and settings.parallel.nvme is not None:
        filled["offload_optimizer"] = optimizer | {"nvme_path": str(settings.parallel.nvme)}
    return config | {
        "train_batch_size": micro_steps * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": settings.train.grad_clip,
        "bf16": bf16 | {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero | filled,
    }


def _autos(value: Any, key: str = "") -> list[str]:
    """Keys that still say "auto"."""
    if isinstance(value, dict):
        return [found for name, inner in value.items() for found in _autos(inner, f"{key}.{name}".lstrip("."))]
    return [key] if value == "auto" else []


def build_partitioned(build: Callable[[], ModuleT], config: dict[str, Any]) -> ModuleT:
    """A model whose parameters are partitioned as they are made, their values not set: load all of them.

    Initialisation is skipped: every value will be set.
    """
    import deepspeed

    with no_init_weights(), returned_when_freed(), deepspeed.zero.Init(config_dict_or_path=config):
        return build()  # zero.Init's own `dtype=` is ignored on a CPU (0.19.8): bf16 there; the config is not


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around a model whose parameters may already be partitioned."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
