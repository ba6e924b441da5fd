"""A draft and its pictures → the members of one sample, or the reason why the trainer would refuse it.

What comes in: turns whose pictures are numbers, and the pictures as stored. What goes out: `KEY.json`, `KEY.0.jpg`, ….
Surprise: pictures are copied, never re-encoded, and named after what they are: a WebP called .jpg becomes .webp.
"""

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash
from PIL import Image

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.crops import num_image_tokens
from phi3v_dist.data.importers.conversation import Draft
from phi3v_dist.data.importers.records import BadRecord
from phi3v_dist.data.pictures import IMAGE_FORMATS, PICTURE_ERRORS, decode_image, upright_size
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import read_messages
from phi3v_dist.data.store import shown
from phi3v_dist.errors import DataError

SUFFIXES = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm",
}  # fmt: skip
NUM_CROPS = (4, 16)  # of Phi-3.5-vision's own file, and of Phi-3-vision's
URL = re.compile(r"\s*https?://\S+\s*", re.IGNORECASE)  # all of a value; words that name one stay as they are
AS_WRITTEN = SourceSettings(shards=["."])  # a source without templates: the sample's own `messages` count


@dataclass(frozen=True)
class Packed:
    """One sample, ready to be written.

    members: extension → bytes.
    sizes_wh: width and height of its pictures, upright, in px.
    picture_hashes, content_hash: xxh3-64 of each picture, and of pictures and words together.
    tokens: at 4 and at 16 crops; of pictures alone when there was no tokenizer.
    """

    members: dict[str, bytes]
    sizes_wh: tuple[tuple[int, int], ...]
    picture_hashes: tuple[int, ...]
    content_hash: int
    tokens: tuple[int, int]


def pack(draft: Draft, pictures: Sequence[bytes], verify: bool, processor: Phi3VProcessor | None) -> Packed:
    """Raises BadRecord when a picture is damaged or the trainer could not use the sample."""
    sizes_wh, names = [], []
    digits = len(str(len(pictures) - 1))  # so that names sort as they are counted
    for number, data in enumerate(pictures):
        suffix, size_wh = _look_at(data, verify, f"picture {number + 1} of {len(pictures)}")
        sizes_wh.append(size_wh)
        names.append(f"{number:0{digits}d}.{suffix}")
    messages = [turn | {"content": _named(turn["content"], names)} for turn in draft.messages]
    try:
        members = {"json": json.dumps({**_plain(draft.fields), "messages": messages}, ensure_ascii=False).encode()}
        read = read_messages(members, names, AS_WRITTEN)
        image_tokens = [sum(num_image_tokens(*size, num_crops) for size in sizes_wh) for num_crops in NUM_CROPS]
        text_tokens = 0
        if processor:
            text_tokens = processor.count(read, sizes_wh).tokens - sum(
                num_image_tokens(*size, processor.num_crops) for size in sizes_wh
            )
    except (ValueError, DataError) as error:
        kind = "picture shape" if isinstance(error, DataError) else "conversation"
        raise BadRecord(kind, str(error)) from error
    hashes = tuple(xxhash.xxh3_64_intdigest(data) for data in pictures)
    content = json.dumps([draft.messages, hashes]).encode()
    return Packed(
        members | dict(zip(names, pictures, strict=True)), tuple(sizes_wh), hashes, xxhash.xxh3_64_intdigest(content),
        (text_tokens + image_tokens[0], text_tokens + image_tokens[1]),
    )  # fmt: skip


def _look_at(data: bytes, verify: bool, what: str) -> tuple[str, tuple[int, int]]:
    """What a picture really is, and its size. With `verify` it is decoded to its last pixel."""
    try:
        size_wh = upright_size(data)
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as file:
            suffix = SUFFIXES[str(file.format)]
        if verify:
            decode_image(data)
    except PICTURE_ERRORS as error:
        raise BadRecord("picture unreadable", f"{what} is not a readable picture: {error}") from error
    return suffix, size_wh


def _named(content: Any, names: Sequence[str]) -> Any:
    """Content with the names of its pictures in place of their numbers."""
    if isinstance(content, str):
        return content
    return [part | {"image": names[part["image"]]} if part["type"] == "image" else part for part in content]


def _plain(value: Any) -> Any:
    """A column as JSON can hold it: dates and the like as text, no stored bytes, no NaN, no password in a URL."""
    if isinstance(value, str):
        return shown(value) if URL.fullmatch(value) else value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if not isinstance(inner, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value if not isinstance(inner, bytes)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | bool | None) else str(value)
