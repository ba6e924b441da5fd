"""Judged answers → the same scores for parts of them: by a field of the samples, or by position in the document.

What comes in: what each answer was worth, and `eval.by`. What goes out: metrics such as
`eval/by_depth/from_0_to_0_25/field_em/title`. Surprise: `position` is no field of a sample but of each learned token
in it, so under that name only the loss is split.

A part without samples has no metrics. Samples without the field, or outside all bins, are in no part; `complaints`
says how many.
"""

import bisect
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from phi3v_dist.evaluate.score import AnswerScore, summarize
from phi3v_dist.model.attention import Layout

POSITION = "position"
MAX_VALUES = 24  # a field with more different values names samples, not parts of them
KEPT = re.compile(r"samples|field_em/.*|.*_mae")  # of an answer's metrics, those worth a chart per part

Rule = Sequence[int | float] | Literal["values"]
Value = str | int | float


@dataclass(frozen=True)
class Judged:
    """What one sample brings to the metrics.

    score, blind: of its answer, and of the one given to another sample's pictures.
    values: field → what the sample has there, for the fields of `eval.by`.
    loss_sum, label_tokens: over its learned tokens.
    by_position: part → the same two for the learned tokens that stand there.
    """

    score: AnswerScore
    blind: AnswerScore | None
    values: dict[str, Value]
    loss_sum: float
    label_tokens: int
    by_position: dict[str, tuple[float, int]]


@dataclass(frozen=True)
class LearnedTokens:
    """Of one document: where in it each learned token stands (from 0), and its loss."""

    positions: Int[Tensor, " targets"]
    losses: Float[Tensor, " targets"]

    def sums(self, edges: Rule | None) -> dict[str, tuple[float, int]]:
        """Part → summed loss and number of tokens."""
        sums: dict[str, tuple[float, int]] = {}
        for position, loss in zip(self.positions.tolist(), self.losses.tolist(), strict=True):
            part = part_of(position, edges) if edges else None
            if part is not None:
                total, count = sums.get(part, (0.0, 0))
                sums[part] = (total + loss, count + 1)
        return sums


def of_documents(layout: Layout, token_losses: Float[Tensor, " targets"]) -> list[LearnedTokens]:
    """The losses of a row, document by document; a document without labels has none."""
    at, losses = layout.target_positions[: layout.num_targets].cpu(), token_losses[: layout.num_targets].cpu()
    borders = layout.cu_seqlens.long().cpu()
    counts = (at[None] < borders[1:, None]).sum(1).diff(prepend=borders.new_zeros(1)).tolist()
    starts = borders[:-1].tolist()
    pieces = zip(starts, at.split(counts), losses.split(counts), strict=True)
    return [LearnedTokens(targets + 1 - start, some) for start, targets, some in pieces]


def part_of(value: Value, rule: Rule) -> str | None:
    """The part a value falls into, as a piece of a metric's name; None: into none."""
    if rule == "values":
        return f"is_{_plain(str(value))}"
    if isinstance(value, str | bool) or not rule[0] <= value <= rule[-1]:
        return None
    number = min(bisect.bisect_right(rule, value), len(rule) - 1)  # type: ignore[arg-type]
    return f"from_{_number(rule[number - 1])}_to_{_number(rule[number])}"  # type: ignore[arg-type]


def split_metrics(judged: Sequence[Judged], by: Mapping[str, Rule]) -> dict[str, float]:
    """Scores of every part."""
    metrics: dict[str, float] = {}
    for field, rule in by.items():
        if field == POSITION:
            metrics |= _loss_by_position(judged, rule)
            continue
        for part, members in _parts(judged, field, rule).items():
            place = f"by_{field}/{part}"
            metrics |= _loss([(one.loss_sum, one.label_tokens) for one in members], place)
            blind = [one.blind for one in members if one.blind]
            for prefix, scores in (("eval", [one.score for one in members]), ("eval/blind", blind)):
                found = summarize(scores, "")
                kept = {name[1:]: value for name, value in found.items() if KEPT.fullmatch(name[1:])}
                metrics |= {f"{prefix}/{place}/{name}": value for name, value in kept.items()}
    return metrics


def complaints(judged: Sequence[Judged], by: Mapping[str, Rule]) -> list[str]:
    """What `eval.by` asks for and the samples do not have, one message per field."""
    found = []
    for field, rule in by.items():
        values = [one.values[field] for one in judged if field in one.values]
        placed = sum(part_of(value, rule) is not None for value in values)
        different = len(set(map(str, values)))
        if field == POSITION or not judged:
            continue
        if not values:
            found.append(f"`eval.by.{field}`: no sample has such a field in its JSON, so nothing is split by it")
        elif rule == "values" and different > MAX_VALUES:
            found.append(
                f"`eval.by.{field}`: it has {different} different values, more than {MAX_VALUES}, so nothing is split "
                "by it; give edges of bins for a number"
            )
        elif placed < len(judged):
            found.append(
                f"`eval.by.{field}`: {len(judged) - placed} of {len(judged)} samples are in no part: they lack the "
                "field, or have a value outside the bins"
            )
    return found


def _parts(judged: Sequence[Judged], field: str, rule: Rule) -> dict[str, list[Judged]]:
    """Part → its samples, in the order of the values."""
    having = [one for one in judged if field in one.values]
    if rule == "values" and len({str(one.values[field]) for one in having}) > MAX_VALUES:
        return {}
    parts: dict[str, list[Judged]] = {}
    for one in having:
        part = part_of(one.values[field], rule)
        if part is not None:
            parts.setdefault(part, []).append(one)
    return {part: parts[part] for part in sorted(parts, key=lambda part: _place(part, rule))}


def _place(part: str, rule: Rule) -> tuple[int, str]:
    """By which parts are sorted: bins by their edges, values by their names."""
    if rule == "values":
        return 0, part
    names = [f"from_{_number(edge)}_to_" for edge in rule]  # type: ignore[arg-type]
    return next(place for place, name in enumerate(names) if part.startswith(name)), part


def _loss_by_position(judged: Sequence[Judged], edges: Rule) -> dict[str, float]:
    sums: dict[str, list[tuple[float, int]]] = {}
    for one in judged:
        for part, pair in one.by_position.items():
            sums.setdefault(part, []).append(pair)
    ordered = sorted(sums, key=lambda part: _place(part, edges))
    return {name: value for part in ordered for name, value in _loss(sums[part], f"by_{POSITION}/{part}").items()}


def _loss(pairs: Sequence[tuple[float, int]], place: str) -> dict[str, float]:
    """Mean over learned tokens of (summed loss, number of tokens)."""
    num_tokens = sum(count for _, count in pairs)
    return {f"eval/{place}/loss": sum(total for total, _ in pairs) / num_tokens} if num_tokens else {}


def _number(edge: int | float) -> str:
    """A number as a piece of a metric's name: 0.25 is `0_25`."""
    return f"{edge:.10g}".replace("e-", "e_minus_").replace("-", "minus_").replace("+", "").replace(".", "_")


def _plain(text: str) -> str:
    """A text as a piece of a metric's name; what that cannot spell is told apart by a digest."""
    plain = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    return plain if plain and text.isascii() else f"{plain}_{hashlib.sha256(text.encode()).hexdigest()[:6]}".strip("_")
