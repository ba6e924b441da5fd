"""Records of every kind → samples, and every bad record named."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.importers.importer import Import
from phi3v_dist.data.importers.settings import ImportSettings, load
from phi3v_dist.data.samples import decode_sample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import ConfigError, DataError

ALL_TRAIN = {"validation_frac": 0.0}
QUESTION = {"prompt": "What is it?", "answer": "{{ title }}"}


def picture(number: int, file_format: str = "JPEG") -> bytes:
    """A picture unlike every other."""
    pixels = np.random.default_rng(number).integers(0, 255, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40 + number % 7, 32), Image.Resampling.NEAREST).save(file, file_format)
    return file.getvalue()


def write_pictures(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, {"png": "PNG", "webp": "WEBP"}.get(path.suffix[1:], "JPEG")))
    return folder


def run(source: Any, out: Path, **settings: Any) -> dict[str, Any]:
    return Import(str(source), out, ImportSettings(**(ALL_TRAIN | settings)), None, lambda *_: None).run()


def samples(out: Path, split: str = "train") -> list[dict[str, Any]]:
    """What plain webdataset finds."""
    shards = [str(path) for path in sorted(out.glob(f"{split}-*.tar"))]
    return [] if not shards else list(webdataset.WebDataset(shards, shardshuffle=False))


def record(sample: dict[str, Any]) -> dict[str, Any]:
    return json.loads(sample["json"])


def answers(out: Path) -> list[str]:
    return [record(sample)["messages"][-1]["content"] for sample in samples(out)]


def failures(out: Path) -> dict[int, str]:
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {line["record"]: f"{line['kind']}: {line['reason']}" for line in map(json.loads, lines)}


def write_json_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TITLES = ["Hat, red", 'The "Scarf"', "Möbel\nin two lines"]


def table_file(folder: Path, kind: str) -> Path:
    """The same three rows in every kind of file."""
    write_pictures(folder, ["a.jpg", "b.png", "c.webp"])
    rows = [{"image": name, "title": title} for name, title in zip(("a.jpg", "b.png", "c.webp"), TITLES, strict=True)]
    path = folder / f"rows.{kind}"
    if kind.startswith(("csv", "tsv")):
        text = io.StringIO()
        writer = csv.DictWriter(text, ["image", "title"], delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "jsonl":
        write_json_lines(path, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "json", "jsonl", "parquet"])
@pytest.mark.supports("tables", on="one process")
def test_every_kind_of_table_gives_the_same_samples(tmp_path: Path, kind: str) -> None:
    source = table_file(tmp_path / "data", kind)
    manifest = run(source, tmp_path / "out", **QUESTION)
    assert (manifest["samples"], manifest["failures"]) == (3, {})
    assert answers(tmp_path / "out") == TITLES
    first = samples(tmp_path / "out")[0]
    assert first["0.jpg"] == (source.parent / "a.jpg").read_bytes(), "stored bytes are copied"
    assert record(first) == {
        "image": "a.jpg", "title": "Hat, red",
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "Hat, red"},
        ],
    }  # fmt: skip


def test_what_is_imported_is_what_the_trainer_reads(tmp_path: Path) -> None:
    source = table_file(tmp_path / "data", "jsonl")
    run(source, tmp_path / "out", **QUESTION)
    plain = SourceSettings(shards=[str(tmp_path / "out" / "train-*.tar")])
    table = ShardTable.open([plain])
    assert not table.index(0).bad
    for number, name in enumerate(("0.jpg", "0.png", "0.webp")):
        stored = samples(tmp_path / "out")[number]
        parts = {"json": stored["json"], name: stored[name]}
        sample = decode_sample(number, "x", "k", "s", plain, parts, [name])
        assert sample.messages[0].parts == (0, "What is it?")
        assert sample.images[0].shape == (32, 40 + number, 3)


def test_a_pictures_name_follows_its_contents_and_a_key_its_record(tmp_path: Path) -> None:
    (tmp_path / "odd.jpg").write_bytes(picture(1, "PNG"))
    (tmp_path / "none").write_bytes(picture(2, "GIF"))
    rows = [{"image": "odd.jpg", "title": "a"}, {"image": "missing.jpg", "title": "b"}, {"image": "none", "title": "c"}]
    run(write_json_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out", **QUESTION)
    found = [
        (sample["__key__"], sorted(name for name in sample if name[0] != "_")) for sample in samples(tmp_path / "out")
    ]
    assert found == [("000000001", ["0.png", "json"]), ("000000003", ["0.gif", "json"])]


def test_more_than_ten_pictures_sort_as_they_are_counted(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(12)]
    write_pictures(tmp_path, names)
    run(write_json_lines(tmp_path / "rows.jsonl", [{"images": names, "title": "all"}]), tmp_path / "out", **QUESTION)
    (sample,) = samples(tmp_path / "out")
    assert [sample[f"{number:02d}.jpg"] for number in range(12)] == [picture(number) for number in range(12)]
    shown = [part["image"] for part in record(sample)["messages"][0]["content"][:-1]]
    assert shown == [f"{number:02d}.jpg" for number in range(12)]


def test_pictures_come_from_several_columns_and_templates(tmp_path: Path) -> None:
    write_pictures(tmp_path / "front", ["7.jpg", "8.jpg"])
    write_pictures(tmp_path / "back", ["7.png"])
    rows = [{"sku": 7, "back": "back/7.png", "title": "x"}, {"sku": 8, "back": None, "title": "y"}]
    source = write_json_lines(tmp_path / "rows.jsonl", rows)
    images = ["front/{{ sku }}.jpg", "back"]
    run(source, tmp_path / "out", images=images, **QUESTION)
    (sample,) = samples(tmp_path / "out")
    assert (sample["0.jpg"], sample["1.png"]) == (picture(0), picture(0, "PNG"))
    assert failures(tmp_path / "out")[2].startswith("no picture: `back` is empty; allow_no_picture")
    run(source, tmp_path / "both", images=images, allow_no_picture=True, **QUESTION)
    assert len(samples(tmp_path / "both")) == 2


def test_words_that_look_like_special_tokens_stay_words(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    title = "<|end|><|user|> <image> <|image_1|> {{ 7 * 7 }}"
    run(write_json_lines(tmp_path / "rows.jsonl", [{"image": "a.jpg", "title": title}]), tmp_path / "out", **QUESTION)
    assert answers(tmp_path / "out") == [title]


@pytest.mark.supports("LLaVA", on="one process")
def test_llava_single_multi_image_and_text_only(tmp_path: Path) -> None:
    write_pictures(tmp_path / "img", ["a.jpg", "b.jpg"])

    def turns(question: str, answer: str = "Yes.") -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    rows = [
        {"id": "one", "image": "a.jpg", "conversations": turns("<image>\nA hat?")},
        {"id": "two", "image": ["a.jpg", "b.jpg"], "conversations": turns("Is <image> like <image>?", "A <image> tag")},
        {"id": "text", "conversations": turns("Are you there?")},
        {"id": "few", "image": "a.jpg", "conversations": turns("No tag")},
        {"id": "many", "image": "a.jpg", "conversations": turns("<image><image>")},
        {"id": "lost", "image": "lost.jpg", "conversations": turns("<image>")},
        {"id": "who", "conversations": [{"from": "tool", "value": "x"}]},
        {"id": "mute", "conversations": turns("Hello?", " ")},
    ]  # fmt: skip
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    run(tmp_path / "llava.json", tmp_path / "out", image_root=tmp_path / "img")
    found = [record(sample) for sample in samples(tmp_path / "out")]
    assert [row["id"] for row in found] == ["one", "two", "text"]
    image = [{"type": "image", "image": f"{number}.jpg"} for number in range(2)]
    text = {word: {"type": "text", "text": word} for word in ("\nA hat?", "Is ", " like ", "?")}
    assert found[0]["messages"][0]["content"] == [image[0], text["\nA hat?"]]
    assert found[1]["messages"][0]["content"] == [text["Is "], image[0], text[" like "], image[1], text["?"]]
    assert found[1]["messages"][1]["content"] == "A <image> tag"
    assert "conversations" not in found[0]
    reasons = failures(tmp_path / "out")
    assert reasons[4] == "<image> tags: 0 <image> tags, but 1 pictures"
    assert reasons[5] == "<image> tags: 2 <image> tags, but 1 pictures"
    assert reasons[6].startswith(f"no such picture: {tmp_path / 'img' / 'lost.jpg'}: no such file")
    assert reasons[7].startswith("conversation: a turn needs `from` human or gpt")
    assert reasons[8].startswith("nothing to learn")


@pytest.mark.supports("chat", on="one process")
def test_chat_messages_in_the_usual_spellings(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    a, b = picture(0), picture(1)

    def chat(*parts: Any, **columns: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [*parts]}, {"role": "assistant", "content": "ok"}], **columns}

    text = {"type": "text", "text": "?"}
    rows = [
        chat({"type": "image_url", "image_url": {"url": "a.jpg"}}, text),
        chat(text, {"type": "image", "image": "b.jpg"}, {"type": "image", "path": "a.jpg"}),
        chat({"type": "image"}, text, {"type": "image"}, images=["a.jpg", "b.jpg"]),
        chat(text, image="b.jpg"),
        {"messages": json.dumps(chat(text)["messages"])},
        chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
        chat({"type": "image"}, text),
        chat({"type": "audio"}),
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": "[{"},
        {"messages": []},
    ]  # fmt: skip
    run(write_json_lines(tmp_path / "chat.jsonl", rows), tmp_path / "out", dedupe=False)
    found = samples(tmp_path / "out")
    pictures = [[sample[name] for name in ("0.jpg", "1.jpg") if name in sample] for sample in found]
    assert pictures == [[a], [b, a], [a, b], [b], []]
    shown = [[part.get("image") for part in record(sample)["messages"][0]["content"]] for sample in found[:3]]
    assert shown == [["0.jpg", None], [None, "0.jpg", "1.jpg"], ["0.jpg", None, "1.jpg"]]
    reasons = failures(tmp_path / "out")
    assert sorted(reasons) == [6, 7, 8, 9, 10, 11]
    assert "data: URL" in reasons[6]
    assert "the record has only 0" in reasons[7]
    assert "neither text nor image" in reasons[8]


@pytest.mark.supports("folder", on="one process")
def test_folders_of_pictures_with_captions_or_metadata(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "photos", ["b.jpg", "hats/a.png", "none.jpg"])
    (folder / "b.txt").write_text("A blue thing\n")
    (folder / "hats" / "a.txt").write_text("Ein Hut", encoding="utf-8-sig")
    run(folder, tmp_path / "out")
    assert answers(tmp_path / "out") == ["A blue thing", "Ein Hut"]
    assert [record(sample)["label"] for sample in samples(tmp_path / "out")] == ["photos", "hats"]
    assert "'text' is undefined" in failures(tmp_path / "out")[2]
    (folder / "metadata.csv").write_text("file_name,text\nhats/a.png,From the table\n")
    run(folder, tmp_path / "table")
    assert answers(tmp_path / "table") == ["From the table"]


@pytest.mark.parametrize("edited", ["a.jpg", "a.txt", "metadata.csv"])
def test_an_edit_in_a_folder_of_pictures_is_noticed(tmp_path: Path, edited: str) -> None:
    folder = write_pictures(tmp_path / "photos", ["a.jpg"])
    (folder / "a.txt").write_text("A blue thing")
    if edited == "metadata.csv":
        (folder / edited).write_text("file_name,text\na.jpg,A blue thing\n")
    run(folder, tmp_path / "out")
    assert run(folder, tmp_path / "out")["samples"] == 1
    (folder / edited).write_bytes((folder / edited).read_bytes().replace(b"blue", b"cyan"))  # as large as before
    with pytest.raises(DataError, match="what differs: source_digest"):
        run(folder, tmp_path / "out")


def hugging_face_rows(num_rows: int = 4) -> datasets.Dataset:
    kinds = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["HATS", "SHOES"])})
    rows = {
        "photo": [{"bytes": picture(n), "path": None} for n in range(num_rows)],
        "kind": [n % 2 for n in range(num_rows)],
    }
    return datasets.Dataset.from_dict(rows, features=kinds)


@pytest.mark.parametrize("kind", ["saved", "saved splits", "parquet folder"])
@pytest.mark.supports("saved", on="one process")
def test_data_sets_of_hugging_face_with_stored_pictures_and_classes(tmp_path: Path, kind: str) -> None:
    rows, folder = hugging_face_rows(), tmp_path / "data"
    if kind == "saved":
        rows.save_to_disk(folder)
    elif kind == "saved splits":
        datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        rows.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        rows.select([0]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    mapping = {"images": ["photo"], "prompt": "Kind?", "answer": "{{ kind }}"}
    run(folder, tmp_path / "out", **mapping)
    assert answers(tmp_path / "out") == ["HATS", "SHOES", "HATS", "SHOES"]
    assert [sample["0.jpg"] for sample in samples(tmp_path / "out")] == [picture(n) for n in range(4)]
    if kind != "saved":
        with pytest.raises(DataError, match="no split 'dev' but t.*choose one by dataset_split"):
            run(folder, tmp_path / "other", dataset_split="dev", **mapping)


@pytest.mark.supports("hub", on="one process")
def test_a_data_set_of_the_hub_is_streamed_once_into_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3v_dist.data.importers import hugging_face

    asked = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options["split"], options["streaming"]))
        stream = hugging_face_rows(5).to_iterable_dataset()
        if len(asked) == 1:  # the connection breaks in the second part

            def broken() -> Any:
                yield from ({"photo": {"bytes": picture(n), "path": None}, "kind": n % 2} for n in range(3))
                raise ConnectionError("reset by peer")

            stream = datasets.IterableDataset.from_generator(broken, features=stream.features)
        return stream

    monkeypatch.setattr(hugging_face, "ROWS_PER_PART", 2)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    mapping = {"images": ["photo"], "prompt": "Kind?", "answer": "{{ kind }}"}
    with pytest.raises(DataError, match="someone/hats: .*hub .*reset by peer"):
        run("someone/hats", tmp_path / "out", **mapping)
    assert len(list(tmp_path.rglob("part-*.parquet"))) == 1, "whole parts stay"
    run("someone/hats", tmp_path / "out", **mapping)
    assert answers(tmp_path / "out") == ["HATS", "SHOES", "HATS", "SHOES", "HATS"]
    run("someone/hats", tmp_path / "out", **mapping)
    assert asked == [("someone/hats", None, "train", True)] * 2, "the third call needed no network"


def test_a_part_of_a_hub_data_set_is_closed_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3v_dist.data.importers import hugging_face

    monkeypatch.setattr(hugging_face, "BYTES_PER_PART", len(picture(0)) + 1)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: hugging_face_rows(5).to_iterable_dataset())
    run("someone/hats", tmp_path / "out", images=["photo"], prompt="Kind?", answer="{{ kind }}")
    assert len(answers(tmp_path / "out")) == 5
    assert 2 <= len(list(tmp_path.rglob("part-*.parquet"))) <= 5


def test_a_hub_that_cannot_be_reached_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/nothing: no such file or folder here, and .* hub it cannot be read"):
        run("nobody/nothing", tmp_path / "out")


def test_every_bad_row_of_a_csv_is_named_and_the_others_are_in(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    path = tmp_path / "rows.csv"
    path.write_bytes(b'image,title\na.jpg,one\na.jpg\na.jpg,t\xe9\na.jpg,"two"x\na.jpg,three,4\n\na.jpg,four\n')
    run(path, tmp_path / "out", **QUESTION)
    assert answers(tmp_path / "out") == ["one", "four"]
    reasons = failures(tmp_path / "out")
    assert reasons[2] == "broken row: line 3 has 1 fields, the header has 2"
    assert reasons[3] == "not UTF-8: byte 0xe9 is no UTF-8"
    assert reasons[4].startswith("broken row: line 5: ")
    assert reasons[5] == "broken row: line 6 has 3 fields, the header has 2"


def test_every_bad_line_of_a_jsonl_is_named_and_the_others_are_in(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    (tmp_path / "damaged.jpg").write_bytes(picture(3)[:200])
    (tmp_path / "page.jpg").write_text("<html>")
    lines = [
        b'{"image": "a.jpg", "title": "one"}', b'{"image": ', b"[1]", b'"x"', b'{"image": "a.jpg"}',
        b'{"image": "a.jpg", "title": null}', b'{"image": "damaged.jpg", "title": "x"}',
        b'{"image": "page.jpg", "title": "x"}', b'{"image": ["a.jpg", 7], "title": "x"}',
        b'{"image": "ftp://h/a.jpg", "title": "x"}', b'{"image": "a\\u0000.jpg", "title": "x"}',
        b'{"image": "a.jpg", "title": "\\ud800"}', b'{"image": "a.jpg", "title": "' + b"[" * 5 + b'"}',
        b'{"image": "a.jpg", "title": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"image": "a.jpg", "title": "caf\xe9"}',
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    run(tmp_path / "rows.jsonl", tmp_path / "out", **QUESTION)
    assert answers(tmp_path / "out") == ["one", "[[[[["]
    reasons = failures(tmp_path / "out")
    assert sorted(reasons) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15]
    assert reasons[3] == "not an object: line 3 is a list, not an object with fields"
    assert "'title' is undefined" in reasons[5]
    assert "is null" in reasons[6]
    assert reasons[7].startswith("picture unreadable: picture 1 of 1 is not a readable picture")
    assert "begin with b'<html>'" in reasons[8]
    assert "fetched by http and https only" in reasons[10]


def test_a_header_is_enough_when_verification_is_off(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(picture(3)[:-30])
    source = write_json_lines(tmp_path / "rows.jsonl", [{"image": "cut.jpg", "title": "x"}])
    with pytest.raises(
        DataError, match="none of its 1 records can be used \\(picture unreadable: 1\\); .*failures.jsonl"
    ):
        run(source, tmp_path / "out", **QUESTION)
    run(source, tmp_path / "out", verify=False, **QUESTION)
    assert len(samples(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is an empty file"),
        ("a.csv", "\n", "is empty; its first line should name the columns"),
        ("a.csv", "image,title\n", "holds no records"),
        ("a.csv", "image,image\n1,2\n", "names 'image' more than once"),
        ("a.json", "{}", "holds an object, not a list of records. One object a line"),
        ("a.json", "12", "begins with '12'; a .json file holds a list"),
        ("a.json", '[{"a": 1}, {"a": ', "damaged after its record 1: "),
        ("a.json", '[{"a": 1}', "damaged after its record 1: it ends before its list is closed"),
        ("a.json", "[]", "holds no records"),
        ("a.parquet", "no", "cannot be read .*ArrowInvalid"),
        ("a.xlsx", "x", "unknown kind of file '.xlsx'; known are .csv"),
        (
            "a.csv",
            'image,title\na.jpg,one\na.jpg,"two\na.jpg,three\n',
            "line 3 opens a quote .* up to line 4.* correct it",
        ),
        ("a.csv", 'image,"title\na.jpg,one\n', "cannot be read, not even its header"),
        ("a.csv", "image|title\na.jpg|one\n", "one column, 'image|title', .* bars. Columns are cut at commas"),
        ("a.csv", "image\ttitle\na.jpg\tone\n", "seems to use tabs"),
        ("a.csv", "i\0m\0,\0t\0\n\0", "is UTF-16, or no text at all; save it as UTF-8"),
        ("a.csv.gz", "x", "cannot be read .*BadGzipFile"),
    ],
)
def test_a_file_that_is_no_source_says_why(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / name, tmp_path / "out", **QUESTION)
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_table_in_utf_16_is_refused_by_name(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes("\ufeffимя,фото\n".encode(encoding))
    with pytest.raises(DataError, match="is UTF-16, or no text at all; save it as UTF-8"):
        run(tmp_path / "a.csv", tmp_path / "out", **QUESTION)


def test_a_list_of_records_may_be_longer_than_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3v_dist.data.importers import json_records

    rows = [{"n": number, "text": "}],[{" * (number % 9), "inner": [{}, []]} for number in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    for window in (1, 7, 64, 100_000):
        monkeypatch.setattr(json_records, "WINDOW_CHARACTERS", window)
        assert list(json_records.read_json_list(tmp_path / "a.json")) == rows


def test_folders_that_are_no_source_say_why(tmp_path: Path) -> None:
    for name, message in (
        ("x", "holds no pictures"),
        ("shards", "need no import: they train as they are"),
        ("t", "name the file"),
    ):
        (tmp_path / name).mkdir()
        if name != "x":
            (tmp_path / name / ("0.tar" if name == "shards" else "a.csv")).write_bytes(b"x")
        with pytest.raises(DataError, match=message):
            run(tmp_path / name, tmp_path / "out")
    with pytest.raises(DataError, match="no such file or folder"):
        run(tmp_path / "nowhere.csv", tmp_path / "out")


def test_a_column_that_does_not_exist_is_found_before_anything_is_read(tmp_path: Path) -> None:
    source = table_file(tmp_path / "data", "csv")
    with pytest.raises(ConfigError) as error:
        run(source, tmp_path / "out", images="imge", prompt="{{ titel }}?", answer="{{ title }}", split_key="sku")
    assert len(error.value.problems) == 3
    assert "`imge`: no column 'imge'" in error.value.problems[0] and "did you mean 'image'?" in error.value.problems[0]
    assert "`sku`" in str(error.value)
    assert "did you mean 'title'?" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=a", "answer=b", "messages=turns"], "`messages` is given beside `prompt`, `answer`"),
        (["prompt=a"], "`answer` is missing; `prompt` and `answer` go together"),
        (["prompt={{ a", "answer=b"], "`prompt` is '{{ a': no Jinja template"),
        (["promt=a"], "`promt` is not a setting; did you mean `prompt`"),
        (["validation_frac=0.6", "test_frac=0.5"], "leave nothing to train on"),
        (["verify"], "'verify' is not key=value"),
        (["num_ranks=0"], "`num_ranks` is 0: input should be greater than or equal to 1"),
        (["download.retires=3"], "download.retires"),
    ],
)
def test_wrong_settings_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, words)


def test_templates_on_the_command_line_need_no_quotes_of_yaml() -> None:
    answer = "Product: {{title}}, Price: {{full_price}}"
    settings = load(None, [f"answer={answer}", "prompt=What: is it?", "images=front/{{ sku }}.jpg", "split_key=007"])
    assert (settings.answer, settings.prompt, settings.images) == (answer, "What: is it?", ["front/{{ sku }}.jpg"])
    assert settings.split_key == "007"
    assert load(None, ["images=[a,b]"]).images == ["a", "b"]


def test_a_mapping_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--mapping .*nothing.yaml: no such file"):
        load(tmp_path / "nothing.yaml", [])
