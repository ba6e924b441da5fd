"""Logits → the next token: the best one, or one drawn by chance that only the sample, the step and the seed decide.

What comes in: logits of the rows under generation. What goes out: a token id for each. Surprise: no random generator is
used. One uniform number is made from (seed, sample id, step), so that an answer is the same in any batch, on any rank
and in any order, wherever its logits are, and nobody else's random numbers move.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from phi3v_dist.errors import ConfigError

UNIFORM_BITS = 53  # of a number from 0 to 1 in float64


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: what logits are divided by before the draw; 0 takes the best one and draws nothing.
    top_p: the draw is among the likeliest tokens that together have at least this probability (nucleus sampling,
        Holtzman et al., 2019).
    seed: another one gives other draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            problems.append(f"temperature is {self.temperature}: 0 for the best token each time, or a number above 0")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}: it is a probability, above 0 and at most 1 (which is no limit)")
        if not problems and self.top_p < 1 and self.temperature == 0:
            problems.append(
                f"top_p is {self.top_p}, but at temperature 0 nothing is drawn: raise that, or leave this out"
            )
        if problems:
            raise ConfigError(problems)

    def choose(self, logits: Float[Tensor, "rows vocab"], sample_ids: Sequence[int], step: int) -> list[int]:
        """The next token of every row; `step` is how many were chosen before it."""
        if self.temperature == 0:
            return list(logits.argmax(-1).tolist())
        draws = torch.tensor([self._uniform(sample_id, step) for sample_id in sample_ids], dtype=torch.float64)
        scores = logits.to("cpu", torch.float64)  # other devices round otherwise, and a draw may hang on that
        best_is_0 = scores - scores.amax(-1, keepdim=True)  # divided first, a small temperature would overflow
        probabilities, ids = (best_is_0 / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        below = probabilities.cumsum(-1)
        number = (below < self.top_p).sum(-1).clamp(max=ids.shape[1] - 1)[:, None]  # the last one that may be drawn
        place = torch.searchsorted(below, draws[:, None] * below.gather(1, number), right=True).minimum(number)
        return list(ids.gather(1, place)[:, 0].tolist())

    def _uniform(self, sample_id: int, step: int) -> float:
        """In [0, 1)."""
        digest = hashlib.blake2b(f"{self.seed} {sample_id} {step}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> (64 - UNIFORM_BITS)) / 2**UNIFORM_BITS


GREEDY = Sampling()
