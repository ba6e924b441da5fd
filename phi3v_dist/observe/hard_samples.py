"""The samples with the highest loss → cards: picture, question, and the answer's tokens coloured by their loss.

What comes in: `RUN/eval/step-NNNNNN/highest_loss.jsonl` of the newest evaluation that has one. What goes out: cards.
Surprise: a token is a piece of a word and may be any text, markup included; it goes through the template's escaping
like all words of samples, and control characters are spelled out.
"""

import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v_dist.observe.gallery import picture_uri, shown
from phi3v_dist.observe.metrics import format_number
from phi3v_dist.observe.run_folder import Run, is_number, read_lines
from phi3v_dist.printable import printable

NAME = "highest_loss.jsonl"
MOST = 16
LEVELS = (0.5, 1.0, 2.0, 4.0)  # nats: a token at 4 was given a chance of 2 %
MOST_TOKENS = 400  # of one sample, around the worst of them


@dataclass(frozen=True)
class Token:
    """A piece of the text. level: 0 to 4 by `LEVELS`; None for one without a loss."""

    text: str
    level: int | None
    loss: str


@dataclass(frozen=True)
class HardSample:
    """One sample; `picture` is a data URI."""

    name: str
    loss: str
    picture: str | None
    prompt: str
    tokens: list[Token]
    is_cut: bool


def hard_samples(run: Run) -> tuple[int, list[HardSample]]:
    """(step of the evaluation, its samples, worst first); nothing where no evaluation wrote any."""
    for evaluation in reversed(run.evaluations):
        lines = read_lines(evaluation.folder / NAME, _is_sample, run.notes, MOST)
        if lines:
            lines.sort(key=lambda line: -line["loss"])
            return evaluation.step, [_card(line, evaluation.folder) for line in lines]
    return 0, []


def ranges() -> list[str]:
    """What the levels stand for."""
    between = [f"{low:g} – {high:g}" for low, high in zip(LEVELS, LEVELS[1:], strict=False)]
    return [f"below {LEVELS[0]:g}", *between, f"{LEVELS[-1]:g} and more"]


def _card(line: dict[str, Any], folder: Path) -> HardSample:
    tokens = line["tokens"]
    worst = max(range(len(tokens)), key=lambda place: tokens[place][1] or 0.0, default=0)
    first = max(0, min(worst - MOST_TOKENS // 2, len(tokens) - MOST_TOKENS))
    return HardSample(
        name=printable(f"{line['shard']} · {line['key']}"),
        loss=format_number(line["loss"]),
        picture=picture_uri(folder, line.get("thumbnail")),
        prompt=shown(line["prompt"]),
        tokens=[_token(text, loss) for text, loss in tokens[first : first + MOST_TOKENS]],
        is_cut=len(tokens) > MOST_TOKENS,
    )


def _token(text: str, loss: float | None) -> Token:
    words = printable(text, keep="\n\t")
    if loss is None:
        return Token(words, None, "")
    return Token(words, bisect.bisect_right(LEVELS, loss), format_number(loss))


def _is_sample(line: object) -> bool:
    return (
        isinstance(line, dict)
        and all(isinstance(line.get(name), str) for name in ("shard", "key", "prompt"))
        and is_number(line.get("loss"))
        and isinstance(line.get("thumbnail"), str | None)
        and isinstance(line.get("tokens"), list)
        and all(map(_is_token, line["tokens"]))
    )


def _is_token(token: object) -> bool:
    return (
        isinstance(token, list)
        and len(token) == 2
        and isinstance(token[0], str)
        and (token[1] is None or is_number(token[1]))
    )
