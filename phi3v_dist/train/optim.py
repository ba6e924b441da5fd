"""Parameters → AdamW groups by part of the model, and the learning rate of a step.

What comes in: the model's named parameters and `train.learning_rate`. What goes out: an AdamW with a group per part,
with and without weight decay. Surprise: the schedule is a pure function of the step, so there is nothing to save or
restore.
"""

import math

import torch
from torch import nn

from phi3v_dist.config import TrainSettings
from phi3v_dist.model.adapters import part_of

NOT_DECAYED = ("norm", "_GN", "class_embedding", "position_embedding", "bias")
MOST_WARMUP_STEPS = 100  # by default


def is_decayed(name: str) -> bool:
    """Weight decay is for matrices and word embeddings only."""
    return not any(word in name.split(".")[-1] or word in name.split(".")[-2] for word in NOT_DECAYED)


def build_optimizer(model: nn.Module, train: TrainSettings, on_host: bool = False) -> torch.optim.AdamW:
    """torch's AdamW (no compiled extension) over trainable parameters, grouped as (part, decayed).

    on_host: its states will be on the CPU. There torch's fused form makes one pass over memory, where the usual one
    makes many; the update is the same but for rounding.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), is_decayed(name)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "part": part, "lr": 0.0, "weight_decay": train.weight_decay if decayed else 0.0}
            for (part, decayed), parameters in groups.items()
        ],
        betas=train.betas,
        eps=train.eps,
        fused=on_host or None,
    )


def learning_rates(step: int, num_steps: int, train: TrainSettings) -> dict[str, float]:
    """Learning rate per part in step 1 … num_steps: linear warmup, then a cosine to `min_lr_frac` of the peak."""
    warmup_steps = min(MOST_WARMUP_STEPS, num_steps // 10) if train.warmup_steps is None else train.warmup_steps
    if step <= warmup_steps:
        factor = step / warmup_steps
    else:
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        factor = train.min_lr_frac + (1 - train.min_lr_frac) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return {part: peak * factor for part, peak in train.learning_rate.model_dump().items()}
