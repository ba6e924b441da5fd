"""`LongDocumentSettings` → long documents of drawn pictures as ordinary WebDataset shards.

What comes in: how many documents and how long, and the model folder whose processor counts tokens. What goes out:
OUT/train-documents-000000.tar, …, OUT/validation-documents-000000.tar, …, and OUT/documents.json with the scores of
guessing. Surprise: no word of a document says what a product is before a question has asked for it. A page is a number,
a picture and talk about something else, so the answer has to be found by its number, and then seen.

Each sample's JSON holds, beside `messages`: `depth` (0: the answer stands on the first page, 1: on the last), `page`
(counted from 1), `num_images`, `num_tokens`, and the truth as in the catalogue. An evaluation is split by any of them
(`eval.by`).
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from phi3v_dist.data.crops import CropLayout
from phi3v_dist.data.importers.catalogue.chapters import (
    MAX_PAGES,
    LongDocument,
    LongDocumentSettings,
    chance,
    plan_documents,
)
from phi3v_dist.data.importers.catalogue.drawing import draw_any_size
from phi3v_dist.data.importers.catalogue.folder import claim, encode_photo, write_shard
from phi3v_dist.data.importers.catalogue.plan import PHOTO_STREAM, WORD_STREAM, expected_price, random_stream
from phi3v_dist.data.importers.catalogue.words import PAGE_SENTENCES, QUESTIONS, answer
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import Message
from phi3v_dist.errors import ConfigError

__all__ = ["DocumentsReport", "LongDocumentSettings", "write_documents"]

VERSION = 1  # of what is drawn and of documents.json
DESCRIPTION_NAME = "documents.json"
FEWEST_TOKENS = 4  # of a sentence that fills a page


@dataclass(frozen=True)
class DocumentsReport:
    """What is in the shards.

    num_pages: length in tokens → pages of a document of that length.
    counts: split → length in tokens → documents.
    chance: what is asked for → share of the validation answers that a random product of the document gets right.
    """

    num_pages: dict[int, int]
    counts: dict[str, dict[int, int]]
    chance: dict[str, float]
    shards: tuple[Path, ...]

    def table(self) -> Table:
        """Documents by length, and below them the scores of guessing."""
        table = Table("tokens", "pictures", title="long documents")
        for split in self.counts:
            table.add_column(split, justify="right")
        for length, pages in self.num_pages.items():
            table.add_row(f"{length:,}", f"{pages:,}", *(f"{counts[length]:,}" for counts in self.counts.values()))
        if self.chance:
            guessed = ", ".join(f"{what} {100 * share:.1f} %" for what, share in self.chance.items())
            table.caption = f"right by guessing a product of the document: {guessed}"
        return table


def write_documents(
    out: Path, settings: LongDocumentSettings, model: Path, progress: Callable[[int, int], None] | None = None
) -> DocumentsReport:
    """Draw the documents into `out`, or what is missing of them.

    Args:
        model: folder in the official layout; its processor counts tokens.
        progress: told (documents done, documents in all) after every document and every shard found done.

    Raises:
        ConfigError: a length has no room for a page, or for so many that a product would come twice.
        DataError: the folder holds shards that are not of these documents.
    """
    processor = Phi3VProcessor.from_pretrained(model, settings.num_crops)
    num_pages = _num_pages(settings, processor)
    documents = plan_documents(settings, num_pages)
    shards = dict(_shards(out, documents, settings.samples_per_shard))
    held_out = [document for document in documents if document.split == "validation"]
    report = DocumentsReport(num_pages, _counts(documents, num_pages), chance(held_out) if held_out else {}, (*shards,))
    unfinished = claim(out, DESCRIPTION_NAME, _description(settings, report, processor))
    done = 0
    for shard, members in shards.items():
        drawn = (_sample(member, settings, processor) for member in members)
        for number in range(1, len(members) + 1) if shard.exists() else write_shard(shard, drawn):
            if progress:
                progress(done + number, len(documents))
        done += len(members)
    unfinished.replace(out / DESCRIPTION_NAME)
    return report


def _num_pages(settings: LongDocumentSettings, processor: Phi3VProcessor) -> dict[int, int]:
    """How many pages fit into each length. All pictures take the same number of tokens, nearly square as they are."""
    side = settings.image_side_px[1]
    one_picture = CropLayout.of(side, side, settings.num_crops).num_tokens + 1
    per_page = one_picture + settings.text_tokens_per_page
    num_pages = {length: length // per_page for length in settings.document_tokens}
    for length, pages in num_pages.items():
        if not 2 <= pages <= MAX_PAGES:
            raise ConfigError(
                f"long documents: {length:,} tokens are {pages:,} pages of {one_picture} tokens for the picture and "
                f"text_tokens_per_page={settings.text_tokens_per_page}; 2 to {MAX_PAGES} are possible. Choose another "
                "document_tokens, num_crops or text_tokens_per_page"
            )
    return num_pages


def _counts(documents: Sequence[LongDocument], lengths: Mapping[int, int]) -> dict[str, dict[int, int]]:
    counts: dict[str, dict[int, int]] = {}
    for document in documents:
        of_split = counts.setdefault(document.split, dict.fromkeys(lengths, 0))
        of_split[document.target_tokens] += 1
    return counts


def _shards(out: Path, documents: Sequence[LongDocument], per_shard: int) -> Iterator[tuple[Path, list[LongDocument]]]:
    """Each shard and what is in it; documents come split by split."""
    for split in dict.fromkeys(document.split for document in documents):
        members = [document for document in documents if document.split == split]
        for number, begin in enumerate(range(0, len(members), per_shard)):
            yield out / f"{split}-documents-{number:06d}.tar", members[begin : begin + per_shard]


def _description(settings: LongDocumentSettings, report: DocumentsReport, processor: Phi3VProcessor) -> dict[str, Any]:
    """documents.json; `chance_…` are read by `eval.reference`. Another tokenizer would give other documents."""
    guessed = {f"chance_{what}": share for what, share in report.chance.items()}
    facts = {"num_pages": report.num_pages, "counts": report.counts}
    return {"version": VERSION, **guessed, **facts, "settings": asdict(settings) | {"processor": processor.digest}}


def _sample(document: LongDocument, settings: LongDocumentSettings, processor: Phi3VProcessor) -> dict[str, Any]:
    """The sample's files by extension; the writer turns `json` into bytes."""
    extension = "jpg" if settings.image_format == "jpeg" else "png"
    pictures = {}
    for page, entry in enumerate(document.entries):
        rng = random_stream(settings.seed, PHOTO_STREAM, document.index, page)
        photo = draw_any_size(entry.look, rng, settings.image_side_px, settings.aspect_ratio)
        pictures[f"{page}.{extension}"] = encode_photo(photo, settings.image_format)
    side = settings.image_side_px[1]
    talk = _talk(document, random_stream(settings.seed, WORD_STREAM, document.index), processor, side)
    names = list(pictures)
    record = {
        "messages": [_as_json(turn, names) for turn in _conversation(document, talk)],
        "depth": document.depth,
        "page": document.page + 1,
        "num_images": len(names),
        "num_tokens": _num_tokens(document, talk, processor, side),
        "title": document.wanted.title,
        "category3_code": document.wanted.category,
        "full_price": round(expected_price(document.wanted)),
    }
    return {"__key__": document.key, **pictures, "json": record}


def _talk(document: LongDocument, rng: np.random.Generator, processor: Phi3VProcessor, side_px: int) -> list[str]:
    """For every page sentences about something else: together as many as the document has room for."""
    num_pages = len(document.entries)
    room = document.target_tokens - _num_tokens(document, [""] * num_pages, processor, side_px)
    if room < 0:
        raise ConfigError(
            f"long documents: pictures and questions alone take {document.target_tokens - room:,} tokens of "
            f"{document.target_tokens:,}; set text_tokens_per_page or pages_per_question higher"
        )
    sentences = [PAGE_SENTENCES[i] for i in rng.integers(len(PAGE_SENTENCES), size=room // FEWEST_TOKENS)]
    pages = [page for _ in range(len(sentences) // num_pages + 1) for page in rng.permutation(num_pages).tolist()]

    def first(count: int) -> list[str]:
        of_page: list[list[str]] = [[] for _ in range(num_pages)]
        for page, sentence in zip(pages, sentences[:count], strict=False):
            of_page[page].append(sentence)
        return [" ".join(some) for some in of_page]

    fits = bisect.bisect_right(
        range(len(sentences) + 1), document.target_tokens,
        key=lambda count: _num_tokens(document, first(count), processor, side_px),
    )  # fmt: skip
    return first(fits - 1)


def _num_tokens(document: LongDocument, talk: Sequence[str], processor: Phi3VProcessor, side_px: int) -> int:
    """Of the whole example; a picture counts as a square one of this side."""
    return processor.count(_conversation(document, talk), [(side_px, side_px)] * len(document.entries)).tokens


def _conversation(document: LongDocument, talk: Sequence[str]) -> list[Message]:
    """Pages, after some of them a question and its answer, and the question at the end."""
    messages: list[Message] = []
    shown: list[str | int] = []
    for page, entry in enumerate(document.entries):
        shown += [f"Article {entry.article}\n", page, f"\n{talk[page]}\n"]
        wanted = document.asked.get(page + 1)
        if wanted is not None:
            look = document.entries[wanted].look
            question = QUESTIONS["document"].format(article=document.entries[wanted].article)
            said = answer(look, round(expected_price(look)))
            messages += [Message("user", (*shown, question)), Message("assistant", (said,))]
            shown = []
    return messages


def _as_json(message: Message, names: Sequence[str]) -> dict[str, Any]:
    """A turn in the `messages` form."""
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": names[part]}
        for part in message.parts
    ]
    return {"role": message.role, "content": parts}
