"""Losses of validation samples as they are computed → the 16 of highest mean, token by token.

What comes in: samples and the losses of their learned tokens, rank by rank. What goes out: what a person reads to see
which answers the model finds unlikely, and at which word. Surprise: a high mean is often short. One odd token of three
weighs more than ten of a hundred, so look at wrong labels first.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import Message

NUM_KEPT = 16
BETWEEN_ANSWERS = "\n"

TokenLoss = tuple[str, float | None]


@dataclass
class HighestLoss:
    """Of one rank. places: sample → where it comes among all, which decides between equal losses."""

    processor: Phi3VProcessor
    places: dict[int, int]
    _kept: list[tuple[float, int, int, Sequence[Message], list[float]]] = field(default_factory=list)

    def add(self, sample_id: int, messages: Sequence[Message], losses: Float[Tensor, " targets"]) -> None:
        """losses: of the learned tokens, in order; a sample without any is none of the highest."""
        if not len(losses):
            return
        mean = losses.double().sum().item() / len(losses)  # as the row's own
        rank = math.inf if math.isnan(mean) else mean  # that is what one wants to see first
        one = (rank, -self.places[sample_id], sample_id, messages, losses.tolist())
        if len(self._kept) < NUM_KEPT:
            heapq.heappush(self._kept, one)
        else:
            heapq.heappushpop(self._kept, one)

    def tokens(self) -> dict[int, list[TokenLoss]]:
        """Sample → its learned tokens with their losses; None: the loss is not finite, or nothing is learned there."""
        return {
            sample_id: _with_losses(self.processor.learned_texts(messages), losses)
            for _, _, sample_id, messages, losses in self._kept
        }


def _with_losses(answers: Sequence[Sequence[str]], losses: Sequence[float]) -> list[TokenLoss]:
    rest = iter(losses)
    found: list[TokenLoss] = []
    for answer in answers:
        if found:
            found.append((BETWEEN_ANSWERS, None))
        for text in answer:
            loss = next(rest)
            found.append((text, round(loss, 4) if math.isfinite(loss) else None))
    return found
