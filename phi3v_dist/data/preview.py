"""Encoded `Example` → text in which a person sees what will be trained.

What comes in: the ids and labels that the model will get. What goes out: rich `Text`. Surprise: the words are decoded
from the ids, never taken from the source, so that a mistake of template, tokenizer or labels shows.

    ⟦ … ⟧          trained; green on a terminal, all else dim
    [<|user|>]     one token of the template; the same letters without brackets are words of the data
    [image 1: …]   a picture
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Literal, NamedTuple

from rich.text import Text
from transformers import PreTrainedTokenizerFast

from phi3v_dist.data.batch import Example
from phi3v_dist.model.attention import IGNORE
from phi3v_dist.model.placement import num_crops_of
from phi3v_dist.printable import printable

TRAINED, UNTRAINED, TEMPLATE = "green", "dim", "cyan"
LEGEND = Text.assemble(("⟦trained⟧", TRAINED), " ", ("not trained", UNTRAINED), " ", ("[template]", TEMPLATE))


class Stretch(NamedTuple):
    """Neighbouring tokens that are shown alike. `text` has no control character but line breaks."""

    text: str
    trained: bool
    kind: Literal["words", "template", "picture"]


def stretches(example: Example, tokenizer: PreTrainedTokenizerFast) -> Iterator[Stretch]:
    """The whole example, in order: runs of words, single tokens of the template, and pictures."""
    pairs = zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
    special = tokenizer.added_tokens_decoder  # words of the data never have these ids (chat.py)
    keyed = groupby(pairs, key=lambda pair: (pair[1] != IGNORE, max(0, -pair[0]), pair[0] in special))
    for (trained, picture, is_template), group in keyed:
        ids = [token_id for token_id, _ in group]
        if picture:
            yield Stretch(_picture_mark(example, picture, len(ids)), trained, "picture")
        elif is_template:
            yield from (Stretch(token, trained, "template") for token in tokenizer.convert_ids_to_tokens(ids))
        else:
            yield Stretch(printable(str(tokenizer.decode(ids)), keep="\n"), trained, "words")


def render(example: Example, tokenizer: PreTrainedTokenizerFast) -> Text:
    """The whole example, line breaks as line breaks."""
    text = Text()
    for trained, group in groupby(stretches(example, tokenizer), key=lambda stretch: stretch.trained):
        text.append("⟦" if trained else "", TRAINED)
        for stretch in group:
            if stretch.kind == "words":
                text.append(stretch.text, TRAINED if trained else UNTRAINED)
            else:
                bold = f"bold {TRAINED}" if trained and stretch.kind == "template" else TEMPLATE
                text.append(f"[{stretch.text}]", bold)
        text.append("⟧" if trained else "", TRAINED)
    return text


def trained_share(trained: int, tokens: int) -> str:
    """`12 of 346 tokens trained (3.5 %)`"""
    return f"{trained:,} of {tokens:,} tokens trained ({100 * trained / max(1, tokens):.1f} %)"


def _picture_mark(example: Example, number: int, num_tokens: int) -> str:
    height, width = example.image_sizes[number - 1].tolist()
    return f"image {number}: {num_tokens:,} tokens, {width}x{height} px, {num_crops_of(height, width)} crops"
