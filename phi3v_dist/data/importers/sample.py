"""`CatalogueSettings` → a drawn product catalogue as ordinary WebDataset shards.

What comes in: how large and how varied it shall be. What goes out: OUT/train-SOURCE-000000.tar, …,
OUT/validation-SOURCE-000000.tar, …, and OUT/catalogue.json with the price rule and the best scores that anyone could
reach on the validation products. Surprise: it goes on where it was interrupted (catalogue/folder.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.table import Table

from phi3v_dist.data.importers.catalogue.drawing import contact_sheet, draw_any_size
from phi3v_dist.data.importers.catalogue.folder import JPEG_QUALITY, claim, encode_photo, write_shard
from phi3v_dist.data.importers.catalogue.garments import GARMENTS
from phi3v_dist.data.importers.catalogue.plan import (
    PHOTO_STREAM,
    WORD_STREAM,
    CatalogueSettings,
    Product,
    expected_price,
    plan_products,
    price_rule,
    random_stream,
)
from phi3v_dist.data.importers.catalogue.words import conversation, vocabulary_text

__all__ = ["CatalogueReport", "CatalogueSettings", "contact_sheet", "vocabulary_text", "write_catalogue"]

VERSION = 1  # of what is drawn and of catalogue.json; a folder of another version is drawn anew, into another place
DESCRIPTION_NAME = "catalogue.json"
MAX_PHOTOS = 4
WITHIN_FRAC = 0.10


@dataclass(frozen=True)
class CatalogueReport:
    """What is in the shards, and the best that can be reached on the validation products.

    counts: split → source → category → products. kinds: split → kind of sample → products.
    best_price_mae, best_price_median_ape_pct, best_price_within_10pct (a share, 0 to 1): the scores of answers that
        follow the price rule, so that only its noise is left. None without validation products.
    """

    counts: dict[str, dict[str, dict[str, int]]]
    kinds: dict[str, dict[str, int]]
    shards: tuple[Path, ...]
    best_price_mae: float | None
    best_price_median_ape_pct: float | None
    best_price_within_10pct: float | None

    def table(self) -> Table:
        """Products by category, split and source, and below them the best reachable price error."""
        columns = [(split, source) for split, sources in self.counts.items() for source in sources]
        table = Table("category", title="products", show_footer=True)
        table.columns[0].footer = "all"
        for split, source in columns:
            total = sum(self.counts[split][source].values())
            table.add_column(f"{split}\n{source}", f"{total:,}", justify="right")
        for category in GARMENTS:
            table.add_row(category, *(f"{self.counts[split][source][category]:,}" for split, source in columns))
        if self.best_price_mae is not None and self.best_price_within_10pct is not None:
            table.caption = (
                f"best reachable: price MAE {self.best_price_mae:.1f}, median error "
                f"{self.best_price_median_ape_pct:.1f} %, within 10 % {100 * self.best_price_within_10pct:.0f} %"
            )
        return table


def write_catalogue(
    out: Path, settings: CatalogueSettings, progress: Callable[[int, int], None] | None = None
) -> CatalogueReport:
    """Draw the catalogue into `out`, or what is missing of it.

    Args:
        progress: told (samples done, samples in all) after every sample and every shard found done.

    Raises:
        DataError: the folder holds shards that are not of this catalogue.
    """
    products = plan_products(settings)
    shards = dict(_shards(out, products, settings.samples_per_shard))
    report = _report(products, tuple(shards))
    unfinished = claim(out, DESCRIPTION_NAME, _description(settings, report))
    done = 0
    for shard, members in shards.items():
        drawn = ({"__key__": member.product_id, **_members(member, settings)} for member in members)
        for number in range(1, len(members) + 1) if shard.exists() else write_shard(shard, drawn):
            if progress:
                progress(done + number, len(products))
        done += len(members)
    unfinished.replace(out / DESCRIPTION_NAME)
    return report


def _shards(out: Path, products: Sequence[Product], samples_per_shard: int) -> Iterator[tuple[Path, list[Product]]]:
    """Each shard and what is in it; products come split by split and source by source."""
    for split, source in dict.fromkeys((product.split, product.source) for product in products):
        members = [product for product in products if (product.split, product.source) == (split, source)]
        for number, begin in enumerate(range(0, len(members), samples_per_shard)):
            yield out / f"{split}-{source}-{number:06d}.tar", members[begin : begin + samples_per_shard]


def _description(settings: CatalogueSettings, report: CatalogueReport) -> dict[str, Any]:
    """catalogue.json."""
    best = {name: value for name, value in asdict(report).items() if name.startswith("best_") and value is not None}
    facts = {"price_rule": price_rule(), "counts": report.counts, "kinds": report.kinds}
    return {"version": VERSION, **best, **facts, "jpeg_quality": JPEG_QUALITY, "settings": asdict(settings)}


def _report(products: Sequence[Product], shards: tuple[Path, ...]) -> CatalogueReport:
    counts: dict[str, dict[str, dict[str, int]]] = {}
    kinds: dict[str, dict[str, int]] = {}
    for product in products:
        of_source = counts.setdefault(product.split, {}).setdefault(product.source, dict.fromkeys(GARMENTS, 0))
        of_source[product.look.category] += 1
        of_split = kinds.setdefault(product.split, {})
        of_split[product.kind] = of_split.get(product.kind, 0) + 1
    held_out = [product for product in products if product.split == "validation"]
    errors = [abs(product.full_price - round(expected_price(product.look))) for product in held_out]
    shares = [error / product.full_price for error, product in zip(errors, held_out, strict=True)]
    if not held_out:
        return CatalogueReport(counts, kinds, shards, None, None, None)
    return CatalogueReport(
        counts, kinds, shards,
        best_price_mae=fmean(errors),
        best_price_median_ape_pct=100 * median(shares),
        best_price_within_10pct=fmean(share <= WITHIN_FRAC for share in shares),
    )  # fmt: skip


def _members(product: Product, settings: CatalogueSettings) -> dict[str, Any]:
    """The sample's files by extension; the writer turns `json` into bytes."""
    rng = random_stream(settings.seed, WORD_STREAM, product.index)
    num_photos = {"photo": 1, "photos": int(rng.integers(2, MAX_PHOTOS + 1))}.get(product.kind, 0)
    extension = "jpg" if settings.image_format == "jpeg" else "png"
    photos = {f"{view}.{extension}": _photo(product, view, settings) for view in range(num_photos)}
    record = {
        "messages": conversation(product, list(photos), settings, rng),
        "title": product.look.title,
        "category3_code": product.look.category,
        "full_price": product.full_price,
        "product_id": product.product_id,
    }
    return {**photos, "json": record}


def _photo(product: Product, view: int, settings: CatalogueSettings) -> bytes:
    """One photo as a file, of random size and shape within the settings."""
    rng = random_stream(settings.seed, PHOTO_STREAM, product.index, view)
    photo = draw_any_size(product.look, rng, settings.image_side_px, settings.aspect_ratio)
    return encode_photo(photo, settings.image_format)
