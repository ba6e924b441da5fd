"""`LongDocumentSettings` → what stands in each long document, before anything is drawn.

What comes in: how many documents, how long, and the number of pages that each length has room for. What goes out:
`LongDocument`s. Surprise: nothing about where the answer stands is left to chance. The documents of one length take
their depths from an even grid between 0 and 1, so that every bin of depths holds as many answers as the next.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from phi3v_dist.data.importers.catalogue.folder import ImageFormat
from phi3v_dist.data.importers.catalogue.garments import COLOURS, GARMENTS, PATTERNS, TRIMS, Look
from phi3v_dist.data.importers.catalogue.plan import LIMITED_FRAC, Split, random_stream
from phi3v_dist.errors import ConfigError

ENTRY_STREAM, ORDER_STREAM = 4, 5  # beside those of `plan`
MAX_PAGES = len(GARMENTS) * len(COLOURS) * len(PATTERNS) * len(TRIMS)  # a document shows no title twice
MIN_TEXT_TOKENS = 60


@dataclass(frozen=True)
class LongDocumentSettings:
    """How many long documents, how long, and how much is asked in them."""

    train_documents: int = 64
    validation_documents: int = 32
    seed: int = 0
    """The same seed and settings, with the same tokenizer, give the same bytes."""
    document_tokens: tuple[int, ...] = (5000, 10000)
    """Lengths, taken in turn; a document has so many tokens or a few less."""
    num_crops: int = 1
    """Crops by which the tokens of a picture are counted: `data.num_crops` of the run."""
    text_tokens_per_page: int = 85
    """Words beside a picture, the questions' share included; fewer make more pages of the same length."""
    pages_per_question: int = 4
    """A question about one of the pages so far stands after every so many; the last stands at the end."""
    samples_per_shard: int = 16
    image_format: ImageFormat = "jpeg"
    image_side_px: tuple[int, int] = (336, 400)
    """Smallest and largest longer side of a photo."""
    aspect_ratio: tuple[float, float] = (0.85, 1.18)
    """Smallest and largest width / height."""

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise ConfigError([f"long documents: {problem}" for problem in problems])


def _problems(settings: LongDocumentSettings) -> Iterator[str]:
    """A message for every setting that cannot be."""
    lowest = {"train_documents": 0, "validation_documents": 0, "num_crops": 1, "pages_per_question": 1}
    lowest |= {"samples_per_shard": 1, "text_tokens_per_page": MIN_TEXT_TOKENS}
    for name, low in lowest.items():
        if getattr(settings, name) < low:
            yield f"{name}={getattr(settings, name)} must be at least {low}"
    if settings.train_documents + settings.validation_documents < 1:
        yield "train_documents and validation_documents are both 0"
    if not settings.document_tokens or min(settings.document_tokens) < 1:
        yield f"document_tokens={list(settings.document_tokens)} must be one length or several, such as [5000,10000]"
    if settings.image_format not in ("jpeg", "png"):
        yield f"image_format={settings.image_format!r} must be jpeg or png"
    for name, smallest in (("image_side_px", 64), ("aspect_ratio", 0.2)):
        low, high = getattr(settings, name)
        if not smallest <= low <= high:
            yield f"{name}={low}, {high} must be two numbers of at least {smallest}, the smaller one first"


@dataclass(frozen=True)
class Entry:
    """One page: a picture of a product, and the number it goes by. The words on the page do not say what it is."""

    article: int
    look: Look


@dataclass(frozen=True)
class LongDocument:
    """A catalogue of many pages with questions in it.

    target_tokens: the length it shall have.
    asked: after so many pages → the page that a question there asks for, counted from 0; in order, the last at the end.
    """

    index: int
    split: Split
    target_tokens: int
    entries: tuple[Entry, ...]
    asked: Mapping[int, int]

    @property
    def key(self) -> str:
        return f"D{self.index:06d}"

    @property
    def page(self) -> int:
        """What the last question asks for, counted from 0."""
        return self.asked[len(self.entries)]

    @property
    def depth(self) -> float:
        """Where the last answer stands: 0 on the first page, 1 on the last."""
        return self.page / max(1, len(self.entries) - 1)

    @property
    def wanted(self) -> Look:
        """The product on that page."""
        return self.entries[self.page].look

    def candidates(self) -> list[Look]:
        """The products that no earlier question has named: among these someone would guess."""
        named = set(self.asked.values()) - {self.page}
        return [entry.look for page, entry in enumerate(self.entries) if page not in named]


def plan_documents(settings: LongDocumentSettings, num_pages: Mapping[int, int]) -> list[LongDocument]:
    """All documents, split by split, in the order of their shards.

    Args:
        num_pages: length in tokens → pages that a document of it has.
    """
    documents: list[LongDocument] = []
    counts: dict[Split, int] = {"train": settings.train_documents, "validation": settings.validation_documents}
    numbers = itertools.count()
    for split, count in counts.items():
        lengths = [settings.document_tokens[place % len(settings.document_tokens)] for place in range(count)]
        placed = [
            (length, depth)
            for length in dict.fromkeys(lengths)
            for depth in (np.linspace(0, 1, lengths.count(length)) if lengths.count(length) > 1 else [0.5])
        ]
        order = random_stream(settings.seed, ORDER_STREAM, len(documents)).permutation(count)  # no pattern to meet
        for length, depth in (placed[place] for place in order):
            documents.append(_draw_document(settings, next(numbers), split, length, num_pages[length], float(depth)))
    return documents


def _draw_document(
    settings: LongDocumentSettings, index: int, split: Split, length: int, num_pages: int, depth: float
) -> LongDocument:
    rng = random_stream(settings.seed, ENTRY_STREAM, index)
    articles = rng.choice(np.arange(10**4, 10**5), size=num_pages, replace=False).tolist()
    entries = tuple(map(Entry, articles, _different_looks(rng, num_pages)))
    wanted = round(depth * (num_pages - 1))
    asked: dict[int, int] = {}
    for end in range(settings.pages_per_question, num_pages, settings.pages_per_question):
        if left := sorted(set(range(end)) - {wanted, *asked.values()}):
            asked[end] = int(rng.choice(left))
    return LongDocument(index, split, length, entries, asked | {num_pages: wanted})


def _different_looks(rng: np.random.Generator, count: int) -> list[Look]:
    """Products with different titles, each category as often as the next (to within one)."""
    titles = list(itertools.product(COLOURS, PATTERNS, TRIMS))
    drawn = {category: iter(rng.permutation(len(titles)).tolist()) for category in GARMENTS}
    categories: list[str] = []
    while len(categories) < count:
        categories += rng.permutation(list(GARMENTS)).tolist()
    looks = []
    for category in categories[:count]:
        colour, pattern, trim = titles[next(drawn[category])]
        looks.append(Look(category, colour, pattern, trim, limited=bool(rng.random() < LIMITED_FRAC)))
    return looks


def chance(documents: Sequence[LongDocument]) -> dict[str, float]:
    """How often a guess is right that names a random product of the document, by what is asked for (0 to 1).

    Whoever has seen every picture, and only does not know which one is meant, does about as well.
    """
    return {
        "title": fmean(_share(document, "title") for document in documents),
        "category": fmean(_share(document, "category") for document in documents),
    }


def _share(document: LongDocument, what: Literal["title", "category"]) -> float:
    """Share of the candidates that would be a right answer."""
    wanted = getattr(document.wanted, what)
    return fmean(getattr(look, what) == wanted for look in document.candidates())
