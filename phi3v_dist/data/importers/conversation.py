"""A record → a `Draft`: turns in our own format, and where each of its pictures is.

What comes in: the columns of one record, whichever of the four shapes they have: templates over columns, LLaVA's
`conversations`, chat `messages`, or captions. What goes out: messages whose picture parts are numbers, in the order of
`Draft.pictures`. Surprise: words stay as they stand. In LLaVA's `<image>` followed by a line break the break is kept:
it is how Phi-3-vision's own prompts look.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phi3v_dist.data.importers.records import BadRecord
from phi3v_dist.data.importers.settings import ImportSettings, is_template
from phi3v_dist.data.samples import DEFAULT_PROMPT
from phi3v_dist.data.store import shown_words
from phi3v_dist.data.templates import fill_template

IMAGE_TAG = "<image>"
IMAGE_COLUMNS = ("images", "image", "file_name")
CONVERSATION_COLUMNS = ("messages", "conversations")
CAPTION = {"prompt": DEFAULT_PROMPT, "answer": "{{ text }}"}
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CHAT_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Reference = str | bytes  # a path, a URL, or the picture itself


@dataclass(frozen=True)
class Draft:
    """A record that became a conversation.

    messages: as in a sample's JSON, but that `image` of a part is a number in `pictures`.
    fields: the record's other columns.
    split_key: what decides the split; None: the pictures do.
    """

    messages: list[dict[str, Any]]
    pictures: tuple[Reference, ...]
    fields: dict[str, Any]
    split_key: str | None


def draft(record: dict[str, Any], settings: ImportSettings) -> Draft:
    """Raises BadRecord when there is no conversation or no place for its pictures."""
    column = settings.messages
    if settings.prompt is None and column is None:
        column = next((name for name in CONVERSATION_COLUMNS if name in record), None)
    if column is None:
        messages, pictures = _from_templates(record, settings)
    else:
        turns = _turns(record, column)
        listed = _listed(record, settings, required=False)
        is_llava = "from" in turns[0]
        messages, pictures = (_from_llava if is_llava else _from_chat)(turns, listed)
    if not any(turn["role"] == "assistant" and _words(turn["content"]).strip() for turn in messages):
        raise BadRecord("nothing to learn", "there is no assistant turn with words")
    fields = {name: value for name, value in record.items() if name != column}
    return Draft(messages, tuple(pictures), fields, _split_key(record, settings))


def _from_templates(record: dict[str, Any], settings: ImportSettings) -> tuple[list[dict[str, Any]], list[Reference]]:
    pictures = _listed(record, settings, required=not settings.allow_no_picture)
    prompt, answer = settings.prompt or CAPTION["prompt"], settings.answer or CAPTION["answer"]
    question = [*(_image(number) for number in range(len(pictures))), _text(_render(prompt, record))]
    messages = [{"role": "system", "content": _render(settings.system, record)}] if settings.system else []
    return [*messages, {"role": "user", "content": question}, _turn("assistant", _render(answer, record))], pictures


def _from_llava(turns: list[dict[str, Any]], listed: list[Reference]) -> tuple[list[dict[str, Any]], list[Reference]]:
    messages, number = [], 0
    for turn in turns:
        role, words = LLAVA_ROLES.get(str(turn.get("from"))), turn.get("value")
        if role is None or not isinstance(words, str):
            raise BadRecord("conversation", f"a turn needs `from` human or gpt and a text `value`: {_brief(turn)}")
        if role != "user":
            messages.append(_turn(role, words))
            continue
        parts = []
        for place, piece in enumerate(words.split(IMAGE_TAG)):
            if place:
                parts.append(_image(number))
                number += 1
            parts += [_text(piece)] if piece else []
        messages.append({"role": role, "content": parts})
    if number != len(listed):
        raise BadRecord("<image> tags", f"{number} {IMAGE_TAG} tags, but {len(listed)} pictures")
    return messages, listed


def _from_chat(turns: list[dict[str, Any]], listed: list[Reference]) -> tuple[list[dict[str, Any]], list[Reference]]:
    """Parts name their picture, or take the next of the record's own list; what is left of that goes first."""
    messages, pictures, unnamed = [], list(listed), iter(range(len(listed)))
    for turn in turns:
        role, content = CHAT_ROLES.get(str(turn.get("role"))), turn.get("content")
        if role is None or not isinstance(content, str | list):
            raise BadRecord(
                "conversation", f"a turn needs a role of {', '.join(CHAT_ROLES)}, and content: {_brief(turn)}"
            )
        parts = []
        for part in [_text(content)] if isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append(_text(part["text"]))
            elif kind in ("image", "image_url"):
                named = _named(part)
                if len(named) > 1:
                    raise BadRecord("conversation", f"a part shows several pictures: {_brief(part)}")
                number = len(pictures) if named else next(unnamed, None)
                if number is None:
                    raise BadRecord("conversation", f"a part shows a picture, but the record has only {len(listed)}")
                pictures += named
                parts.append(_image(number))
            else:
                raise BadRecord("conversation", f"a part is neither text nor image: {_brief(part)}")
        messages.append({"role": role, "content": parts})
    return messages, pictures


def _named(part: dict[str, Any]) -> list[Reference]:
    """The picture a part names, in any of the usual spellings."""
    for key in ("image_url", "image", "url", "path"):
        value = part.get(key)
        value = value.get("url", value) if isinstance(value, dict) else value
        if value:
            return _references(value, f"a part's `{key}`")
    return []


def _turns(record: dict[str, Any], column: str) -> list[dict[str, Any]]:
    turns = record.get(column)
    if isinstance(turns, str):  # as tables hold lists
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise BadRecord("conversation", f"`{column}` is a text, and no JSON: {error}") from error
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord("conversation", f"`{column}` is not a list of turns: {_brief(turns)}")
    return turns


def _listed(record: dict[str, Any], settings: ImportSettings, required: bool) -> list[Reference]:
    """The pictures that the record's columns, or the templates over them, give."""
    entries = settings.images or [name for name in IMAGE_COLUMNS if name in record][:1]
    pictures: list[Reference] = []
    for entry in entries:
        if not is_template(entry) and entry not in record and required:
            raise BadRecord("no picture", f"it has no column `{entry}` (its columns: {', '.join(sorted(record))})")
        found = _references(_render(entry, record) if is_template(entry) else record.get(entry), f"`{entry}`")
        if required and not found:
            raise BadRecord("no picture", f"`{entry}` is empty; allow_no_picture=true takes such records as text only")
        pictures += found
    return pictures


def _references(value: Any, where: str) -> list[Reference]:
    if value is None or value == "" or value == b"":
        return []
    if isinstance(value, str) and value[:5] == "data:":
        raise BadRecord("conversation", f"{where} is a data: URL; write the picture to a file and give its path")
    if isinstance(value, str | bytes):
        return [value.strip() if isinstance(value, str) else value]
    if isinstance(value, dict):  # an Image of Hugging Face: stored bytes, or a path
        return _references(value.get("bytes") or value.get("path") or value.get("url"), where)
    if isinstance(value, Sequence):
        return [reference for item in value for reference in _references(item, where)]
    raise BadRecord("no picture", f"{where} is {_brief(value)}, not a path, a URL or bytes")


def _split_key(record: dict[str, Any], settings: ImportSettings) -> str | None:
    if settings.split_key is None:
        return None
    if is_template(settings.split_key):
        return _render(settings.split_key, record)
    value = record.get(settings.split_key)
    if value is None:
        raise BadRecord("no split key", f"`{settings.split_key}` is missing or null, so no split is right for it")
    return str(value)


def _render(template: str, record: dict[str, Any]) -> str:
    try:
        return fill_template(template, record)
    except ValueError as error:
        raise BadRecord("template", str(error)) from error


def _words(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _turn(role: str, words: str) -> dict[str, Any]:
    return {"role": role, "content": words}


def _text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def _image(number: int) -> dict[str, Any]:
    return {"type": "image", "image": number}


def _brief(value: Any) -> str:
    words = shown_words(repr(value))
    return words if len(words) <= 80 else f"{words[:80]}…"
