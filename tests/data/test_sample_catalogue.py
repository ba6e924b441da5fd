"""The drawn catalogue: what is in its shards, and that its settings do what they say."""

import io
import itertools
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import webdataset
from PIL import Image

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.importers.catalogue.drawing import View, contact_sheet, draw_photo, fabric_mask
from phi3v_dist.data.importers.catalogue.garments import COLOURS, GARMENTS, PATTERNS, TRIMS, Look
from phi3v_dist.data.importers.catalogue.plan import expected_price, plan_products, price_rule
from phi3v_dist.data.importers.sample import CatalogueSettings, vocabulary_text, write_catalogue
from phi3v_dist.data.samples import decode_sample
from phi3v_dist.errors import ConfigError, DataError

SMALL = CatalogueSettings(num_products=48, validation_frac=0.34, samples_per_shard=10, image_side_px=(64, 80))
ALL_LOOKS = [Look(*choice) for choice in itertools.product(GARMENTS, COLOURS, PATTERNS, TRIMS, (False, True))]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("catalogue")
    write_catalogue(out, SMALL)
    return out


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def samples(folder: Path, split: str = "*", **settings: object) -> list[dict]:
    """The samples of a folder, as the plain webdataset library reads them; written first if settings are given."""
    if settings:
        write_catalogue(folder, replace(SMALL, **settings))
    shards = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))


def question(sample: dict) -> str:
    return sample["json"]["messages"][0]["content"][-1]["text"]


def num_photos(sample: dict) -> int:
    return sum(name.endswith((".jpg", ".png")) for name in sample)


def test_the_webdataset_library_reads_every_product_with_its_photo(catalogue: Path) -> None:
    found = samples(catalogue)
    assert len(found) == SMALL.num_products
    for sample in found:
        record = sample["json"]
        shown, answered = (turn["content"] for turn in record["messages"])
        assert [part["type"] for part in shown] == ["image", "text"]
        assert isinstance(sample[shown[0]["image"]], Image.Image)
        title, category, price = record["title"], record["category3_code"], record["full_price"]
        assert answered[0]["text"] == f"Product: {title}, Category: {category}, Full Price: {price}"
        assert record["product_id"] == sample["__key__"] and "." not in sample["__key__"]


def test_our_own_reader_makes_conversations_of_them(catalogue: Path) -> None:
    shard = catalogue / "validation-catalogue-000000.tar"
    sample = next(iter(webdataset.WebDataset(str(shard), shardshuffle=False)))
    members = {name: data for name, data in sample.items() if not name.startswith("__")}
    source = SourceSettings(shards=[str(shard)])
    read = decode_sample(0, str(shard), sample["__key__"], "catalogue", source, members, ["0.jpg"])
    assert read.messages[0].parts == (0, "What is shown in this image?")
    assert read.images[0].shape[:2] == Image.open(io.BytesIO(members["0.jpg"])).size[::-1]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(catalogue: Path, tmp_path: Path) -> None:
    write_catalogue(tmp_path / "again", SMALL)
    write_catalogue(tmp_path / "other", replace(SMALL, seed=1))
    written = tars(catalogue)
    assert tars(tmp_path / "again") == written
    assert (tmp_path / "again/catalogue.json").read_bytes() == (catalogue / "catalogue.json").read_bytes()
    other = tars(tmp_path / "other")
    assert other.keys() == written.keys() and all(other[name] != data for name, data in written.items())


def test_nothing_of_the_clock_or_the_user_is_in_a_tar(catalogue: Path) -> None:
    with tarfile.open(catalogue / "train-catalogue-000000.tar") as tar:
        owners = {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in tar}
    assert owners == {(0, 0, 0, "bigdata", "bigdata")}


def test_an_interrupted_catalogue_goes_on_and_ends_as_an_uninterrupted_one(catalogue: Path, tmp_path: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_catalogue(tmp_path, SMALL, stop)
    assert not (tmp_path / "catalogue.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert len(kept) == 2
    calls: list[tuple[int, int]] = []
    write_catalogue(tmp_path, SMALL, lambda done, total: calls.append((done, total)))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert tars(tmp_path) == tars(catalogue)
    assert {path.name for path in tmp_path.iterdir()} == {*tars(catalogue), "catalogue.json"}
    assert calls == [(number, SMALL.num_products) for number in range(1, SMALL.num_products + 1)]


def test_a_folder_with_other_shards_is_refused(catalogue: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"other settings \(num_products, seed\)"):
        write_catalogue(catalogue, replace(SMALL, num_products=56, seed=3))
    (tmp_path / "train-000.tar").write_bytes(b"somebody's")
    with pytest.raises(DataError, match="not ours"):
        write_catalogue(tmp_path, SMALL)


def test_categories_are_balanced_in_every_split_source_and_kind() -> None:
    settings = replace(
        SMALL, num_products=803, multi_image_frac=0.2, text_only_frac=0.2, sources={"studio": 2.0, "street": 1.0}
    )
    groups: dict[tuple[str, str, str], Counter[str]] = {}
    for product in plan_products(settings):
        counter = groups.setdefault((product.split, product.source, product.kind), Counter(dict.fromkeys(GARMENTS, 0)))
        counter[product.look.category] += 1
    assert len(groups) == 2 * (3 + 2)
    assert all(max(counter.values()) - min(counter.values()) <= 2 for counter in groups.values())


def test_no_product_is_in_both_splits(catalogue: Path) -> None:
    ids = {split: {s["json"]["product_id"] for s in samples(catalogue, split)} for split in ("train", "validation")}
    assert (len(ids["train"]), len(ids["validation"])) == (32, 16)
    assert not ids["train"] & ids["validation"]


@pytest.mark.parametrize(("num_products", "validation_frac"), [(16, 0.01), (16, 0.9), (23, 0.5), (8, 0.0)])
def test_both_splits_have_every_category_however_small(num_products: int, validation_frac: float) -> None:
    products = plan_products(replace(SMALL, num_products=num_products, validation_frac=validation_frac))
    splits = {"train", "validation"} if validation_frac else {"train"}
    seen = {split: {p.look.category for p in products if p.split == split} for split in splits}
    assert len(products) == num_products and all(seen["train"] == categories for categories in seen.values())


def test_neighbours_half_a_turn_apart_are_no_more_alike_than_chance() -> None:
    order = [product.look.category for product in plan_products(CatalogueSettings()) if product.split == "validation"]
    half = len(order) // 2
    alike = fmean(a == b for a, b in zip(order, order[half:] + order[:half], strict=True))
    assert abs(alike - 1 / len(GARMENTS)) < 0.1  # what the blind control pairs


def test_every_look_has_a_title_of_its_own() -> None:
    assert len({(look.title, look.category) for look in ALL_LOOKS}) == len(ALL_LOOKS)
    assert Look("DRESSES", "Red", "stripes", "bow", True).title == "Limited Red Striped Dress with Bow"
    assert Look("HATS", "Black", "plain", "none", False).title == "Black Hat"


def test_the_price_rule_gives_the_best_reachable_scores_that_are_printed(catalogue: Path) -> None:
    assert expected_price(Look("COATS", "Red", "check", "gold", True)) == pytest.approx(600 * 1.2 * 1.15 * 1.15)
    rule = {(look.title, look.category): round(expected_price(look)) for look in ALL_LOOKS}
    records = [sample["json"] for sample in samples(catalogue, "validation")]
    errors = [abs(rule[r["title"], r["category3_code"]] - r["full_price"]) for r in records]
    shares = [error / record["full_price"] for error, record in zip(errors, records, strict=True)]
    report = write_catalogue(catalogue, SMALL)
    written = json.loads((catalogue / "catalogue.json").read_text())
    assert written["best_price_mae"] == report.best_price_mae == pytest.approx(fmean(errors))
    assert written["best_price_median_ape_pct"] == pytest.approx(100 * np.median(shares))
    assert written["best_price_within_10pct"] == pytest.approx(fmean(share <= 0.1 for share in shares))
    assert written["price_rule"] == price_rule() and "coats 600" in price_rule()
    assert f"price MAE {report.best_price_mae:.1f}" in str(report.table().caption)


def test_prices_follow_the_rule_but_for_three_percent() -> None:
    products = plan_products(CatalogueSettings())
    noise = [np.log(product.full_price / expected_price(product.look)) for product in products]
    assert abs(fmean(noise)) < 0.002 and stdev(noise) == pytest.approx(0.03, rel=0.1)
    between = {c: fmean(p.full_price for p in products if p.look.category == c) for c in GARMENTS}
    explained = np.var([between[p.look.category] for p in products]) / np.var([p.full_price for p in products])
    assert explained > 0.9  # the category is what is most worth seeing


def test_a_price_does_not_move_when_another_setting_does() -> None:
    small, large = ({p.index: (p.look, p.full_price) for p in plan_products(s)} for s in (SMALL, CatalogueSettings()))
    assert small == {index: large[index] for index in small}


@pytest.mark.parametrize(("name", "value"), [
    ("category", "BAGS"), ("colour", "Blue"), ("pattern", "check"), ("trim", "gold"), ("limited", True),
])  # fmt: skip
def test_everything_that_is_asked_changes_the_photo(name: str, value: object) -> None:
    look = Look("COATS", "Red", "plain", "none", False)
    one, other = (
        np.asarray(draw_photo(seen, np.random.default_rng(0), 112, 112), dtype=np.int16)
        for seen in (look, replace(look, **{name: value}))
    )
    changed = (np.abs(one - other).max(axis=-1) > 60).mean()
    assert changed > (0.01 if name == "limited" else 0.03)


@pytest.mark.parametrize("category", GARMENTS)
def test_a_garment_fills_its_frame(category: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = fabric_mask(GARMENTS[category], View.random(rng, 112, 112), (112, 112))
        left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
        assert max(right - left, bottom - top) >= 0.65 * 112  # cloth alone, without strap or sole
        assert np.asarray(mask).mean() / 255 > 0.15


def test_two_photos_of_one_look_differ() -> None:
    rng, look = np.random.default_rng(0), ALL_LOOKS[0]
    assert draw_photo(look, rng, 64, 64).tobytes() != draw_photo(look, rng, 64, 64).tobytes()


def test_photos_have_the_sizes_and_shapes_asked_for(tmp_path: Path) -> None:
    asked = {"image_side_px": (70, 120), "aspect_ratio": (0.5, 2.0), "image_format": "png"}
    sizes = [sample["0.png"].size for sample in samples(tmp_path, **asked)]
    assert all(70 <= max(size) <= 120 for size in sizes)
    ratios = [width / height for width, height in sizes]
    assert 0.48 < min(ratios) < 0.7 and 1.4 < max(ratios) < 2.1


def test_a_share_of_the_samples_shows_several_photos(tmp_path: Path) -> None:
    found = samples(tmp_path, multi_image_frac=0.5)
    several = [sample for sample in found if num_photos(sample) > 1]
    assert len(several) == 24 and {num_photos(sample) for sample in several} == {2, 3, 4}
    for sample in several:
        shown = [part["image"] for part in sample["json"]["messages"][0]["content"][:-1]]
        assert shown == [f"{view}.jpg" for view in range(num_photos(sample))]
        assert sample["0.jpg"].tobytes() != sample["1.jpg"].tobytes()


def test_words_only_samples_are_for_training_and_can_be_answered_from_their_words(tmp_path: Path) -> None:
    asked = {"text_only_frac": 0.25, "document_frac": 0.25, "document_words": (200, 400)}
    found = samples(tmp_path, "train", **asked)
    words_only = [sample for sample in found if num_photos(sample) == 0]
    pages = [sample for sample in words_only if "on this page" in question(sample)]
    assert (len(found), len(words_only), len(pages)) == (32, 16, 8)
    assert all(num_photos(sample) == 1 for sample in samples(tmp_path, "validation"))
    for sample in pages:
        *lines, asks = question(sample).split("\n")
        assert 170 <= sum(len(line.split()) for line in lines) <= 400
        article = asks.removeprefix("Which product is article ").split()[0]
        record = sample["json"]
        answers = [line for line in lines if line.startswith(f"Article {article}:")]
        assert answers == [f"Article {article}: {record['title']}, {record['category3_code']}, {record['full_price']}."]
    for sample in words_only:
        assert str(sample["json"]["full_price"]) in question(sample)


def test_a_note_has_the_words_asked_for_and_gives_nothing_away(tmp_path: Path) -> None:
    found = samples(tmp_path, note_words=(5, 30))
    notes = [question(sample).split("\n")[1] for sample in found]
    lengths = {len(note.split()) for note in notes}
    assert min(lengths) >= 5 and max(lengths) <= 30 and len(lengths) > 10
    telling = {*COLOURS, *GARMENTS, *(garment.noun for garment in GARMENTS.values())}
    assert not telling & {word.strip(".,;") for note in notes for word in note.split()}


def test_sources_have_shards_of_their_own_in_proportion_to_their_weights(tmp_path: Path) -> None:
    report = write_catalogue(tmp_path, replace(SMALL, sources={"studio": 3.0, "street": 1.0}))
    num = {source: sum(counts.values()) for source, counts in report.counts["train"].items()}
    assert num == {"studio": 24, "street": 8}
    assert len(samples(tmp_path, "train-street")) == 8
    assert sorted(path.name for path in report.shards) == sorted(tars(tmp_path))


def test_all_wrong_settings_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(SMALL, num_products=3, image_side_px=(9, 3), text_only_frac=0.6, document_frac=0.6, sources={"A/": 0.0})
    text = caught.value.report()
    assert len(caught.value.problems) == 4
    assert all(name in text for name in ("num_products=3", "image_side_px=9, 3", "more than 1", "'A/'"))


def test_the_vocabulary_has_every_word_of_a_catalogue(tmp_path: Path) -> None:
    known = {word.strip(".,:;?") for sentence in vocabulary_text() for word in sentence.split()}
    shown = samples(tmp_path, text_only_frac=0.3, document_frac=0.3, document_words=(300, 300), note_words=(40, 40))
    said = {
        word.strip(".,:;?")
        for sample in shown
        for turn in sample["json"]["messages"]
        for part in turn["content"] if part["type"] == "text"
        for word in part["text"].split()
    }  # fmt: skip
    assert {word for word in said - known if not word.isdigit()} == set()


def test_a_contact_sheet_shows_each_category_in_its_column() -> None:
    sheet = contact_sheet(num=16, side=40)
    assert sheet.size == (8 * 40, 2 * 40)
    assert sheet.tobytes() == contact_sheet(num=16, side=40).tobytes()
    assert sheet.tobytes() != contact_sheet(num=16, side=40, seed=1).tobytes()
