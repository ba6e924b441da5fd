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

from phi3v_dist import resources
from phi3v_dist.config import Settings
from phi3v_dist.data.plan import accumulation
from phi3v_dist.errors import ConfigError
from phi3v_dist.memory import returned_when_freed
from phi3v_dist.parallel import zero_limits
from phi3v_dist.parallel.topology import Topology

TORCH_LINEAR = nn.functional.linear  # before `zero.Init`, which is called here alone, replaces it in the whole process
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
    "tensorboard": "`observe.tensorboard`",
    "comet": "DeepSpeed's own monitor would open a second run; `observe` says who is told",
    "csv_monitor": "metrics.jsonl in the run folder has all numbers",
}
KNOWN = {  # top-level keys of DeepSpeed 0.19 that may stand beside ours; it ignores all others without a word
    *(key.partition(".")[0] for key in HOMES), *REFUSED,
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather", "data_types",
    "torch_autocast", "activation_checkpointing", "aio", "compile", "checkpoint", "comms_logger", "flops_profiler",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers", "elasticity",
    "disable_python_gc", "managed_gradient_accumulation", "log_level", "seq_parallel_communication_data_type",
    "sparse_gradients", "sequence_parallel_size", "dataloader_drop_last",
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """The JSON as it is; a file that ships with the package if there is none at `path`.

    Raises:
        ConfigError: no such file, not JSON, or without a ZeRO section.
    """
    path = resources.find(path, "ds_configs")
    if not path.is_file():
        raise ConfigError(f"`parallel.deepspeed` {path}: no such file{resources.suggestion(path, 'ds_configs')}")
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
    train, sequence = settings.train, settings.parallel.sequence
    if world_size % sequence:
        found.append(
            f"`parallel.sequence` is {sequence}, but {world_size} ranks cannot be divided into groups of so many: "
            f"set it to a divisor of {world_size}, or use {-(-world_size // sequence) * sequence} ranks"
        )
    consumers = max(1, world_size // sequence)
    given, needed = train.gradient_accumulation_steps, accumulation(train.rows_per_step, consumers)
    if given is not None and given * consumers != train.rows_per_step:
        rows = given * consumers
        who = f"{consumers} groups of ranks" if sequence > 1 else f"{world_size} ranks"
        found.append(
            f"`train.gradient_accumulation_steps` {given} x {who} = {rows} rows, but "
            f"`train.rows_per_step` is {train.rows_per_step}: leave the former out (then {needed} each), or "
            f"set the latter to {rows}"
        )
    return found


def _json_problems(config: dict[str, Any], settings: Settings, world_size: int) -> list[str]:
    path = resources.find(settings.parallel.deepspeed, "ds_configs")
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
    limits = zero_limits.problems(
        config["zero_optimization"], world_size, _ranks_per_node(world_size), settings.parallel.nvme
    )
    found += [f"{path}: {problem}" for problem in limits]
    allowed = {key: value for key, value in config.items() if key not in REFUSED}
    filled = _fill(allowed, settings, world_size, torch.float32, hidden_size=1)
    found += [f'{path}: nothing here fills in the "auto" of `{key}`; give a value' for key in _autos(filled)]
    return found


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
    return zero_limits.device(config["zero_optimization"], "offload_optimizer") != "none"


def uses_nvme(path: Path) -> bool:
    """Whether a JSON keeps optimizer states on a disk."""
    return zero_limits.device(read(path)["zero_optimization"], "offload_optimizer") == "nvme"


def _fill(
    config: dict[str, Any], settings: Settings, world_size: int, dtype: torch.dtype, hidden_size: int,
    ranks_per_node: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    micro_steps = accumulation(settings.train.rows_per_step, max(1, world_size // settings.parallel.sequence))
    bf16 = config["bf16"] if isinstance(config.get("bf16"), dict) else {}
    zero = config["zero_optimization"]
    sizes = {
        "reduce_bucket_size": hidden_size**2,  # elements, as the next two: transformers' DeepSpeed integration
        "stage3_prefetch_bucket_size": hidden_size**2 * 9 // 10,
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_hpz_partition_size": ranks_per_node or _ranks_per_node(world_size),
    }
    filled: dict[str, Any] = {key: size for key, size in sizes.items() if zero.get(key) == "auto"}
    optimizer = zero_limits.offload(zero, "offload_optimizer")
    if optimizer.get("nvme_path") == "auto":
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

    Raises:
        ConfigError: ranks that are to share a copy of the weights are not on one node; on all ranks alike.
    """
    import deepspeed

    group_size = config["zero_optimization"].get("zero_hpz_partition_size")
    if group_size is not None:  # on one rank it is on all, whatever "auto" became
        topology = Topology.from_environment()
        if problem := zero_limits.scattered(topology.gather((topology.host, group_size))):
            raise ConfigError(problem)
    with no_init_weights(), returned_when_freed(), deepspeed.zero.Init(config_dict_or_path=config):
        return build()  # zero.Init's own `dtype=` is ignored on a CPU (0.19.8): bf16 there; the config is not


def gather_whole(model: nn.Module, kind: type[nn.Module]) -> None:
    """Have ZeRO-3 take modules of this kind as one: it gathers them once, however often their parts run inside."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [kind])


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around a model whose parameters may already be partitioned."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
