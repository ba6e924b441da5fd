"""The backend of a run, on its real head sizes → proof that documents of a row do not see each other, or an error.

What comes in: the backend that was chosen, the model's config, device and type. What goes out: what was measured.
Surprise: it runs with packing off too, for an evaluation packs its samples whatever training does. A kernel that leaks
trains without any sign of it; only scores on single samples are then worse than they should be.

Every document of a packed row is changed in turn: its own outputs must move, all others must stay equal to the last
bit. Gradients of one document's outputs must be zero at all others. And the outputs must be those of `eager`.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phi3v_dist.errors import ConfigError
from phi3v_dist.model.attention import Layout, attend_documents
from phi3v_dist.model.backends import Backend

MAX_TOKENS = 256  # the longest document spans several blocks of every kernel (64 to 128 tokens)
SHARES = (0.30, 0.02, 0.45)  # of the row, and a last document of what is left: short beside long, borders inside blocks
# Largest difference from fp32 maths on normal values, which reach 4. Measured on a CPU, 32 heads of 96, sdpa and eager:
# fp32 7e-7 and 0, bf16 1.0e-2 and 2.2e-2 (half a unit at 4 is 7.8e-3), fp16 1.3e-3 and 2.4e-3. In 0.2 to 1.2 s.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Isolation:
    """What the test measured: documents in the row, largest difference from eager, and how long it took."""

    num_documents: int
    eager_difference: float
    seconds: float


def check_isolation(
    backend: Backend, config: dict[str, Any], device: torch.device, dtype: torch.dtype, row_length_tokens: int
) -> Isolation:
    """Change one document after another and look at the rest.

    Args:
        config: official config.json, for heads and their width.
        row_length_tokens: of the run; the test's row is no longer than that, nor than `MAX_TOKENS`.

    Raises:
        ConfigError: a document sees another one, the backend computes something else, or it does not run.
    """
    began = time.perf_counter()
    try:
        found = _measure(backend, config, device, dtype, _lengths(min(row_length_tokens, MAX_TOKENS)))
    except (RuntimeError, TypeError) as error:  # a kernel that does not know these sizes, or the GPU's own errors
        cause = " ".join(str(error).split())
        raise ConfigError(_refusal(backend, f"does not run on the model's sizes: {cause}")) from error
    return Isolation(*found, time.perf_counter() - began)


def _measure(
    backend: Backend, config: dict[str, Any], device: torch.device, dtype: torch.dtype, lengths: list[int]
) -> tuple[int, float]:
    heads = config["num_attention_heads"]
    shape = (1, heads, sum(lengths), config["hidden_size"] // heads)
    kv_shape = (1, config.get("num_key_value_heads", heads), *shape[2:])
    layout, scaling = Layout.of(lengths).to(device), shape[3] ** -0.5
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.randn(s, generator=generator).to(device, dtype) for s in (shape, kv_shape, kv_shape)]

    def attend(row: list[Tensor], backend: Backend = backend) -> Tensor:
        query, key, value = row
        return attend_documents(query, key, value, layout, backend, scaling)

    row, other = [t.requires_grad_() for t in draw()], draw()
    whole = attend(row)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for number, (length, end) in enumerate(zip(lengths, ends, strict=True), start=1):
        inside = torch.zeros(shape[2], dtype=torch.bool, device=device)
        inside[end - length : end] = True
        changed = [torch.where(inside[:, None], new, old.detach()) for new, old in zip(other, row, strict=True)]
        with torch.no_grad():
            moved = (attend(changed) != whole)[0].flatten(1).any(1)
        name = f"document {number} of {len(lengths)} (tokens {end - length} to {end - 1})"
        if (moved & ~inside).any():
            at = int((moved & ~inside).nonzero()[0])
            raise ConfigError(_refusal(backend, f"lets documents see each other: changing {name} moved token {at}"))
        if not moved[inside].all():
            raise ConfigError(_refusal(backend, f"does not read its input: changing {name} left some of it as it was"))
        gradients = torch.autograd.grad(whole[:, inside].float().square().sum(), row, retain_graph=True)
        if any(gradient[:, :, ~inside].any() for gradient in gradients):
            raise ConfigError(_refusal(backend, f"lets documents see each other: {name} sends gradients to others"))
    exact = attend([t.detach().float() for t in row], Backend("eager"))
    difference = (whole.detach().float() - exact).abs().max().item()
    if not difference <= TOLERANCES[dtype]:
        limit = f"{difference:.2g} from plain attention, more than {TOLERANCES[dtype]:g} for {dtype}"
        raise ConfigError(_refusal(backend, f"computes something else: its outputs are up to {limit}"))
    return len(lengths), difference


def _lengths(num_tokens: int) -> list[int]:
    """Documents that fill a row of this many tokens; one of few tokens, of a single one where the row is short."""
    lengths = [max(1, int(share * num_tokens)) for share in SHARES]
    return [*lengths, num_tokens - sum(lengths)]


def _refusal(backend: Backend, what: str) -> str:
    change = "model.attention=sdpa, or install another build of flash-attn" if backend.kernel else "another backend"
    return f"`model.attention`: {backend.name} {what}; set {change}"
