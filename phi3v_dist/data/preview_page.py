"""Sample ids → one HTML page on which a person sees what the model is given, and what it learns.

What comes in: opened data and the ids to show. What goes out: a file that needs nothing else, with each sample's
pictures, its prompt token by token, and its counts. Surprise: the page is made of the same ids and labels as training,
through the same doors; a sample that training would skip says why, in the words of the log.
"""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from phi3v_dist.data.batch import Example
from phi3v_dist.data.outcomes import STILL
from phi3v_dist.data.preview import Stretch, stretches, trained_share
from phi3v_dist.data.samples import TEXT_MEMBERS, BadSample, Sample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import ConfigError
from phi3v_dist.model.attention import IGNORE
from phi3v_dist.model.placement import num_crops_of
from phi3v_dist.printable import printable

if TYPE_CHECKING:
    import phi3v_dist.run

THUMBNAIL_PX = 320  # longest side: about 15 kB, so that a page of 100 samples can still be mailed
SHOWN_PICTURES = 24  # of one sample
SHOWN_CHARS = 20_000  # of one sample's prompt, and of its fields as stored


@dataclass(frozen=True)
class Picture:
    """uri: the thumbnail as a data URI. caption: its size as stored and what became of it."""

    uri: str
    caption: str


@dataclass(frozen=True)
class Card:
    """One sample on the page.

    reason: why training leaves it out; empty when it does not.
    facts: counts, in words. stored: its text members as they are in the tar.
    left_out_chars: of the prompt, beyond what is shown.
    """

    sample_id: int
    name: str
    source: str
    reason: str
    facts: list[str]
    pictures: list[Picture]
    prompt: list[Stretch]
    left_out_chars: int
    stored: str


def write_preview(path: Path, title: str, sample_ids: Iterable[int], data: "phi3v_dist.run.Data") -> None:
    """Write the page.

    Args:
        title: the page's heading, for example `step 1,234 of runs/quickstart`.
        sample_ids: in the order in which they are shown; ids that training leaves out are shown with the reason.

    Raises:
        ConfigError: the file cannot be written.
    """
    ids = list(sample_ids)
    tokens, trained = (int(column[ids].sum()) for column in (data.lengths.tokens, data.lengths.label_tokens))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("preview_page.html.j2").render(
        title=printable(title),
        summary=f"{len(ids):,} sample{'s' * (len(ids) != 1)} · {trained_share(trained, tokens)}",
        cards=[_card(sample_id, data) for sample_id in ids],
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"{path}: the page cannot be written ({error}); name another file") from error


def find_samples(table: ShardTable, key: str) -> list[int]:
    """Ids of all samples of this key, written as `shard:key` or as the key alone.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for shard in range(len(table.shards)):
        name = key.removeprefix(f"{table.shard_name(shard)}:")
        index = table.index(shard)
        starts = index.columns["key_start"]
        joined, wanted = index.columns["key_bytes"].tobytes(), name.encode(errors="surrogateescape")
        place = joined.find(wanted)
        while place >= 0:
            number = int(np.searchsorted(starts, place, side="right")) - 1
            if number < len(index) and starts[number] == place and starts[number + 1] == place + len(wanted):
                found.append(int(table.start[shard]) + number)
            place = joined.find(wanted, place + 1)
    if not found:
        raise ConfigError(f"no sample has the key {key!r}; keys look like {table.sample_name(0)!r}")
    return found


def _card(sample_id: int, data: "phi3v_dist.run.Data") -> Card:
    decoder, reason = data.decoder, _why_left_out(data, sample_id)
    facts: list[str] = []
    pictures: list[Picture] = []
    prompt: list[Stretch] = []
    left_out_chars = 0
    try:
        sample = decoder.sample(sample_id)
        example = decoder.processor.encode(sample, "fast")
    except BadSample as error:
        reason = reason or error.reason
    else:
        facts = list(_facts(example, int(data.lengths.full_tokens[sample_id])))
        pictures = list(_pictures(sample, example))
        prompt, left_out_chars = _shortened(stretches(example, decoder.processor.tokenizer))
    shard, _ = decoder.table.locate(sample_id)
    return Card(
        sample_id, decoder.table.sample_name(sample_id), printable(decoder.table.source_name(shard)),
        printable(reason, keep="\n"), facts, pictures, prompt, left_out_chars, _stored(sample_id, data),
    )  # fmt: skip


def _why_left_out(data: "phi3v_dist.run.Data", sample_id: int) -> str:
    policy, tokens = data.decoder.processor.fit_policy, int(data.lengths.tokens[sample_id])
    if not tokens:
        return data.lengths.bad.get(sample_id, "it has no tokens")
    if policy.limit_tokens is not None and tokens > policy.limit_tokens:
        return f"{tokens:,} tokens: longer than a row of {policy.limit_tokens:,}{STILL[policy.name]}"
    return ""


def _facts(example: Example, full_tokens: int) -> Iterator[str]:
    tokens = len(example.input_ids)
    images = int((example.input_ids < 0).sum())
    yield f"{tokens:,} tokens"
    if full_tokens > tokens:
        yield f"{full_tokens:,} before the cut"
    yield f"{tokens - images:,} text"
    yield f"{images:,} image"
    yield f"{int((example.labels != IGNORE).sum()):,} trained"
    num_pictures, num_crops = len(example.image_sizes), len(example.pixel_values)
    yield f"{num_pictures} picture{'s' * (num_pictures != 1)}, {num_crops} crop{'s' * (num_crops != 1)}"


def _pictures(sample: Sample, example: Example) -> Iterator[Picture]:
    """In reading order, as the model numbers them."""
    shown = [part for message in sample.messages for part in message.parts if isinstance(part, int)]
    for number, index in enumerate(shown[:SHOWN_PICTURES], start=1):
        height, width = example.image_sizes[number - 1].tolist()
        stored_height, stored_width, _ = sample.images[index].shape
        caption = f"{number}: {stored_width}x{stored_height} px → {num_crops_of(height, width)} crops"
        yield Picture(_thumbnail(sample.images[index]), caption)
    if len(shown) > SHOWN_PICTURES:
        yield Picture("", f"and {len(shown) - SHOWN_PICTURES} more pictures")


def _thumbnail(pixels: np.ndarray) -> str:
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shortened(prompt: Iterable[Stretch]) -> tuple[list[Stretch], int]:
    """The prompt with long untrained words cut in their middle, and how many characters that left out."""
    whole = list(prompt)
    excess = sum(len(stretch.text) for stretch in whole) - SHOWN_CHARS
    if excess <= 0:
        return whole, 0
    room = max(200, SHOWN_CHARS // max(1, len(whole)))
    cut = [s if len(s.text) <= room else s._replace(text=_without_middle(s.text, room)) for s in whole]
    return cut, sum(len(a.text) - len(b.text) for a, b in zip(whole, cut, strict=True))


def _without_middle(text: str, room: int) -> str:
    return f"{text[: room // 2]} … {text[-(room // 2) :]}"


def _stored(sample_id: int, data: "phi3v_dist.run.Data") -> str:
    try:
        parts = data.decoder.fetcher.fetch(sample_id, text_only=True)
    except BadSample:  # the card has the reason already
        return ""
    texts: Sequence[tuple[str, str]] = [
        (name, printable(parts[name].decode(errors="backslashreplace"), keep="\n"))
        for name in TEXT_MEMBERS
        if name in parts
    ]
    return "\n".join(f".{name}  {text[:SHOWN_CHARS]}{' …' * (len(text) > SHOWN_CHARS)}" for name, text in texts)
