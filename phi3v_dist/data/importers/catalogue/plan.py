"""`CatalogueSettings` → every `Product` of the catalogue: its look, its price, and the split and source it belongs to.

What comes in: a few numbers. What goes out: products in the order of their shards. Surprise: colour is worth nothing;
every other thing that can be seen has its factor in the price (`expected_price`), and what is left is a few percent of
noise. So the best error that anyone could reach is known before a single photo is drawn.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from phi3v_dist.data.importers.catalogue.garments import COLOURS, GARMENTS, PATTERNS, TRIMS, Look
from phi3v_dist.errors import ConfigError

BASE_PRICES = {
    "HATS": 70, "SCARVES": 110, "UMBRELLAS": 160, "TROUSERS": 230, "SHOES": 310, "DRESSES": 400, "BAGS": 500,
    "COATS": 600,
}  # fmt: skip
PATTERN_FACTORS = {"plain": 1.0, "stripes": 1.06, "dots": 1.12, "check": 1.2}
TRIM_FACTORS = {"none": 1.0, "bow": 1.08, "gold": 1.15}
LIMITED_FACTOR = 1.15
PRICE_NOISE_FRAC = 0.03
LIMITED_FRAC = 0.3

Split = Literal["train", "validation"]
Kind = Literal["photo", "photos", "card", "page"]
Name = TypeVar("Name", bound=str)

# What a random stream is for. With seed and product number it names the stream, so no draw moves another.
SPLIT_STREAM, LOOK_STREAM, PHOTO_STREAM, WORD_STREAM = range(4)


@dataclass(frozen=True)
class CatalogueSettings:
    """How large and how varied the catalogue is. Every product becomes one sample of one split."""

    num_products: int = 2400
    """Categories are balanced to within one product, in every split, source and kind of sample."""
    seed: int = 0
    """The same seed and settings give the same bytes."""
    validation_frac: float = 0.1
    """Share of the products kept for validation. Their samples all have photos, so that all can be scored."""
    samples_per_shard: int = 256
    image_format: Literal["jpeg", "png"] = "jpeg"
    """JPEG is written at quality 90 with 4:2:0 colour."""
    image_side_px: tuple[int, int] = (336, 400)
    """Smallest and largest longer side of a photo."""
    aspect_ratio: tuple[float, float] = (0.85, 1.18)
    """Smallest and largest width / height."""
    note_words: tuple[int, int] = (0, 0)
    """Fewest and most words of a seller's note below the question; it tells nothing about the product."""
    multi_image_frac: float = 0.0
    """Share of the samples that show 2 to 4 photos of their product."""
    text_only_frac: float = 0.0
    """Share of the training samples that have a short card in words and no photo."""
    document_frac: float = 0.0
    """Share of the training samples that have a long page in words, with the product in one of its lines."""
    document_words: tuple[int, int] = (2000, 6000)
    """Fewest and most words of such a page, evenly spread on a logarithmic scale."""
    sources: Mapping[str, float] = field(default_factory=lambda: {"catalogue": 1.0})
    """Source → weight. Each has shards of its own and its share of both splits."""

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise ConfigError([f"sample catalogue: {problem}" for problem in problems])


def _problems(settings: CatalogueSettings) -> Iterator[str]:
    """A message for every setting that cannot be."""
    fewest = 2 * len(GARMENTS) if settings.validation_frac else len(GARMENTS)
    if settings.num_products < fewest:
        yield f"num_products={settings.num_products} is too few; {fewest} put each category into each split"
    if settings.samples_per_shard < 1:
        yield f"samples_per_shard={settings.samples_per_shard} must be at least 1"
    if settings.image_format not in ("jpeg", "png"):
        yield f"image_format={settings.image_format!r} must be jpeg or png"
    for name in ("validation_frac", "multi_image_frac", "text_only_frac", "document_frac"):
        if not 0 <= getattr(settings, name) <= (0.9 if name == "validation_frac" else 1):
            yield f"{name}={getattr(settings, name)} must be a share between 0 and 1 (0.9 for validation)"
    if settings.text_only_frac + settings.document_frac > 1:
        yield "text_only_frac and document_frac together are more than 1"
    for name, lowest in (("image_side_px", 64), ("aspect_ratio", 0.2), ("note_words", 0), ("document_words", 100)):
        low, high = getattr(settings, name)
        if not lowest <= low <= high:
            yield f"{name}={low}, {high} must be two numbers of at least {lowest}, the smaller one first"
    for source, weight in settings.sources.items():
        if not re.fullmatch(r"[a-z0-9_]+", source) or not weight > 0:
            yield f"source {source!r} with weight {weight}: names are a-z, 0-9 and _, weights above 0"
    if not settings.sources:
        yield "sources is empty; name at least one with a weight"


@dataclass(frozen=True)
class Product:
    """One entry of the catalogue.

    kind: what its sample holds: a photo, several photos, a card in words, or a long page in words.
    full_price: what it costs, noise included.
    """

    index: int
    split: Split
    source: str
    kind: Kind
    look: Look
    full_price: int

    @property
    def product_id(self) -> str:
        return f"P{self.index:06d}"


def expected_price(look: Look) -> float:
    """The price rule: no noise, not yet rounded."""
    factor = PATTERN_FACTORS[look.pattern] * TRIM_FACTORS[look.trim] * (LIMITED_FACTOR if look.limited else 1.0)
    return BASE_PRICES[look.category] * factor


def price_rule() -> str:
    """The same in words."""
    bases, patterns, trims = (
        ", ".join(f"{name.lower()} {number:g}" for name, number in table.items())
        for table in (BASE_PRICES, PATTERN_FACTORS, TRIM_FACTORS)
    )
    return (
        f"base by category ({bases}) x pattern ({patterns}) x trim ({trims}) x {LIMITED_FACTOR:g} for a limited "
        f"edition (black tag) x noise (log-normal, sigma {PRICE_NOISE_FRAC:g}), rounded to whole units; "
        "the colour is free"
    )


def random_stream(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """The generator for one purpose, product and photo."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *numbers)))


def random_look(rng: np.random.Generator, category: str) -> Look:
    """A product of this category, everything else drawn."""
    colour, pattern, trim = (list(table)[rng.integers(len(table))] for table in (COLOURS, PATTERNS, TRIMS))
    return Look(category, colour, pattern, trim, limited=bool(rng.random() < LIMITED_FRAC))


def plan_products(settings: CatalogueSettings) -> list[Product]:
    """All products, split by split and source by source, in the order of their shards.

    Consecutive numbers go through the categories; splits, sources and kinds are cut from such blocks. Within a source
    the order is random: whoever pairs or skips through it (the blind control does) must not meet a pattern.
    """
    rng = random_stream(settings.seed, SPLIT_STREAM)
    size = len(GARMENTS)
    blocks = np.array_split(np.arange(settings.num_products), range(size, settings.num_products - size + 1, size))
    blocks = [blocks[i] for i in rng.permutation(len(blocks))]
    wanted = round(settings.validation_frac * len(blocks))
    num_validation = min(max(1, wanted), len(blocks) - 1) if settings.validation_frac else 0
    words: dict[Kind, float] = {"card": settings.text_only_frac, "page": settings.document_frac}
    photos: dict[Kind, float] = {"photo": 1 - settings.multi_image_frac, "photos": settings.multi_image_frac}
    shown = 1 - sum(words.values())
    plan: tuple[tuple[Split, list[np.ndarray], dict[Kind, float]], ...] = (
        ("train", blocks[num_validation:], {kind: shown * share for kind, share in photos.items()} | words),
        ("validation", blocks[:num_validation], photos),
    )
    products: list[Product] = []
    for split, part, kinds in plan:
        indexes = [int(index) for block in part for index in block]
        for source, of_source in _cut(indexes, settings.sources).items():
            kind_of = {index: kind for kind, of_kind in _cut(of_source, kinds).items() for index in of_kind}
            for index in rng.permutation(of_source).tolist():
                products.append(_draw_product(settings.seed, index, split, source, kind_of[index]))
    return products


def _draw_product(seed: int, index: int, split: Split, source: str, kind: Kind) -> Product:
    rng = random_stream(seed, LOOK_STREAM, index)
    look = random_look(rng, list(GARMENTS)[index % len(GARMENTS)])
    price = expected_price(look) * np.exp(PRICE_NOISE_FRAC * rng.standard_normal())
    return Product(index, split, source, kind, look, full_price=round(price))


def _cut(items: Sequence[int], shares: Mapping[Name, float]) -> dict[Name, list[int]]:
    """Items in consecutive pieces, in proportion to the shares and exact to one item."""
    ends = np.cumsum(list(shares.values())) / sum(shares.values()) * len(items)
    pieces = np.split(np.asarray(items, dtype=np.int64), ends.round().astype(int)[:-1])
    return {name: piece.tolist() for name, piece in zip(shares, pieces, strict=True)}
