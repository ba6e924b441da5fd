"""A conversation longer than a row → one that fits, by the policy that `data.fit` names.

What comes in: turns, and the size of each picture that they show. What goes out: `Fitted`, the ids and labels of what
will be trained; longer than a row only if it is to be left out. Surprise: answers are never cut, by no policy. A model
trained on half an answer learns to stop early, and one trained without `<|end|>` never to stop.

    drop            nothing is changed; what is longer than a row is left out
    fewer_crops     all pictures of the sample are cut with the greatest smaller `num_crops` at which the whole fits
    truncate_text   words of its user and system turns are left out

The rule of `truncate_text`: a text is what stands between two pictures, or between one and the end of its turn. The
longest texts are shortened to one common length, each in its middle, where "…" then stands, because the question is at
the beginning or at the end. A text of up to `MIN_TEXT_TOKENS` stays as it is. Answers, pictures, roles and the ends of
turns are never touched. What cannot be made to fit stays whole, and is left out as with `drop`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from phi3v_dist.data.chat import ANSWER_ROLE, ChatTokenizer, join_texts
from phi3v_dist.data.crops import CropLayout
from phi3v_dist.data.samples import Message
from phi3v_dist.errors import DataError

MIN_TEXT_TOKENS = 16
GAP = "…"
GAP_TOKENS = 4  # room kept for it: at most three bytes and a space
_BROKEN_END = re.compile(r"(?<=\s)\S{1,32}\Z")  # of a word cut in two; longer is no word, or a script without spaces
_BROKEN_START = re.compile(r"\A\S{1,32}(?=\s)")

SizesWH = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class FitPolicy:
    """What becomes of a conversation longer than `limit_tokens`; without a limit, nothing."""

    name: Literal["drop", "fewer_crops", "truncate_text"] = "drop"
    limit_tokens: int | None = None

    @property
    def digest(self) -> str:
        """Of what decides the ids. `drop` changes none, so lengths measured under it serve rows of any length."""
        return "" if self.name == "drop" else f"{self.name} {self.limit_tokens}"


NO_LIMIT = FitPolicy()


@dataclass(frozen=True)
class Fitted:
    """A conversation as it will be encoded.

    layouts: of its pictures, in reading order. full_tokens: its length before anything was cut.
    """

    messages: tuple[Message, ...]
    layouts: tuple[CropLayout, ...]
    ids: list[int]
    labels: list[int]
    full_tokens: int

    @property
    def image_tokens(self) -> list[int]:
        return [layout.num_tokens for layout in self.layouts]


def fit(
    messages: Sequence[Message], sizes_wh: SizesWH, num_crops: int, chat: ChatTokenizer, policy: FitPolicy
) -> Fitted:
    """The conversation, cut as the policy says if it must be.

    Args:
        sizes_wh: of the pictures in reading order.

    Raises:
        DataError: a picture cannot be cut into crops, or text cannot be encoded.
    """
    layouts = tuple(CropLayout.of(*size_wh, num_crops) for size_wh in sizes_wh)
    ids, labels = chat.ids_and_labels(messages, [layout.num_tokens for layout in layouts])
    whole = Fitted(tuple(messages), layouts, ids, labels, full_tokens=len(ids))
    if policy.limit_tokens is None or len(ids) <= policy.limit_tokens or policy.name == "drop":
        return whole
    if policy.name == "fewer_crops":
        return _with_fewer_crops(whole, sizes_wh, num_crops, chat, policy.limit_tokens) or whole
    return _with_shorter_texts(whole, chat, policy.limit_tokens) or whole


def _with_fewer_crops(
    whole: Fitted, sizes_wh: SizesWH, num_crops: int, chat: ChatTokenizer, limit_tokens: int
) -> Fitted | None:
    room = limit_tokens - (len(whole.ids) - sum(whole.image_tokens))
    for fewer in range(num_crops - 1, 0, -1):
        try:
            layouts = tuple(CropLayout.of(*size_wh, fewer) for size_wh in sizes_wh)
        except DataError:  # too long and thin for so few crops, and for any fewer
            return None
        image_tokens = [layout.num_tokens for layout in layouts]
        if sum(image_tokens) <= room:
            ids, labels = chat.ids_and_labels(whole.messages, image_tokens)
            return Fitted(whole.messages, layouts, ids, labels, whole.full_tokens)
    return None


def _with_shorter_texts(whole: Fitted, chat: ChatTokenizer, limit_tokens: int) -> Fitted | None:
    turns = [join_texts(message.parts) for message in whole.messages]
    places = [
        (turn, i)
        for turn, parts in enumerate(turns)
        for i, part in enumerate(parts)
        if isinstance(part, str) and whole.messages[turn].role != ANSWER_ROLE
    ]
    texts = [str(turns[turn][i]) for turn, i in places]
    spans = chat.token_spans(texts)
    room = limit_tokens - len(whole.ids) + sum(map(len, spans))
    longest = _common_length([len(text_spans) for text_spans in spans], room)
    while longest >= MIN_TEXT_TOKENS:
        for (turn, i), text, text_spans in zip(places, texts, spans, strict=True):
            turns[turn][i] = text if len(text_spans) <= longest else _without_middle(text, text_spans, longest)
        messages = tuple(Message(m.role, tuple(parts)) for m, parts in zip(whole.messages, turns, strict=True))
        ids, labels = chat.ids_and_labels(messages, whole.image_tokens)
        if len(ids) <= limit_tokens:
            return Fitted(messages, whole.layouts, ids, labels, whole.full_tokens)
        longest -= len(ids) - limit_tokens  # texts cut anew can fall into a few tokens more than they had there
    return None


def _common_length(lengths: Sequence[int], room: int) -> int:
    """The greatest length to which the longer ones can be cut so that the sum is at most `room`."""
    rest = sorted(lengths)
    while rest and rest[0] * len(rest) <= room:
        room -= rest.pop(0)
    return room // len(rest) if rest else max(lengths, default=0)


def _without_middle(text: str, spans: Sequence[tuple[int, int]], num_tokens: int) -> str:
    """Beginning and end of a text, together about `num_tokens` long, whole words where it has spaces."""
    kept = num_tokens - GAP_TOKENS
    head, tail = text[: spans[kept - kept // 2 - 1][1]], text[spans[-(kept // 2)][0] :]
    return _BROKEN_END.sub("", head) + GAP + _BROKEN_START.sub("", tail)
