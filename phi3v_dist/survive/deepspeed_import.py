"""An old DeepSpeed ZeRO-3 checkpoint → a checkpoint of ours, from which a run begins; done once, by hand.

What comes in: DeepSpeed's files, and the settings of the run that shall go on from them. What goes out: fp32 masters
and optimizer states under official names, committed as step 0 of a run that has not begun.

Surprise: DeepSpeed writes no checksums. A flipped bit in its files is imported as it is; ours are hashed from then on.
"""

import json
import logging
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from phi3v_dist.config import Settings
from phi3v_dist.errors import CheckpointError, ConfigError
from phi3v_dist.model.adapters import choose_trained
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.parallel.partitions import TensorSpec, official_name
from phi3v_dist.progress import track
from phi3v_dist.survive import random_state
from phi3v_dist.survive.checkpoint import Position
from phi3v_dist.survive.deepspeed_files import DeepSpeedCheckpoint, owned_of, share_of
from phi3v_dist.survive.durable import fsync_folder
from phi3v_dist.survive.manifest import FORMAT, FORMAT_VERSION, UPGRADE, rank_file_name, write_manifest
from phi3v_dist.survive.rank_files import write_rank_file
from phi3v_dist.train.optim import build_optimizer

log = logging.getLogger(__name__)


def import_checkpoint(source: DeepSpeedCheckpoint, settings: Settings) -> Path:
    """Write it as step 0 of the run that `settings` describe; returns the checkpoint's folder.

    The data's position is not in it, nor the state of random generators: the run begins its data from the start, and
    its steps, learning rates and books count from 1. Adam goes on with the step it had.

    Raises:
        ConfigError: the run has begun already.
        CheckpointError: names, shapes or what is trained differ from the settings', or the disk is full.
    """
    final = settings.run.folder / "checkpoints" / "step-00000000"
    begun = [name for name in ("checkpoints", "metrics.jsonl", "ledger.bin") if (settings.run.folder / name).exists()]
    if begun:
        raise ConfigError(
            f"{settings.run.folder} has begun already ({', '.join(begun)}): an import is a run's first checkpoint. "
            "Give another `run.name`"
        )
    specs, param_groups = _target(source, settings)
    states = source.states(0)
    steps = {float(state["step"]) for state in states if "step" in state}
    if len(steps) > 1:
        raise CheckpointError(f"{source.optimizer_files[0]}: parts of the optimizer are at different steps: {steps}")
    scalar = next(({"step": _scalar(state["step"])} for state in states if "step" in state), {})
    manifest = {
        "format": FORMAT, "version": FORMAT_VERSION, "upgrade": UPGRADE, "step": 0, "attempt": 0,
        "world_size": source.world_size,
        "versions": {"python": platform.python_version(), "torch": version("torch"),
                     "deepspeed": str(source.head.get("ds_version"))},
        "position": asdict(Position(0, "imported", {}, 0, "imported", settings.run.seed)),
        "engine": {
            "counters": _counters(source.head), "param_groups": param_groups,
            "optimizer_scalars": [scalar for _ in param_groups], "schedule": None, "loss_scale": {},
        },
        "aliases": {}, "tensors": {name: asdict(spec) for name, spec in specs.items()},
    }  # fmt: skip
    temporary = final.with_name(f".tmp-{final.name}-import-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        files = {}
        for rank in track(range(source.world_size), "importing", "ranks"):
            tensors, metadata = _rank_file(source, rank, settings.run.seed)
            files[rank_file_name(rank)] = write_rank_file(temporary / rank_file_name(rank), tensors, metadata)
        write_manifest(temporary, manifest | {"files": files})
        temporary.rename(final)
        fsync_folder(final.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {final}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _target(source: DeepSpeedCheckpoint, settings: Settings) -> tuple[dict[str, TensorSpec], list[dict[str, Any]]]:
    """The tensors as the run's own checkpoints would have them, and its parameter groups, without the weights."""
    model = Phi3VForCausalLM.without_weights(read_config(settings.model.path))
    choose_trained(model, settings.train, settings.run.seed)
    groups = build_optimizer(model, settings.train).param_groups
    group_of = {id(parameter): number for number, group in enumerate(groups) for parameter in group["params"]}
    trained = {name: shape for shapes in source.sub_groups for name, shape in shapes.items()}
    states = source.states(0)
    dtypes = {
        key: str(value.dtype).removeprefix("torch.") for key, value in states[0].items() if _is_flat(value, states[0])
    }
    frozen = source.frozen_fingerprints()
    specs, problems = {}, []
    for stored_name, parameter in model.named_parameters():
        name, shape = official_name(stored_name), tuple(parameter.shape)
        ours, theirs = ("trained" if parameter.requires_grad else "frozen"), _role(name, trained, frozen)
        if theirs is None:
            problems.append(f"{name}: in the model, not in {source.folder}")
        elif theirs != ours:
            problems.append(f"{name}: {theirs} in {source.folder}, {ours} by `train.parts`")
        elif (found := trained[name] if ours == "trained" else source.frozen[name]) != shape:
            problems.append(f"{name}: shape {found} in {source.folder}, {shape} in the model")
        elif ours == "trained":
            specs[name] = TensorSpec(shape, ours, group_of[id(parameter)], dtypes)
        else:
            specs[name] = TensorSpec(shape, ours, None, {"weight": frozen[name][0]}, frozen[name][1])
    known = {official_name(name) for name, _ in model.named_parameters()}
    problems += [f"{name}: in {source.folder}, not in the model" for name in (*trained, *frozen) if name not in known]
    if problems:
        head = f"{source.folder} does not fit the settings (`model.path` {settings.model.path}, `train.parts`)"
        raise CheckpointError([head, *problems])
    return specs, [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _rank_file(source: DeepSpeedCheckpoint, rank: int, seed: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a rank's file: its elements of each tensor, without DeepSpeed's padding."""
    random_state.reseed(seed, 0, rank)
    generators, numbers = random_state.capture()
    tensors = {f"random/{device}": state for device, state in generators.items() if device == "cpu"}
    pieces = {}
    for names, states in zip(source.sub_groups, source.states(rank), strict=True):
        offset = 0
        for name, shape in names.items():
            pieces[name] = start, length = owned_of(shape, rank, source.world_size)
            for key, flat in _flat_states(states):
                tensors[f"{key}/{name}"] = flat.narrow(0, offset, length)
            offset += share_of(shape, source.world_size)
    metadata = {"format": f"{FORMAT}, version {FORMAT_VERSION}", "step": "0", "rank": str(rank)}
    return tensors, metadata | {"pieces": json.dumps(pieces), "random": json.dumps(numbers)}


def _counters(head: Mapping[str, Any]) -> dict[str, int]:
    """DeepSpeed's, but for `micro_steps`, which it does not save: between two updates, as every save is."""
    counters = {name: int(head.get(name) or 0) for name in ("global_steps", "global_samples", "skipped_steps")}
    accumulation = head["ds_config"].get("gradient_accumulation_steps") if isinstance(head["ds_config"], dict) else 1
    return counters | {"micro_steps": counters["global_steps"] * int(accumulation or 1)}


def _role(name: str, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> str | None:
    return "trained" if name in trained else "frozen" if name in frozen else None


def _scalar(value: Any) -> dict[str, Any]:
    is_tensor = isinstance(value, Tensor)
    return {
        "value": value.item() if is_tensor else value,
        "tensor_dtype": str(value.dtype).removeprefix("torch.") if is_tensor else None,
    }


def _flat_states(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((key, value) for key, value in group.items() if _is_flat(value, group))


def _is_flat(value: Any, group: Mapping[str, Any]) -> bool:
    return isinstance(value, Tensor) and value.shape == group["weight"].shape
