"""Bytes of one sample → `Sample`: a typed conversation, its repaired pictures, and where both came from.

What comes in: the members of one tar sample ({"json": b"…", "0.jpg": b"…"}). What goes out: a `Sample`, or `BadSample`
with shard, key and reason. Surprise: text is always plain text, whatever special token it spells; what a picture or a
turn is comes from structure alone.

A sample is `KEY.json` (or `KEY.txt`) and its pictures. The JSON either holds `messages`

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "…"}]},
                  {"role": "assistant", "content": "…"}]}

or is any object, and the source's `prompt` and `answer` templates say what to make of its fields. Pictures that no part
names come first in the first user turn, in the tar's order. `{"type": "image_url", "image_url": {"url": "0.jpg"}}`
shows a picture of the sample as well; nothing is ever fetched from an address.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.pictures import PICTURE_ERRORS, decode_image
from phi3v_dist.data.templates import describe_fields, fill_template
from phi3v_dist.errors import DataError
from phi3v_dist.invocation import as_typed
from phi3v_dist.printable import printable

ROLES = ("system", "user", "assistant")
TEXT_MEMBERS = ("json", "txt")
DEFAULT_PROMPT = "What is shown in this image?"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    parts: in reading order; a `str` is plain text (never special tokens, whatever it contains), an `int` is the index
        of a picture in `Sample.images`.
    """

    role: str
    parts: tuple[str | int, ...]


@dataclass(frozen=True)
class Sample:
    """A conversation and its pictures as stored.

    sample_id: position in the run's shard table; the name by which order, plan, ledger and predictions know it.
    shard, key: the tar's path and the sample's key in it, for every message to a person.
    source: name of the data source (an entry of `data.train` or `data.validation`).
    images: RGB, repaired, at stored size.
    fields: what its JSON says in one word or number each, by which an evaluation can be split (`eval.by`).
    """

    sample_id: int
    shard: str
    key: str
    source: str
    messages: tuple[Message, ...]
    images: tuple[UInt8[np.ndarray, "_height _width 3"], ...]
    fields: Mapping[str, str | int | float] = field(default_factory=dict)


class BadSample(DataError):
    """One sample that cannot be used; the policy in `loader.py` counts and names it, and goes on.

    key, reason: fit to be printed, whatever the data spelled.
    """

    def __init__(self, shard: str, key: str, reason: str):
        self.shard, self.key, self.reason = shard, printable(key), printable(reason)
        super().__init__(f"{printable(shard)}: sample '{self.key}': {self.reason}")


def read_messages(
    parts: Mapping[str, bytes], image_names: Sequence[str], source: SourceSettings
) -> tuple[Message, ...]:
    """The conversation of a sample, without decoding a picture.

    Args:
        parts: member name → bytes; only `json` and `txt` are read.
        image_names: names of the sample's pictures in the tar's order; a part's `int` counts in this list.

    Raises:
        ValueError: with the reason, when there is no conversation to be had.
    """
    return _conversation(_record(parts), image_names, source)


def _conversation(record: Mapping[str, Any], image_names: Sequence[str], source: SourceSettings) -> tuple[Message, ...]:
    if source.prompt is not None or source.answer is not None:
        messages = _from_templates(record, source)
    elif "messages" in record:
        messages = _from_messages(record["messages"], list(image_names))
        if source.system is not None and messages[0].role != "system":
            messages.insert(0, _from_template(record, "system", source.system))
    else:
        fields = ", ".join(sorted(record)) or "none"
        raise ValueError(f"no `messages`, and the source names no `prompt` and `answer` (fields found: {fields})")
    answers = [message for message in messages if message.role == "assistant"]
    if answers and not any(isinstance(part, str) and part.strip() for answer in answers for part in answer.parts):
        raise ValueError("no assistant turn has words, so there is nothing to learn")
    used = [part for message in messages for part in message.parts if isinstance(part, int)]
    if len(used) != len(set(used)):
        raise ValueError("a picture is used twice; store it twice or ask about it once")
    unused = tuple(i for i in range(len(image_names)) if i not in used)
    if unused:
        turn = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if turn is None:
            raise ValueError("there are pictures but no user turn to show them in")
        messages[turn] = Message("user", unused + messages[turn].parts)
    return tuple(messages)


def default_source(shards: Sequence[str], parts: Mapping[str, bytes]) -> SourceSettings:
    """A source for shards of which nobody said how to read them, by one sample's members: `messages`, or a caption."""
    try:
        record = _record(parts)
    except ValueError:
        record = {"messages": None}
    caption = next((field for field in ("text", "caption") if field in record), None)
    if "messages" in record or caption is None:
        return SourceSettings(shards=list(shards))
    return SourceSettings(shards=list(shards), prompt=DEFAULT_PROMPT, answer=f"{{{{ {caption} }}}}")


def decode_sample(
    sample_id: int, shard: str, key: str, source_name: str, source: SourceSettings, parts: Mapping[str, bytes],
    image_names: Sequence[str],
) -> Sample:  # fmt: skip
    """Members → `Sample`.

    Raises:
        BadSample: the text or a picture cannot be used.
    """
    try:
        record = _record(parts)
        messages = _conversation(record, image_names, source)
    except ValueError as error:
        raise BadSample(shard, key, str(error)) from error
    images = []
    for name in image_names:
        try:
            images.append(decode_image(parts[name]))
        except PICTURE_ERRORS as error:
            raise BadSample(shard, key, f"{name} is not a readable picture: {error}") from error
    fields = {name: value for name, value in record.items() if isinstance(value, str | int | float)}
    return Sample(sample_id, shard, key, source_name, messages, tuple(images), fields)


def _record(parts: Mapping[str, bytes]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if "txt" in parts:
        try:
            record["text"] = parts["txt"].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"its .txt is not UTF-8: {error}") from error
    if "json" in parts:
        try:
            loaded = json.loads(parts["json"], parse_constant=lambda _: None)  # NaN is how pandas writes null
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its JSON cannot be read: {error}") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"its JSON is a {type(loaded).__name__}, not an object with fields")
        record |= loaded
    if not record:
        raise ValueError(f"it has no .json and no .txt with words (members: {', '.join(parts)})")
    return record


def _from_templates(record: Mapping[str, Any], source: SourceSettings) -> list[Message]:
    turns = (("system", source.system), ("user", source.prompt), ("assistant", source.answer))
    return [_from_template(record, role, template) for role, template in turns if template is not None]


def _from_template(record: Mapping[str, Any], role: str, template: str) -> Message:
    text = fill_template(template, record)
    if role == "assistant" and not text.strip():
        raise ValueError(f"template {template!r} gives an empty answer ({describe_fields(template, record)})")
    return Message(role, (text,) if text else ())


def _from_messages(turns: Any, image_names: list[str]) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise ValueError("`messages` is not a list of turns")
    messages: list[Message] = []
    next_image = 0
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise ValueError(f"a turn needs a role among {', '.join(ROLES)}: {str(turn)[:80]}")
        content = turn.get("content")
        if not isinstance(content, str | list):
            raise ValueError(f"the content of a turn is neither text nor a list of parts: {str(turn)[:80]}")
        parts: list[str | int] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if not isinstance(part, dict):
                raise ValueError(f"a part of a turn is not an object with a `type`: {str(part)[:80]!r}")
            if part.get("type") in ("image", "image_url"):
                index = _shown_picture(part, image_names, next_image)
                next_image = index + 1
                parts.append(index)
            elif part.get("type") == "text" and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                raise ValueError(f"a part of a turn is neither text nor image: {str(part)[:80]}")
        messages.append(Message(turn["role"], tuple(parts)))
    return messages


def _shown_picture(part: Mapping[str, Any], image_names: list[str], next_image: int) -> int:
    """Which picture a part shows: the one it names, or the next. Names are in lower case, as WebDataset has them."""
    name = part.get(part["type"])
    if part["type"] == "image_url" and isinstance(name, dict):  # as OpenAI writes it
        name = name.get("url")
    if name is None and part["type"] == "image" and next_image < len(image_names):
        return next_image
    if isinstance(name, str) and name.lower() in image_names:
        return image_names.index(name.lower())
    if isinstance(name, str) and ":" in name:
        raise ValueError(
            f"a turn shows the picture at {name[:60]!r}, which is not in the shard: nothing is fetched in training. "
            f"`{as_typed('launch/prepare.py')} import` fetches pictures into shards"
        )
    shown = "one more picture" if name is None else f"picture {str(name)[:60]!r}"
    raise ValueError(f"a turn shows {shown}; the sample has: {', '.join(image_names) or 'none'}")
