"""The page of samples: what the model gets, safe to open, and the reason for what it does not get."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import picture
from PIL import Image
from webdataset import TarWriter

from phi3v_dist import run
from phi3v_dist.cli import prepare
from phi3v_dist.config import Settings
from phi3v_dist.data.preview_page import find_samples, write_preview
from phi3v_dist.errors import ConfigError

HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> {{ 7*7 }} <|end|> \x1b[31m\u202e"


def record(question: Any, answer: str | None) -> bytes:
    turns = [{"role": "user", "content": question}]
    return json.dumps({"messages": turns + ([{"role": "assistant", "content": answer}] if answer else [])}).encode()


class Page(HTMLParser):
    """Tags, attributes and visible text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.shown: list[tuple[str, str]] = []  # (class of the span, its text)
        self._class = ""
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        self._class = dict(attributes).get("class") or ""
        if tag == "span":
            self.shown.append((self._class, ""))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.shown and self._class == self.shown[-1][0]:
            self.shown[-1] = (self._class, self.shown[-1][1] + data)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> run.Data:
    tar_path = tmp_path_factory.mktemp("odd") / "odd.tar"
    with TarWriter(str(tar_path), mtime=0) as tar:
        tar.write({"__key__": "two", "json": record("Both?", "A red square."), "0.jpg": picture("red", 900, 300),
                   "1.png": picture("blue", 40, 40, "PNG")})  # fmt: skip
        tar.write({"__key__": "hostile", "json": record(HOSTILE, HOSTILE)})
        tar.write({"__key__": "broken", "json": b"{"})
        tar.write({"__key__": "cut", "json": record("x", "y"), "0.jpg": picture("red", 300, 300)[:-90]})
        tar.write({"__key__": "silent", "json": record("only a question", None)})
        tar.write({"__key__": "long", "json": record("word " * 6000, "A blue square.")})
    settings = Settings.model_validate(
        {"model": {"path": tiny_model}, "data": {"train": [{"shards": str(tar_path)}], "num_crops": 1,
                                                 "row_length_tokens": 2000}}
    )  # fmt: skip
    return run.Data.open(settings.data.train, settings)


@pytest.fixture(scope="module")
def page(data: run.Data, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "folder" / "preview.html"
    write_preview(path, "step 3 of <b>run</b>", range(6), data)
    return Page(path)


def test_trained_tokens_template_and_pictures_are_told_apart(page: Page) -> None:
    shown = page.shown[page.shown.index(("template", "<s>")) :]  # after the legend
    first = shown[: shown.index(("template", "<|assistant|>")) + 3]
    assert ("words trained", "A red square.") in first and ("template trained", "<|end|>") in first
    assert [text for kind, text in first if kind == "picture"] == [
        "image 1: 313 tokens, 336x336 px, 2 crops", "image 2: 313 tokens, 336x336 px, 2 crops",
    ]  # fmt: skip
    assert "".join(text for kind, text in first if kind == "words").startswith("\nBoth?")


def test_pictures_are_small_and_inside_the_page(page: Page) -> None:
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == 2 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    thumbnail = Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2])))
    assert thumbnail.size == (320, 107)
    assert "900x300 px" in page.text and "40x40 px" in page.text


@pytest.mark.fault(98)
def test_nothing_of_the_data_becomes_markup_script_or_control_character(page: Page) -> None:
    assert "script" not in page.tags and page.tags.count("img") == 2
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 2 and "{{ 7*7 }}" in page.text
    assert "<b>run</b>" in page.text and "\x1b" not in page.text and "\u202e" not in page.text
    assert r"\x1b[31m\u202e" in page.text
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy


def test_samples_that_training_leaves_out_say_why(page: Page) -> None:
    assert "4 left out of training" in page.text
    for reason in (
        "its JSON cannot be read", "0.jpg is not a readable picture: Premature end", "no assistant turn with words",
        r"6,\d\d\d tokens: longer than a row of 2,000|\d\d,\d\d\d tokens: longer than a row of 2,000",
    ):  # fmt: skip
        assert re.search(f"Left out of training: ({reason})", page.text), reason
    assert "characters in the middle of long texts are not shown" in page.text


def test_samples_are_found_by_key(data: run.Data) -> None:
    assert find_samples(data.table, "cut") == [3]
    assert find_samples(data.table, f"{data.table.shards[0]}:two") == [0]
    for key in ("cu", "cutsilent", ""):
        with pytest.raises(ConfigError, match=r"no sample has the key .*keys look like .*odd\.tar:two"):
            find_samples(data.table, key)


def test_a_page_that_cannot_be_written_is_named(data: run.Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/p\.html: the page cannot be written"):
        write_preview(tmp_path / "file" / "p.html", "x", [0], data)


# --- launch/prepare.py preview --------------------------------------------------------------------------------------


def prepare_preview(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "preview", *words])
    prepare.run_command()


def names(path: Path) -> list[str]:
    return re.findall(r"([\w-]+\.tar:\w+) <small>", path.read_text())


def test_the_command_shows_a_runs_order_a_step_or_the_validation_side(
    config_file: Path, settings_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate(settings_tree)
    train = run.Data.open(settings.data.train, settings)
    planner = run.plan(settings, train)
    out = tmp_path / "p.html"
    common = ("--config", str(config_file), "--out", str(out))
    prepare_preview(monkeypatch, *common, "--num", "3")
    assert names(out) == [train.table.sample_name(i).split("/")[-1] for i in planner.sample_ids(0, 3).tolist()]
    prepare_preview(monkeypatch, *common, "--step", "2")
    second = [step for _, step in zip(range(2), planner, strict=False)][1]
    assert names(out) == [train.table.sample_name(i).split("/")[-1] for i in second.sample_ids]
    prepare_preview(monkeypatch, *common, "--split", "validation", "--key", "00203", "--key", "00200")
    assert names(out) == ["validation-000.tar:00203", "validation-000.tar:00200"]
    with pytest.raises(ConfigError, match="--step 999: the run has 10 steps"):
        prepare_preview(monkeypatch, *common, "--step", "999")


def test_the_command_shows_shards_of_captions_without_any_configuration(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TarWriter(str(tmp_path / "00000.tar"), mtime=0) as tar:  # as img2dataset writes it
        meta = {"caption": "A green square", "url": "http://x/y.jpg", "status": "success"}
        tar.write({"__key__": "000000000", "jpg": picture("green", 64, 64), "txt": b"A green square",
                   "json": json.dumps(meta).encode()})  # fmt: skip
    out = tmp_path / "p.html"
    words = (str(tmp_path / "*.tar"), "--model", str(tiny_model), "--out", str(out))
    prepare_preview(monkeypatch, *words)
    page = Page(out)
    assert ("words trained", "A green square") in page.shown and "What is shown in this image?" in page.text
    prepare_preview(monkeypatch, *words, "--prompt", "Where from?", "--answer", "{{ url }}")
    assert ("words trained", "http://x/y.jpg") in Page(out).shown
    with pytest.raises(ConfigError, match="give --config, or --model FOLDER"):
        prepare_preview(monkeypatch, str(tmp_path / "*.tar"))
