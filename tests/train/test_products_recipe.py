"""The original task as a recipe: from the data set by its name, or drawn products, to scores of title and price."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import webdataset
from conftest import REPOSITORY, environment, picture
from loopback import HTML_AS_JPEG, LoopbackServer, status

from phi3v_dist import config
from phi3v_dist.cli import check, prepare
from phi3v_dist.evaluate.score import read_field

NAME = "DBQ/Burberry.Product.prices.United.States"
CONFIGS = REPOSITORY / "launch/configs"
RECIPE = CONFIGS / "products.yaml"
HEADER = RECIPE.read_text().split("run:\n")[0].replace("\\\n#", " ").replace("\n# parallel", " parallel")
SMALL = next(line for line in HEADER.splitlines() if "model.path=" in line)  # the header's command for two cores
TINY = [word for word in shlex.split(SMALL) if "=" in word]
COLOURS = ("red", "green", "blue", "white")
NUM_TITLES = 12


def rows(server: LoopbackServer) -> list[dict[str, Any]]:
    """48 products in the data set's columns: every thing in four colours, prices as people write them; and bad ones."""
    good = [
        {
            "product_code": f"80{title:02}{colour}", "title": f"Trench Coat {title}", "category3_code": "COATS",
            "imageurl": server.url(f"/{title}-{colour}.jpg"), "full_price": f"${1000 + 25 * title:,}.00",
        }
        for title in range(NUM_TITLES)
        for colour in COLOURS
    ]  # fmt: skip
    gone = good[0] | {"title": "Gone", "imageurl": server.url("/gone.jpg")}
    page = good[0] | {"title": "A page", "imageurl": server.url("/page.jpg")}
    free = good[0] | {"title": "Without a price", "full_price": None}
    again = good[1] | {"product_code": "80again"}
    return [gone, *good, page, free, again]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A working folder with the data set imported by the recipe's own command."""
    folder = tmp_path_factory.mktemp("products")
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "data").mkdir()
    (folder / "data/tiny-phi3v").symlink_to(tiny_model)
    photos = {
        f"/{title}-{colour}.jpg": picture(colour, 300 + title, 300) for title in range(NUM_TITLES) for colour in COLOURS
    }
    with LoopbackServer(photos) as server, pytest.MonkeyPatch.context() as patch:
        server.script("/gone.jpg", always=status(404))
        server.script("/page.jpg", always=HTML_AS_JPEG)
        (folder / NAME / "data").mkdir(parents=True)
        table = datasets.Dataset.from_list(rows(server))
        table.to_parquet(str(folder / NAME / "data/train-00000-of-00001.parquet"))
        patch.chdir(folder)
        begin = HEADER.index(f"launch/prepare.py import {NAME}")
        words = shlex.split(HEADER[begin:].splitlines()[0])[1:]
        patch.setattr(sys, "argv", ["prepare.py", *words, "validation_frac=0.3"])
        prepare.run_command()
    return folder


def kept(folder: Path, split: str) -> list[dict[str, Any]]:
    shards = [str(path) for path in sorted((folder / "data/products").glob(f"{split}-*.tar"))]
    return [json.loads(sample["json"]) for sample in webdataset.WebDataset(shards, shardshuffle=False)]


def test_the_named_data_set_is_imported_with_every_loss_named(world: Path) -> None:
    out = world / "data/products"
    manifest = json.loads((out / "import.json").read_text())
    assert manifest["samples"] == NUM_TITLES * len(COLOURS)
    assert manifest["failures"] == {"download": 1, "picture unreadable": 1, "template": 1}
    reasons = (out / "failures.jsonl").read_text()
    assert "404" in reasons and "full_price" in reasons
    assert len((out / "duplicates.jsonl").read_text().splitlines()) == 1


def test_a_thing_in_several_colours_is_in_one_split(world: Path) -> None:
    train, validation = ({row["title"] for row in kept(world, split)} for split in ("train", "validation"))
    assert len(train) + len(validation) == NUM_TITLES and not train & validation
    assert min(len(train), len(validation)) >= 2


def test_the_recipe_trains_on_it_and_scores_every_product(world: Path) -> None:
    words = [word for word in TINY if not word.startswith("eval.reference")]
    short = ["train.epochs=null", "train.steps=2", "eval.max_new_tokens=40", "observe.wandb=disabled"]
    command = [sys.executable, "launch/train.py", "--config", "launch/configs/products.yaml", *words, *short]
    done = subprocess.run(command, cwd=world, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((world / "runs/products/summary.json").read_text())
    products = kept(world, "validation")
    assert summary["eval/samples"] == summary["eval/blind/samples"] == len(products)
    assert {"eval/field_em/category", "eval/anls/title", "eval/parse_fail_pct"} <= set(summary)
    predictions = world / "runs/products/eval/step-000002/predictions.jsonl"
    truths = [json.loads(line)["fields"]["price"]["target"] for line in predictions.read_text().splitlines()]
    written = [float(re.sub(r"[$,]", "", row["full_price"])) for row in products]
    assert sorted(truths) == sorted(written) and all(truths)


def test_the_recipe_takes_the_drawn_products_as_they_are(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("launch", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "sample", "--out", "data/products", "num_products=16"])
    prepare.run_command()
    (tmp_path / "data/tiny-phi3v").symlink_to(tiny_model)
    command = ["check.py", "--config", "launch/configs/products.yaml", "--show-labels", "1", *TINY]
    monkeypatch.setattr(sys, "argv", command)
    check.run_command()
    printed = " ".join(capsys.readouterr().out.split())
    assert "What is shown in this image?" in printed and "⟦Product: " in printed


def test_the_quickstart_asks_for_the_same_fields() -> None:
    assert config.load(CONFIGS / "quickstart.yaml").eval.fields == config.load(RECIPE).eval.fields


@pytest.mark.parametrize(
    ("price", "number"), [("75", 75), ("1290.0", 1290), ("$1,290.00", 1290), ("1 290,50 €", 1290.5), ("soon", None)]
)
def test_a_price_is_read_as_shops_write_it(price: str, number: float | None) -> None:
    answer = f"Product: Coat, Long, Category: COATS, Full Price: {price}\nThat is all."
    fields = config.load(RECIPE).eval.fields
    assert read_field(answer, fields["price"]) == number
    assert (read_field(answer, fields["title"]), read_field(answer, fields["category"])) == ("Coat, Long", "COATS")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config.load(path)
