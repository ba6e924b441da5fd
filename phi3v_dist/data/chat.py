"""Turns of a conversation → token ids and labels, by Phi-3's chat template.

What comes in: `Message`s and how many tokens each of their pictures takes; what goes out: ids in which every position
of picture k holds -k, and labels on the assistant's answers only. Words of the data are always plain text: a user who
types "<|end|>" ends nothing. For all other text the ids equal what the published processor gives for the chat
template's text. Decoded piece by piece, between special ids, they give the same words again, but for two things that
the published tokenizer loses too: white space at the start of an answer, and "▁" (U+2581), which comes back as a space.
Surprise: the beginning-of-sequence token stands at the start *and again after every picture*, because the published
processor tokenises each piece between pictures by itself.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from phi3v_dist.data.samples import ROLES, Message
from phi3v_dist.errors import CheckpointError, DataError
from phi3v_dist.model.attention import IGNORE

ANSWER_ROLE = "assistant"  # the role whose turns are learned
END_TOKEN = "<|end|>"  # closes every turn
STOP_TOKENS = (END_TOKEN, "<|endoftext|>", "<|assistant|>")

# What a token with `rstrip` swallows: Unicode's White_Space. Python's \s also has U+001C to U+001F, which it leaves.
_LEADING_SPACE = re.compile(r"\A[^\S\x1c-\x1f]+")


class _Piece(NamedTuple):
    """A stretch of the prompt: plain text still to be tokenised, or ready ids; and whether it is learned."""

    content: str | list[int]
    learned: bool


class ChatTokenizer:
    """Phi-3's chat template over a tokenizer whose special tokens are out of reach of the data.

    Unlike a transformers tokenizer it can be shared by threads, and lets the others run while it works.

    stop_ids: ids of `<|end|>`, `<|endoftext|>`, `<|assistant|>`, at which generation stops.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Raises CheckpointError when the tokenizer's special tokens do not work as Phi-3's do."""
        _check_special_tokens(tokenizer)
        special_ids: dict[str, int] = tokenizer.get_added_vocab()
        self.stop_ids = tuple(special_ids[text] for text in STOP_TOKENS)
        self._bos_id: int = tokenizer.bos_token_id
        self._end_id = special_ids[END_TOKEN]
        self._role_ids = {role: special_ids[f"<|{role}|>"] for role in ROLES}
        self._words = _without_special_tokens(tokenizer)
        self._newline_ids = self._tokenize(["\n"])[0]

    def ids_and_labels(
        self, messages: Sequence[Message], image_tokens: Sequence[int], prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Ids of the whole conversation, and labels of the same length, not shifted.

        Learned are the words of each answer and the `<|end|>` after them: where generation stops. White space at the
        start of an answer is dropped, as the published tokenizer does after `<|assistant|>`.

        Args:
            image_tokens: tokens of each picture, in reading order.
            prompt: add the opening of an answer.

        Raises:
            DataError: an unknown role, or text that is not Unicode.
        """
        pieces = list(self._pieces(messages, image_tokens, prompt))
        words = iter(self._tokenize([content for content, _ in pieces if isinstance(content, str)]))
        ids: list[int] = []
        labels: list[int] = []
        for content, learned in pieces:
            piece_ids = next(words) if isinstance(content, str) else content
            ids += piece_ids
            labels += piece_ids if learned else [IGNORE] * len(piece_ids)
        return ids, labels

    def learned_texts(self, messages: Sequence[Message]) -> list[list[str]]:
        """By answer, the text of each learned token, in the order of the labels; joined they are the answer's text as
        it is written, and `<|end|>`. Of the tokens that share a character the first one has it.

        Raises DataError as `ids_and_labels`.
        """
        answers: list[list[str]] = [[]]
        num_pictures = sum(isinstance(part, int) for message in messages for part in message.parts)
        for content, learned in self._pieces(messages, [0] * num_pictures, False):
            if not learned:
                continue
            if isinstance(content, str):
                answers[-1] += _cut(content, self.token_spans([content])[0])
            else:
                answers[-1].append(END_TOKEN)
                answers.append([])
        return answers[:-1]

    def token_spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Where each token of each text begins and ends in it, in characters; the bytes of one character share a span.

        Raises DataError as `ids_and_labels`.
        """
        return [encoding.offsets for encoding in self._encode(self._words.encode_batch, texts)]

    def _pieces(self, messages: Sequence[Message], image_tokens: Sequence[int], prompt: bool) -> Iterator[_Piece]:
        """The chat template: for each turn `<|role|>`, newline and text, `<|end|>`, newline."""
        pictures = enumerate(image_tokens, start=1)
        yield _Piece([self._bos_id], False)
        for message in messages:
            if message.role not in self._role_ids:
                raise DataError(f"a turn has the role {message.role!r}; known are {', '.join(ROLES)}")
            learned = message.role == ANSWER_ROLE
            yield _Piece([self._role_ids[message.role]], False)
            for run in _runs(message):
                if isinstance(run, str):
                    yield _Piece(run, learned)
                else:
                    number, num_tokens = next(pictures)
                    yield _Piece([-number] * num_tokens + [self._bos_id], False)
            yield _Piece([self._end_id], learned)
            yield _Piece(self._newline_ids, False)
        if prompt:
            yield _Piece([self._role_ids[ANSWER_ROLE]], False)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encode(self._words.encode_batch_fast, texts)]

    def _encode(self, encode_batch: Callable[..., list[Encoding]], texts: Sequence[str]) -> list[Encoding]:
        try:  # batch calls release Python's lock, the call for a single text does not
            return encode_batch(list(texts), add_special_tokens=False)
        except TypeError as error:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            raise DataError("a text of the conversation is not valid Unicode (half of a surrogate pair)") from error


def join_texts(parts: Iterable[str | int]) -> list[str | int]:
    """Pictures, and between them texts that are tokenised as one, however many parts they came in."""
    joined: list[str | int] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _runs(message: Message) -> list[str | int]:
    """What follows `<|role|>`."""
    runs = join_texts(("\n", *message.parts))
    if message.role == ANSWER_ROLE and isinstance(runs[0], str):
        runs[0] = _LEADING_SPACE.sub("", runs[0])
    return runs


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The text in as many pieces as there are spans, without losing what no span covers."""
    borders = [0]
    for _, end in spans:
        borders.append(max(borders[-1], end))
    if spans:
        borders[-1] = len(text)
    return [text[begin:end] for begin, end in itertools.pairwise(borders)]


def _check_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """`_pieces` writes out what these tokens do to the text beside them; other tokenizers may do something else."""
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    roles = [f"<|{role}|>" for role in ROLES]
    problems = [f"it has no token {text}" for text in dict.fromkeys([*roles, *STOP_TOKENS]) if text not in added]
    for text in [*roles, END_TOKEN]:
        swallows = text == f"<|{ANSWER_ROLE}|>"
        if text in added and (added[text].lstrip, added[text].rstrip) != (False, swallows):
            problems.append(f"its token {text} must have lstrip=false and rstrip={str(swallows).lower()}")
    if tokenizer.bos_token_id is None or tokenizer("").input_ids != [tokenizer.bos_token_id]:
        problems.append("it puts no beginning-of-sequence token before a text")
    if problems:
        raise CheckpointError([f"the tokenizer is not of Phi-3's kind: {problem}" for problem in problems])


def _without_special_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The same vocabulary and merges, but no text is special.

    `encode_special_tokens=True` would not do: `</s>` is an added token not marked special, and stays one.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))
