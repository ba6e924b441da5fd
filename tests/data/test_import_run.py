"""An import as a whole: splits, duplicates, shards, resume, memory, downloads, the command."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPOSITORY, environment
from loopback import HTML_AS_JPEG, Fault, LoopbackServer, status
from PIL import Image
from test_import import QUESTION, failures, picture, record, run, samples, write_json_lines

from phi3v_dist import config
from phi3v_dist.cli import prepare
from phi3v_dist.config import SourceSettings
from phi3v_dist.data.importers import importer, settings, survey
from phi3v_dist.data.importers.assignment import _cut
from phi3v_dist.data.importers.importer import Import
from phi3v_dist.data.importers.settings import ImportSettings
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import ConfigError, DataError

RECIPE = REPOSITORY / "launch/configs/imports/burberry.yaml"
HALF = {"validation_frac": 0.3, "test_frac": 0.2}


def rows_with_pictures(folder: Path, num_rows: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_rows):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    rows = [{"image": f"{n}.jpg", "title": f"thing {n}", "shop": f"shop {n // 3}"} for n in range(num_rows)]
    return write_json_lines(folder / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty records with a picture each."""
    return rows_with_pictures(tmp_path_factory.mktemp("forty"), 40)


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def split_of_titles(out: Path) -> dict[str, str]:
    return {
        record(sample)["title"]: split for split in ("train", "validation", "test") for sample in samples(out, split)
    }


@pytest.mark.supports("tables", on="one process")
def test_a_folder_made_by_hand_with_a_spreadsheets_table_is_imported_but_for_real_mistakes(
    tmp_path: Path,
) -> None:
    made = handmade.write_folder(tmp_path / "photos", num_pictures=72)
    question = {"prompt": "What costs {{ record['Price (EUR)'] }}?", "answer": "{{ Caption }}"}
    manifest = run(made.table, tmp_path / "out", images=["File name"], **question)
    assert manifest["samples"] == made.num_good and manifest["failures"] == made.bad
    assert manifest["records"] == 72, "empty rows below the last one are no records"
    told = {record(sample)["File name"]: record(sample) for sample in samples(tmp_path / "out", "train")}
    assert any("\\" in name for name in told) and any("Übersicht" in name for name in told)
    asked, answer = (turn["content"] for turn in told["IMG_2002.JPG"]["messages"])
    assert asked[1]["text"] == f"What costs {told['IMG_2002.JPG']['Price (EUR)']}?" and '"Goldener Löwe"' in answer


def test_a_column_that_jinja_cannot_spell_is_named_as_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,Price (EUR)\na.jpg,3\n")
    for answer in ("{{ Price (EUR) }}", "{{ record['Price (USD)'] }}"):
        with pytest.raises(ConfigError, match=r"did you mean 'Price \(EUR\)'\? .* {{ record\['Price \(EUR\)'\] }}"):
            run(tmp_path / "rows.csv", tmp_path / "out", prompt="What?", answer=answer)


def test_splits_are_drawn_from_pictures_and_not_from_the_order_of_records(forty: Path, tmp_path: Path) -> None:
    manifest = run(forty, tmp_path / "a", **HALF, **QUESTION)
    assert {split: figures["samples"] for split, figures in manifest["splits"].items()} == {
        split: list(split_of_titles(tmp_path / "a").values()).count(split) for split in ("train", "validation", "test")
    }
    assert all(figures["samples"] >= 3 for figures in manifest["splits"].values())
    backwards = tmp_path / "back.jsonl"
    backwards.write_text("\n".join(reversed(forty.read_text().splitlines())))
    run(backwards, tmp_path / "b", image_root=forty.parent, **HALF, **QUESTION)
    assert split_of_titles(tmp_path / "a") == split_of_titles(tmp_path / "b")
    run(forty, tmp_path / "c", seed=1, **HALF, **QUESTION)
    assert split_of_titles(tmp_path / "a") != split_of_titles(tmp_path / "c")


def test_a_split_key_keeps_its_records_together_and_tells_of_shared_pictures(forty: Path, tmp_path: Path) -> None:
    run(forty, tmp_path / "out", split_key="shop", **HALF, **QUESTION)
    of_title = split_of_titles(tmp_path / "out")
    for number in range(0, 39, 3):
        assert len({of_title[f"thing {number + i}"] for i in range(3)}) == 1
    assert len(set(of_title.values())) == 3
    rows = [{"image": "0.jpg", "title": str(n), "shop": n} for n in range(20)]
    source = write_json_lines(tmp_path / "same.jsonl", rows)
    manifest = run(source, tmp_path / "same", split_key="shop", image_root=forty.parent, **HALF, **QUESTION)
    assert manifest["pictures_in_several_splits"] == 1


def test_samples_that_share_a_picture_through_others_go_to_one_split(tmp_path: Path) -> None:
    """Chains 0-1, 1-2, 2-3, … in an order that never shows two neighbours one after the other."""
    rows_with_pictures(tmp_path, 64)
    chains = [(start + i, start + i + 1) for i in (2, 0, 3, 1) for start in range(0, 60, 5)]
    rows = [{"images": [f"{a}.jpg", f"{b}.jpg"], "title": f"{a} {b}"} for a, b in chains]
    manifest = run(write_json_lines(tmp_path / "chains.jsonl", rows), tmp_path / "out", **HALF, **QUESTION)
    of_title = split_of_titles(tmp_path / "out")
    assert len(of_title) == len(rows) and len(set(of_title.values())) == 3
    for start in range(0, 60, 5):
        assert len({of_title[f"{start + i} {start + i + 1}"] for i in range(4)}) == 1
    assert manifest["pictures_in_several_splits"] == 0


def test_equal_pictures_and_words_are_kept_once_and_listed(forty: Path, tmp_path: Path) -> None:
    shutil.copy(forty.parent / "1.jpg", tmp_path / "copy.jpg")
    shutil.copy(forty.parent / "1.jpg", tmp_path / "1.jpg")
    rows = [
        {"image": "1.jpg", "title": "a", "id": 1}, {"image": "1.jpg", "title": "b", "id": 2},
        {"image": "copy.jpg", "title": "a", "id": 3}, {"image": "copy.jpg", "title": "a", "id": 4},
    ]  # fmt: skip
    source = write_json_lines(tmp_path / "rows.jsonl", rows)
    assert run(source, tmp_path / "out", **QUESTION)["duplicates"] == 2
    assert [record(sample)["id"] for sample in samples(tmp_path / "out")] == [1, 2]
    listed = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    assert listed == [{"record": n, "key": f"{n:09d}", "kept": "000000001"} for n in (3, 4)]
    assert run(source, tmp_path / "all", dedupe=False, **QUESTION)["samples"] == 4


def test_the_manifest_agrees_with_the_shards(forty: Path, tmp_path: Path) -> None:
    import hashlib

    manifest = run(forty, tmp_path / "out", shard_size_bytes=20_000, **HALF, **QUESTION)
    assert len(manifest["shards"]) > 3
    assert manifest == json.loads((tmp_path / "out" / "import.json").read_text())
    for shard in manifest["shards"]:
        data = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (shard["size_bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        table = ShardTable.open([SourceSettings(shards=[str(tmp_path / "out" / shard["name"])])])
        assert len(table) == shard["samples"] == shard["pictures"]


def test_tokens_are_those_that_training_will_measure(forty: Path, tmp_path: Path, tiny_model: Path) -> None:
    options = ImportSettings(**QUESTION, validation_frac=0)
    manifest = Import(str(forty), tmp_path / "out", options, tiny_model, lambda *_: None).run()
    table = ShardTable.open([SourceSettings(shards=[str(tmp_path / "out" / "train-*.tar")])])
    for num_crops in (4, 16):
        tokens = measure(table, Phi3VProcessor.from_pretrained(tiny_model, num_crops)).tokens
        assert manifest["splits"]["train"][f"tokens_{num_crops}"] == tokens.sum()
        assert manifest["splits"]["train"][f"longest_tokens_{num_crops}"] == tokens.max()


def test_there_are_shards_for_every_rank_and_they_are_about_equal() -> None:
    sizes = np.full(1000, 1000)

    def counts(split: str, **options: int) -> list[int]:
        return np.bincount(_cut(sizes, ImportSettings(**options), split)).tolist()

    assert counts("train") == [1000]
    assert counts("train", shard_size_bytes=100_000) == [100] * 10
    assert counts("train", num_ranks=8) == [31, 31, 31, 32] * 8 or len(counts("train", num_ranks=8)) == 32
    assert len(counts("train", num_ranks=8, shard_size_bytes=25_000)) == 40, "a multiple of the ranks"
    assert len(counts("validation", num_ranks=8)) == 8
    assert len(counts("train", num_ranks=512)) == 125, "none of fewer than 8 samples"
    assert max(counts("train", num_ranks=7)) - min(counts("train", num_ranks=7)) <= 1


def test_the_same_import_gives_the_same_bytes_and_a_finished_one_is_not_done_again(
    forty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"shard_size_bytes": 20_000, **HALF, **QUESTION}
    first = run(forty, tmp_path / "a", **options)
    monkeypatch.setattr(survey, "RECORDS_PER_FILE", 7)
    run(forty, tmp_path / "b", num_workers=1, **options)
    assert tars(tmp_path / "a") == tars(tmp_path / "b")
    monkeypatch.setattr(importer, "pack", lambda *_: pytest.fail("it looked again"))
    assert run(forty, tmp_path / "a", num_workers=2, **options) == first


@pytest.mark.parametrize("broken_at", [5, 24, 41, 55, 78])
def test_an_interrupted_import_is_finished_by_the_same_command(
    forty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_at: int
) -> None:
    """`broken_at`: pictures looked at, of 80: 40 in the survey and 40 for the shards."""
    monkeypatch.setattr(survey, "RECORDS_PER_FILE", 8)
    options = {"shard_size_bytes": 20_000, "num_workers": 1, **HALF, **QUESTION}
    run(forty, tmp_path / "whole", **options)
    packed: list[int] = []
    pack = importer.pack

    def failing(*arguments: Any) -> Any:
        packed.append(1)
        if len(packed) == broken_at:
            raise KeyboardInterrupt
        return pack(*arguments)

    monkeypatch.setattr(importer, "pack", failing)
    with pytest.raises(KeyboardInterrupt):
        run(forty, tmp_path / "cut", **options)
    assert not (tmp_path / "cut" / "import.json").exists()
    before = len(packed)
    run(forty, tmp_path / "cut", **options)
    assert tars(tmp_path / "cut") == tars(tmp_path / "whole")
    done = 8 * ((broken_at - 3) // 8) if broken_at < 40 else 40
    assert len(packed) - before <= 80 - done, "what was done is not done again"
    for name in ("import.json", "failures.jsonl", "duplicates.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "cut").glob("*.partial"))


def test_a_killed_import_is_finished_by_the_same_command(forty: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = ["prompt=What is it?", "answer={{ title }}", "shard_size_bytes=20000", "validation_frac=0", "num_workers=1"]
    script = (
        "import os, signal, sys\n"
        "from phi3v_dist.data.importers import writing\n"
        "finish, done = writing._finish, []\n"
        "def kill(*arguments):\n"
        "    finish(*arguments)\n"
        "    if arguments[2]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "writing._finish = kill\n"
        "from phi3v_dist.cli import prepare\n"
        "prepare.run_command()\n"
    )
    command = [sys.executable, "-c", script, "import", str(forty), "--out", str(out), *words]
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(tars(out)) == 1 and list(out.glob("*.partial")) == []
    Import(str(forty), out, settings.load(None, words), None, lambda *_: None).run()
    Import(str(forty), whole, settings.load(None, words), None, lambda *_: None).run()
    assert tars(out) == tars(whole) and len(tars(out)) > 1


def test_another_imports_folder_is_refused_and_left_as_it_is(forty: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(forty, out, **QUESTION)
    before = tars(out)
    with pytest.raises(DataError, match="holds another import \\(what differs: answer\\); choose another folder"):
        run(forty, out, prompt=QUESTION["prompt"], answer="{{ shop }}")
    with pytest.raises(DataError, match="what differs: source, source_digest"):
        run(rows_with_pictures(tmp_path / "other", 3), out, **QUESTION)
    assert tars(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="is not empty, and what it holds is no import"):
        run(forty, tmp_path / "full", **QUESTION)
    with pytest.raises(DataError, match="is a file"):
        run(forty, tmp_path / "full" / "thesis.tex", **QUESTION)


def test_a_mapping_that_gave_no_sample_may_be_corrected_in_the_same_folder(forty: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of its 40 records can be used \\(no such picture: 40\\)"):
        run(forty, tmp_path / "out", image_root=tmp_path / "nowhere", **QUESTION)
    assert len(failures(tmp_path / "out")) == 40
    assert run(forty, tmp_path / "out", **QUESTION)["samples"] == 40


def test_a_picture_that_changes_between_the_two_passes_stops_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = rows_with_pictures(tmp_path / "data", 10)
    assign = importer.assign

    def change(*arguments: Any) -> Any:
        (source.parent / "4.jpg").write_bytes(picture(99))
        return assign(*arguments)

    monkeypatch.setattr(importer, "assign", change)
    with pytest.raises(DataError, match="record 5 changed while it was imported"):
        run(source, tmp_path / "out", **QUESTION)


MEMORY_SCRIPT = """
import os, sys, tracemalloc
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one thread indexes, or the peak depends on which overlap
from pathlib import Path
from phi3v_dist.data.importers.importer import Import
from phi3v_dist.data.importers.settings import ImportSettings
settings = ImportSettings(prompt="?", answer="{{ title }}", validation_frac=0, verify=False, shard_size_bytes=1 << 18)
for source in sys.argv[1:]:
    tracemalloc.start()
    Import(source, Path(f"{source}.out"), settings, None, lambda *_: None).run()
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def peaks_bytes(*sources: Path) -> list[int]:
    """Most memory that Python held during the import of each source."""
    command = [sys.executable, "-c", MEMORY_SCRIPT, *map(str, sources)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
def test_memory_grows_by_a_few_bytes_a_record(tmp_path: Path) -> None:
    sizes = (200, 2000, 6000)  # the first for what is imported and compiled once
    sources = [
        write_json_lines(tmp_path / f"{size}.jsonl", [{"title": f"{number:0500d}"} for number in range(size)])
        for size in sizes
    ]
    _, small, large = peaks_bytes(*sources)
    print(f"{small:,} {large:,}: {(large - small) / 4000:.1f} bytes a record")
    assert (large - small) / 4000 < 100


@pytest.mark.slow
def test_pictures_do_not_pile_up_in_memory(tmp_path: Path) -> None:
    """400 of 90 kB, less than a survey file's worth; 13 of them may be on their way at a time."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (172, 172, 3), np.uint8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "title": str(number)} for number in range(400)]
    _, peak = peaks_bytes(
        write_json_lines(tmp_path / "one.jsonl", rows[:1]), write_json_lines(tmp_path / "r.jsonl", rows)
    )
    assert peak < 15e6
    assert len(samples(tmp_path / "r.jsonl.out")) == 400


@pytest.fixture
def shop() -> Iterator[LoopbackServer]:
    """A shop's pictures over HTTP: some are there."""
    with LoopbackServer({f"/{number}.jpg": picture(number) for number in range(12)}) as server:
        server.script("/3.jpg", always=status(404))
        server.script("/5.jpg", always=HTML_AS_JPEG)
        yield server


def shop_table(path: Path, server: LoopbackServer) -> Path:
    rows = [
        {"imageurl": server.url(f"/{n}.jpg"), "title": f"Hat {n}", "category3_code": "HATS", "full_price": 10.5 * n}
        for n in range(12)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_the_burberry_recipe_on_a_table_of_its_columns(shop: LoopbackServer, tmp_path: Path) -> None:
    source = shop_table(tmp_path / "products.parquet", shop)
    mapping = settings.load(RECIPE, ["validation_frac=0"])
    manifest = Import(str(source), tmp_path / "out", mapping, None, lambda *_: None).run()
    assert (manifest["samples"], manifest["failures"]) == (10, {"download": 1, "picture unreadable": 1})
    reasons = failures(tmp_path / "out")
    assert reasons[4].startswith(f"download: {shop.url('/3.jpg')}: ") and "404" in reasons[4]
    assert "no picture does" in reasons[6]
    found = record(samples(tmp_path / "out")[1])
    assert found["messages"][0]["content"][1]["text"] == "What is shown in this image?"
    assert found["messages"][1]["content"] == "Product: Hat 1, Category: HATS, Full Price: 10.5"
    assert samples(tmp_path / "out")[1]["0.jpg"] == picture(1)
    num_requests = len(shop.log)
    (tmp_path / "out" / "import.json").unlink()
    for path in (tmp_path / "out").glob("*.tar"):
        path.unlink()
    Import(str(source), tmp_path / "out", mapping, None, lambda *_: None).run()
    assert len(shop.log) == num_requests, "the second call fetched something again"


def test_passwords_and_signatures_of_urls_are_not_written_down(shop: LoopbackServer, tmp_path: Path) -> None:
    with_password = shop.url("/1.jpg").replace("//", "//user:secret@")
    shop.script("/2.jpg?signature=secret", always=Fault(body=picture(2)))
    words = "Is https://a.test/?q=1 a page?"
    rows = [
        {"image": with_password, "title": words, "page": "https://a.test/@shop/x.html"},
        {"image": shop.url("/2.jpg?signature=secret"), "title": "signed"},
        {"image": with_password.replace("1.jpg", "99.jpg?signature=secret"), "title": "is not there"},
        {"image": "ftp://user:secret@a.test/a.jpg", "title": "cannot be fetched"},
    ]
    out = tmp_path / "out"
    run(write_json_lines(tmp_path / "rows.jsonl", rows), out, **QUESTION)
    kept = [record(sample) for sample in samples(out)]
    assert [row["image"] for row in kept] == [shop.url("/1.jpg"), shop.url("/2.jpg")]
    assert (kept[0]["title"], kept[0]["page"]) == (words, "https://a.test/@shop/x.html")
    assert failures(out)[3].startswith(f"download: {shop.url('/99.jpg')}: HTTP 404")
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > 8 and not [path for path in written if b"secret" in path.read_bytes()]


def test_urls_and_files_may_be_mixed_in_any_order(shop: LoopbackServer, tmp_path: Path) -> None:
    rows_with_pictures(tmp_path, 3)
    images = [
        ["0.jpg"],
        [shop.url("/7.jpg"), "1.jpg"],
        [],
        ["2.jpg"],
        [shop.url("/8.jpg"), shop.url("/9.jpg")],
        ["0.jpg"],
    ]
    rows = [{"images": names, "title": str(number)} for number, names in enumerate(images * 50)]
    source = write_json_lines(tmp_path / "mixed.jsonl", rows)
    manifest = run(source, tmp_path / "out", allow_no_picture=True, **QUESTION)
    assert manifest["samples"] == 300
    expected = [[picture(0)], [picture(7), picture(1)], [], [picture(2)], [picture(8), picture(9)], [picture(0)]]
    for number, sample in enumerate(samples(tmp_path / "out")):
        assert [sample[name] for name in ("0.jpg", "1.jpg") if name in sample] == expected[number % 6]


def test_the_command_prints_what_it_did_and_a_configuration_that_loads(
    forty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    (tmp_path / "mapping.yaml").write_text('prompt: What is it?\nanswer: "{{ title }}"\n')
    out = tmp_path / "out"
    words = [
        "import",
        str(forty),
        "validation_frac=0.3",
        "--out",
        str(out),
        "--mapping",
        str(tmp_path / "mapping.yaml"),
    ]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words, "--num-ranks", "2", "--model", str(tiny_model), "seed=3"])
    prepare.run_command()
    printed = capsys.readouterr().out
    assert "40 of 40 records became samples" in printed and "tokens at 16 crops" in printed
    assert f"launch/check.py --config {out / 'train.yaml'}" in " ".join(printed.split())
    loaded = config.load(out / "train.yaml")
    assert loaded.model.path == tiny_model
    assert loaded.eval.fields["answer"].kind == "fuzzy"
    assert ShardTable.open(loaded.data.train).shards and ShardTable.open(loaded.data.validation).shards
    (out / "train.yaml").write_text("# mine\n")
    (out / "import.json").unlink()
    prepare.run_command()
    assert (out / "train.yaml").read_text() == "# mine\n", "edits stay"
    monkeypatch.setattr(sys, "argv", ["prepare.py", "index", "x.tar", "--many"])
    with pytest.raises(SystemExit):
        prepare.run_command()


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "launch/configs/imports").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_mapping_loads(recipe: Path) -> None:
    settings.load(recipe, [])


def test_an_edit_in_the_middle_of_a_large_table_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    source = tmp_path / "rows.csv"
    text = "image,title\n" + "".join(f"a.jpg,{number} {'x' * 30_000}\n" for number in range(100))
    source.write_text(text)
    run(source, tmp_path / "out", **QUESTION)
    source.write_text(text.replace("50 x", "50 y"))
    with pytest.raises(DataError, match="what differs: source_digest"):
        run(source, tmp_path / "out", **QUESTION)
    source.write_text(text)
    assert run(source, tmp_path / "out", **QUESTION)["samples"] == 100
