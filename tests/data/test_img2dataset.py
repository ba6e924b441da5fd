"""Shards as img2dataset writes them are trained on as they are; only the words of question and answer are set."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, environment
from loopback import HTML_AS_JPEG, RESET, LoopbackServer, drop_after, status
from PIL import Image

from phi3v_dist.config import load
from phi3v_dist.observe.tracker import read_metrics
from phi3v_dist.run import Data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_PICTURES = 40
BAD = {3: status(404), 7: HTML_AS_JPEG, 11: RESET, 19: drop_after(500)}
NO_CAPTION = 23
INSTALL_S, RUN_S = 600, 240


def picture(number: int) -> bytes:
    """One colour, another for each number; sizes differ."""
    file = io.BytesIO()
    Image.new("RGB", (200 + 5 * number, 300 - 3 * number), colour(number)).save(file, "JPEG", quality=95)
    return file.getvalue()


def colour(number: int) -> tuple[int, int, int]:
    return 6 * number, 250 - 6 * number, 90


def caption(number: int) -> str:
    return "" if number == NO_CAPTION else f"a plain card, number {number}, with <|end|> and {{{{ braces }}}}"


@pytest.fixture(scope="module")
def img2dataset(tmp_path_factory):
    """The program from PyPI, in an environment of its own."""
    folder = tmp_path_factory.mktemp("img2dataset")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "img2dataset"]
    try:
        done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"img2dataset cannot be installed within {INSTALL_S} s")
    if done.returncode:
        pytest.skip(f"img2dataset cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    yield folder / "bin/img2dataset"
    shutil.rmtree(folder)  # 800 MB


@pytest.fixture(scope="module")
def foreign_shards(img2dataset, tmp_path_factory) -> Path:
    """What the program makes of a list of URLs, some of which are bad."""
    folder = tmp_path_factory.mktemp("foreign")
    with LoopbackServer({f"/{number}.jpg": picture(number) for number in range(NUM_PICTURES)}) as server:
        for number, fault in BAD.items():
            server.script(f"/{number}.jpg", always=fault)
        with (folder / "list.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["url", "caption", "price"])
            rows.writerows([server.url(f"/{n}.jpg"), caption(n), f"{n}.50"] for n in range(NUM_PICTURES))
        words = [img2dataset, "--url_list", folder / "list.csv", "--input_format", "csv", "--url_col", "url"]
        words += ["--caption_col", "caption", "--save_additional_columns", '["price"]', "--image_size", "224"]
        words += ["--output_format", "webdataset", "--output_folder", folder / "shards", "--processes_count", "1"]
        words += ["--thread_count", "4", "--number_sample_per_shard", "16", "--timeout", "3", "--retries", "1"]
        quiet = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}  # both would call home
        done = subprocess.run(words, capture_output=True, text=True, timeout=RUN_S, env=quiet)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "shards"


@pytest.fixture
def source_tree(settings_tree, foreign_shards) -> dict:
    """Settings of a short run on these shards."""
    source = {"shards": f"{foreign_shards}/{{00000..00002}}.tar", "prompt": "What is shown?"}
    settings_tree["data"] |= {"train": [source | {"answer": "{{ text }} for {{ price }}"}], "validation": []}
    return settings_tree


def written(tree: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def good_numbers() -> list[int]:
    return [number for number in range(NUM_PICTURES) if number not in BAD]


@pytest.mark.parametrize("answer", ["{{ text }}", "{{ caption }}"])
@pytest.mark.supports("img2dataset", on="one process")
def test_every_good_sample_is_decoded_with_its_own_picture_and_words(source_tree, tmp_path, answer):
    source_tree["data"]["train"][0]["answer"] = answer
    settings = load(written(source_tree, tmp_path / "config.yaml"), [])
    data = Data.open(settings.data.train, settings)
    assert len(data.table) == len(good_numbers())
    found = []
    for sample_id in range(len(data.table)):
        sample = data.decoder.sample(sample_id)
        question, words = sample.messages[0].parts, "".join(sample.messages[1].parts)
        assert question == (0, "What is shown?")
        number = int(re.search(r"number (\d+)", words).group(1)) if words else NO_CAPTION
        assert words == caption(number)
        assert sample.images[0].shape == (224, 224, 3)
        middle = sample.images[0][112, 112].astype(int)
        assert np.abs(middle - colour(number)).max() <= 4  # two JPEG encodings; measured: 2
        found.append(number)
        if words:
            example = data.decoder.example(sample_id, int(data.lengths.tokens[sample_id]))
            assert (example.labels >= 0).any()
    assert sorted(found) == good_numbers()


def test_a_model_is_trained_on_them(source_tree, tmp_path):
    source_tree["train"]["steps"] = 4
    config = written(source_tree, tmp_path / "config.yaml")
    words = [sys.executable, "launch/train.py", "--config", str(config)]
    done = subprocess.run(
        words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=RUN_S
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"of {len(good_numbers())} samples in 3 shards" in done.stdout
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "runs/run") if "train/loss" in row]
    assert len(losses) == 4 and np.isfinite(losses).all()
