"""Encoded `Example` → text in which a person sees what will be trained.

What comes in: the ids and labels that the model will get. What goes out: rich `Text`. Surprise: the words are decoded
from the ids, never taken from the source, so that a mistake of template, tokenizer or labels shows.

    ⟦ … ⟧          trained; green on a terminal, all else dim
    [<|user|>]     one token of the template; the same letters without brackets are words of the data
    [image 1: …]   a picture
"""

import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from rich.text import Text
from transformers import PreTrainedTokenizerFast

from phi3v_dist.data.batch import Example
from phi3v_dist.model.attention import IGNORE
from phi3v_dist.model.vision import num_crops_of

TRAINED, UNTRAINED, TEMPLATE = "green", "dim", "cyan"
LEGEND = f"[{TRAINED}]⟦trained⟧[/] [{UNTRAINED}]not trained[/] [{TEMPLATE}]\\[template][/]"  # rich markup


class _Stretch(NamedTuple):
    """Ids that are shown together. picture: its number; 0 for text."""

    ids: list[int]
    trained: bool
    picture: int
    is_template: bool


def render(example: Example, tokenizer: PreTrainedTokenizerFast) -> Text:
    """The whole example, line breaks as line breaks."""
    text = Text()
    for trained, stretches in groupby(_stretches(example, tokenizer), key=lambda stretch: stretch.trained):
        text.append("⟦" if trained else "", TRAINED)
        for stretch in stretches:
            if stretch.picture:
                text.append(_picture_mark(example, stretch.picture, len(stretch.ids)), TEMPLATE)
            elif stretch.is_template:
                marks = "".join(f"[{token}]" for token in tokenizer.convert_ids_to_tokens(stretch.ids))
                text.append(marks, f"bold {TRAINED}" if trained else TEMPLATE)
            else:
                text.append(_visible(str(tokenizer.decode(stretch.ids))), TRAINED if trained else UNTRAINED)
        text.append("⟧" if trained else "", TRAINED)
    return text


def trained_share(trained: int, tokens: int) -> str:
    """`12 of 346 tokens trained (3.5 %)`"""
    return f"{trained:,} of {tokens:,} tokens trained ({100 * trained / max(1, tokens):.1f} %)"


def _stretches(example: Example, tokenizer: PreTrainedTokenizerFast) -> Iterator[_Stretch]:
    pairs = zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
    special = tokenizer.added_tokens_decoder  # words of the data never have these ids (chat.py)
    keyed = groupby(pairs, key=lambda pair: (pair[1] != IGNORE, max(0, -pair[0]), pair[0] in special))
    for (trained, picture, is_template), stretch in keyed:
        yield _Stretch([token_id for token_id, _ in stretch], trained, picture, is_template)


def _picture_mark(example: Example, number: int, num_tokens: int) -> str:
    height, width = example.image_sizes[number - 1].tolist()
    return f"[image {number}: {num_tokens:,} tokens, {width}x{height} px, {num_crops_of(height, width)} crops]"


def _visible(words: str) -> str:
    """Control characters and the like spelled out, so that none of them reaches the terminal."""
    return "".join(
        char if char == "\n" or unicodedata.category(char)[0] != "C" else char.encode("unicode_escape").decode()
        for char in words
    )
