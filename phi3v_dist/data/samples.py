"""Bytes of one sample → `Sample`: a typed conversation, its repaired pictures, and where both came from.

What comes in: the members of one tar sample ({"json": b"…", "0.jpg": b"…"}). What goes out: a `Sample`, or `BadSample`
with shard, key and reason. Surprise: text is always plain text, whatever special token it spells; what a picture or a
turn is comes from structure alone.

A sample is `KEY.json` (or `KEY.txt`) and its pictures. The JSON either holds `messages`

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "…"}]},
                  {"role": "assistant", "content": "…"}]}

or is any object, and the source's `prompt` and `answer` templates say what to make of its fields. Pictures that no part
names come first in the first user turn, in the tar's order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8
from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.pictures import PICTURE_ERRORS, decode_image
from phi3v_dist.errors import DataError

ROLES = ("system", "user", "assistant")
TEXT_MEMBERS = ("json", "txt")


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
    """

    sample_id: int
    shard: str
    key: str
    source: str
    messages: tuple[Message, ...]
    images: tuple[UInt8[np.ndarray, "_height _width 3"], ...]


class BadSample(DataError):
    """One sample that cannot be used; the policy in `loader.py` counts and names it, and goes on."""

    def __init__(self, shard: str, key: str, reason: str):
        self.shard, self.key, self.reason = shard, key, reason
        super().__init__(f"{shard}: sample {key!r}: {reason}")


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
    record = _record(parts)
    if source.prompt is not None or source.answer is not None or source.system is not None:
        messages = _from_templates(record, source)
    elif "messages" in record:
        messages = _from_messages(record["messages"], list(image_names))
    else:
        fields = ", ".join(sorted(record)) or "none"
        raise ValueError(f"no `messages`, and the source names no `prompt` and `answer` (fields found: {fields})")
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


def decode_sample(
    sample_id: int, shard: str, key: str, source_name: str, source: SourceSettings, parts: Mapping[str, bytes],
    image_names: Sequence[str],
) -> Sample:  # fmt: skip
    """Members → `Sample`.

    Raises:
        BadSample: the text or a picture cannot be used.
    """
    try:
        messages = read_messages(parts, image_names, source)
    except ValueError as error:
        raise BadSample(shard, key, str(error)) from error
    images = []
    for name in image_names:
        try:
            images.append(decode_image(parts[name]))
        except PICTURE_ERRORS as error:
            raise BadSample(shard, key, f"{name} is not a readable picture: {error}") from error
    return Sample(sample_id, shard, key, source_name, messages, tuple(images))


def _record(parts: Mapping[str, bytes]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if "txt" in parts:
        record["text"] = parts["txt"].decode("utf-8-sig").strip()
    if "json" in parts:
        try:
            loaded = json.loads(parts["json"])
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
    messages = []
    for role, template in turns:
        if template is not None:
            text = render(template, record)
            messages.append(Message(role, (text,) if text else ()))
    return messages


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
            if part.get("type") == "image":
                name = part.get("image")
                if name is None and next_image < len(image_names):
                    name = image_names[next_image]
                name = name.lower() if isinstance(name, str) else name  # as WebDataset names members
                if name not in image_names:
                    raise ValueError(
                        f"a turn shows picture {name!r}; the sample has: {', '.join(image_names) or 'none'}"
                    )
                next_image = image_names.index(name) + 1
                parts.append(image_names.index(name))
            elif part.get("type") == "text" and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                raise ValueError(f"a part of a turn is neither text nor image: {str(part)[:80]}")
        messages.append(Message(turn["role"], tuple(parts)))
    return messages


def render(template: str, record: Mapping[str, Any]) -> str:
    """A Jinja template over a record's fields, in a sandbox. Raises ValueError: a field is missing or null, …"""
    try:
        return _template(template).render(record)
    except Exception as error:  # a template is a small program of the user's, and can raise what it likes
        raise ValueError(f"template {template!r}: {error} (fields: {', '.join(sorted(record))})") from error


def template_fields(template: str) -> set[str]:
    """Names of the fields that a template reads. Raises ValueError: it is no Jinja template."""
    try:
        return meta.find_undeclared_variables(SandboxedEnvironment().parse(template))
    except TemplateSyntaxError as error:
        raise ValueError(f"template {template!r}: {error}") from error


@lru_cache(maxsize=64)
def _template(text: str) -> Template:
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null)
    return environment.from_string(text)


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a value it shows is null, which would be written as None; {{ field or '' }} allows it")
    return value
