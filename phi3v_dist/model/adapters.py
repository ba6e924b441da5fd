"""What is trained: each part of the model in full, through low-rank adapters (LoRA), or not at all.

What comes in: a model whose parameters may be partitioned already, and `train.parts` and `train.lora`. What goes out:
the same model with `requires_grad` set and adapters in place. Surprise: peft only builds the adapter modules. Weights
keep their official names in checkpoints (`official_name`), so that a LoRA run is evaluated, exported and continued by
the code that does it for a full one.

LoRA: Hu et al. (2021); W is used as W + alpha / rank · B A. DoRA is refused (config.py): peft 0.21.2 takes the norm of
the base weight outside of that weight's module, where ZeRO-3 has released it. Tried: it fails when adapters are made.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from phi3v_dist.config import LoraSettings, TrainSettings
from phi3v_dist.errors import ConfigError
from phi3v_dist.parallel.partitions import full_shape, gathered, official_name
from phi3v_dist.watch import heartbeat

if TYPE_CHECKING:
    from peft import LoraConfig


VISION = "model.vision_embed_tokens.img_processor."
PROJECTOR = "model.vision_embed_tokens."
HEAD = "lm_head"
ADAPTER = "default"  # peft's name of the only adapter
DOWN, UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def part_of(name: str) -> str:
    """Official name of a parameter or module → `vision`, `projector` or `text`. Separators belong to the projector."""
    return "vision" if name.startswith(VISION) else "projector" if name.startswith(PROJECTOR) else "text"


def is_adapter(name: str) -> bool:
    return name.endswith((DOWN, UP))


def choose_trained(model: nn.Module, train: TrainSettings, seed: int) -> None:
    """Freeze what is not trained and put adapters where they are wanted; they begin as no change at all.

    Raises:
        ConfigError: a LoRA target matches no layer; all such are listed.
    """
    how = train.parts.model_dump()
    targets = lora_targets(model, train)
    if targets:
        from peft import inject_adapter_in_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same numbers on every rank
            inject_adapter_in_model(_peft_config(train.lora, targets), model, ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or how[part_of(name)] == "full")


def lora_targets(model: nn.Module, train: TrainSettings) -> list[str]:
    """Names of the linear layers that get an adapter: all of the `lora` parts, or those that `train.lora.targets` name.

    Raises:
        ConfigError: as `choose_trained`.
    """
    parts = [part for part, how in train.parts.model_dump().items() if how == "lora"]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != HEAD]
    found = [name for name in linear if part_of(name) in parts]
    if not parts or train.lora.targets is None:
        return found
    wanted = {target: [name for name in found if _matches(name, target)] for target in train.lora.targets}
    problems = []
    for target, names in wanted.items():
        elsewhere = sorted({part_of(name) for name in linear if _matches(name, target)})
        if not names and elsewhere:
            problems.append(
                f"`train.lora.targets` {target}: is in {', '.join(elsewhere)}, which `train.parts` does not set to lora"
            )
        elif not names and _matches(HEAD, target):
            problems.append(f"`train.lora.targets` {target}: the head computes losses and takes no adapter")
        elif not names:
            known = ", ".join(sorted({_short(name) for name in found}))
            problems.append(f"`train.lora.targets` {target}: matches no linear layer; there are {known}")
    for part in parts:
        if not problems and not any(part_of(name) == part for names in wanted.values() for name in names):
            problems.append(
                f"`train.parts.{part}` is lora, but `train.lora.targets` names none of its layers: freeze it"
            )
    if problems:
        raise ConfigError(problems)
    return sorted({name for names in wanted.values() for name in names}, key=linear.index)


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Official name and whole value of every weight, adapters added in. Collective when they are partitioned."""
    parameters = {official_name(name): parameter for name, parameter in model.named_parameters()}
    for name, parameter in parameters.items():
        if is_adapter(name):
            continue
        heartbeat.beat(name, kind="copy", work=math.prod(full_shape(parameter)))  # gathered one by one
        module = name.removesuffix(".weight")
        up, down = parameters.get(module + UP), parameters.get(module + DOWN)
        with gathered([p for p in (parameter, up, down) if p is not None]), torch.no_grad():
            if up is None or down is None:
                yield name, parameter.detach().clone()
            else:
                adapted: Any = model.get_submodule(module)
                yield name, merged(parameter, up, down, adapted.scaling[ADAPTER])


def merged(weight: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    """weight + scaling · up @ down, added in fp32, in the weight's type."""
    return (weight.float() + scaling * (up.float() @ down.float())).to(weight.dtype)


def write_adapter(folder: Path, tensors: dict[str, Tensor], lora: LoraSettings, base: Path) -> None:
    """peft's own layout, for `peft.PeftModel.from_pretrained(model, folder)`.

    Args:
        tensors: adapters by the names they have in a checkpoint.
        base: the model folder they were trained on.
    """
    config = _peft_config(lora, sorted({name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)}))
    config.base_model_name_or_path, config.inference_mode = str(base), True
    config.save_pretrained(str(folder))
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": t.contiguous() for name, t in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_config(lora: LoraSettings, targets: list[str]) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _short(name: str) -> str:
    """The last word of a layer's name, with the word before a mere number."""
    words = name.split(".")
    return ".".join(words[-2:]) if words[-1].isdigit() else words[-1]
