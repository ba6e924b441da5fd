"""Settings → a partitioned Phi-3-V with weights in it; and, before that, everything that can be wrong with them.

What comes in: `Settings` and a device. What goes out: messages, a proven attention backend, a model ready for the
optimizer. Surprise: no rank ever holds the model. It is partitioned while it is made, and each fills its own share.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.config import Settings
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.errors import ConfigError, Phi3VError
from phi3v_dist.model.adapters import choose_trained, lora_targets
from phi3v_dist.model.backends import Backend, choose
from phi3v_dist.model.hub import check_sizes
from phi3v_dist.model.isolation import check_isolation
from phi3v_dist.model.mlp import FeedForward
from phi3v_dist.model.official_config import head_dim, read_config
from phi3v_dist.model.offload import HostActivations
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.sources import initial_weights, pinned, recorded_settings, trained_rule
from phi3v_dist.model.weights import check_names, load_weights
from phi3v_dist.parallel import zero
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.parallel.ulysses import group_sizes


def problems(settings: Settings, device: torch.device) -> list[str]:
    """What is wrong with the model folder, the weights to begin with, LoRA's targets and the backend asked for."""
    try:
        check_sizes(settings.model.path)
        start = pinned_start(settings)  # what this run began with, not what that has become since
        model = Phi3VForCausalLM.without_weights(read_config(settings.model.path))
    except Phi3VError as error:
        return error.problems  # nothing else can be looked at
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    looks: list[Callable[[], object]] = [
        lambda: check_names(shapes, initial_weights(settings.model.path, start, settings.run.seed, verify=True)),
        lambda: Phi3VProcessor.from_pretrained(settings.model.path, settings.data.num_crops),
        lambda: lora_targets(model, settings.train),
        lambda: proven_backend(settings, device),
        lambda: _require_longrope_said(settings, start),
    ]
    found = []
    for look in looks:
        try:
            look()
        except Phi3VError as error:
            found += error.problems
    return found + size_problems(settings)


def size_problems(settings: Settings) -> list[str]:
    """What in the settings the model's own sizes forbid; only config.json is read."""
    found: list[str] = []
    for look in (require_heads_divide, _require_in_context):
        try:
            look(settings)
        except ConfigError as error:
            found += error.problems
    return found


def _require_in_context(settings: Settings) -> None:
    """Raises ConfigError when a row is longer than the positions that the model was made for."""
    wanted, most = settings.data.row_length_tokens, read_config(settings.model.path)["max_position_embeddings"]
    if wanted > most:
        raise ConfigError(
            f"`data.row_length_tokens` is {wanted:,}, but the model's context ends at {most:,} tokens "
            f"(max_position_embeddings in config.json): set data.row_length_tokens={most}"
        )


def require_heads_divide(settings: Settings) -> None:
    """Raises ConfigError when ranks that share a row cannot share its attention heads."""
    size, config = settings.parallel.sequence, read_config(settings.model.path)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    if size not in (possible := group_sizes(heads, kv_heads)):
        raise ConfigError(
            f"`parallel.sequence` is {size}, but the model's {heads} attention heads ({kv_heads} of keys and values) "
            f"cannot be divided among so many ranks: take one of {', '.join(map(str, possible))}"
        )


def partitioned_model(settings: Settings, backend: Backend, ds_config: dict[str, Any]) -> Phi3VForCausalLM:
    """The model under ZeRO-3: weights read, parts frozen or adapted as asked. All ranks call this together."""
    config, longrope = read_config(settings.model.path), settings.model.longrope
    model = zero.build_partitioned(lambda: Phi3VForCausalLM(config, longrope, backend), ds_config)
    weights = initial_weights(settings.model.path, settings.model.init_from, settings.run.seed)
    load_weights(model, weights)
    choose_trained(model, settings.train, settings.run.seed)
    choice = settings.model
    model.set_gradient_checkpointing(
        choice.gradient_checkpointing, choice.vision_chunk_crops, choice.mlp_chunk_tokens,
        host_activations(settings, Topology.from_environment().device, config["hidden_size"]),
    )  # fmt: skip
    zero.gather_whole(model, FeedForward)
    return model


def host_activations(settings: Settings, device: torch.device, hidden_size: int) -> HostActivations | None:
    """Host memory for what decoder layers begin with, none taken yet; None: it stays where it is."""
    if not settings.model.offload_activations or _why_not_offloaded(settings, device):
        return None
    num_tokens = -(-settings.data.row_length_tokens // settings.parallel.sequence)
    return HostActivations(num_tokens * hidden_size * compute_dtype(settings.model.dtype, device).itemsize)


def chosen_backend(settings: Settings, device: torch.device) -> Backend:
    """Who attends on this device. Raises ConfigError when the one asked for cannot."""
    dtype = compute_dtype(settings.model.dtype, device)
    return choose(settings.model.attention, device, dtype, head_dim(read_config(settings.model.path)))


def proven_backend(settings: Settings, device: torch.device) -> Backend:
    """The same, shown to keep documents apart at the model's sizes."""
    backend, dtype = chosen_backend(settings, device), compute_dtype(settings.model.dtype, device)
    check_isolation(backend, read_config(settings.model.path), device, dtype, settings.data.row_length_tokens)
    return backend


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`model.dtype` on this device."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if wanted == "bf16" or wanted == "auto" and has_bf16 else torch.float32


def describe(settings: Settings, device: torch.device) -> list[str]:
    """What will be trained and who attends, and settings that have no effect in this run."""
    train, backend = settings.train, chosen_backend(settings, device)
    parts = train.parts.model_dump()
    lora = f" · LoRA rank {train.lora.rank}, alpha {train.lora.alpha}" if "lora" in parts.values() else ""
    start = f" · begins with {settings.model.init_from}" if settings.model.init_from else ""
    lines = [f"train    {', '.join(f'{part}: {how}' for part, how in parts.items())}{lora}{start}"]
    lines.append(f"attend   {backend.name}, {backend.why}")
    given = train.learning_rate.model_fields_set
    idle = {f"train.learning_rate.{part}": f"{part} is frozen" for part in sorted(given) if parts[part] == "frozen"}
    if not lora and "lora" in train.model_fields_set:
        idle["train.lora"] = "no part is set to lora"
    if not settings.model.gradient_checkpointing:
        chunks = sorted({"vision_chunk_crops", "mlp_chunk_tokens"} & settings.model.model_fields_set)
        idle |= {f"model.{name}": "`model.gradient_checkpointing` is off" for name in chunks}
    if settings.model.offload_activations and (why := _why_not_offloaded(settings, device)):
        idle["model.offload_activations"] = why
    if settings.parallel.nvme and not zero.uses_nvme(settings.parallel.deepspeed):
        idle["parallel.nvme"] = f"{settings.parallel.deepspeed} keeps nothing on a disk"
    return lines + [f"note     `{key}` has no effect: {why}" for key, why in idle.items()]


def _why_not_offloaded(settings: Settings, device: torch.device) -> str:
    """What keeps activations that are to go to host memory from going there; empty when nothing does."""
    if not settings.model.gradient_checkpointing:
        return "`model.gradient_checkpointing` is off, and what it would keep is all there is to offload"
    return "" if device.type == "cuda" else "there is no GPU, so activations are in host memory as they are"


def pinned_start(settings: Settings) -> str | None:
    """`model.init_from` as this run's first attempt understood it: another run's newest checkpoint of that time.

    Raises:
        CheckpointError: the other run has no checkpoint, or this run's config.yaml cannot be read.
    """
    init_from, config = settings.model.init_from, settings.run.folder / "config.yaml"
    if init_from is None:
        return None
    recorded = recorded_settings(config)["model"]["init_from"] if config.is_file() else None
    same = recorded is not None and Path(init_from) in Path(recorded).parents
    return recorded if same else pinned(init_from)


def _require_longrope_said(settings: Settings, start: str | None) -> None:
    """A model trained under one LongRoPE rule does not go on under another because nobody said anything."""
    rule, recorded = settings.model.longrope, trained_rule(settings.model.path, start)
    if recorded != rule and "longrope" not in settings.model.model_fields_set:
        raise ConfigError(
            f"`model.longrope` is not set, but {start or settings.model.path} was trained under "
            f"{recorded}: write model.longrope={recorded} to go on so, or model.longrope={rule} to change it"
        )
