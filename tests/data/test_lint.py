"""lint finds everything that is wrong with shards, names it with shard and key, and finds nothing in good ones."""

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import picture
from webdataset import TarWriter

from phi3v_dist.cli import prepare
from phi3v_dist.config import SourceSettings
from phi3v_dist.data import lint as lint_module
from phi3v_dist.data.lint import NOTICES, PROBLEMS, LintOptions, Report, lint
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import ConfigError, DataError

JPEG = picture("red", 200, 100)


def record(question: str, answer: str | None = "yes") -> bytes:
    turns = [{"role": "user", "content": question}]
    return json.dumps(
        {"messages": turns + ([{"role": "assistant", "content": answer}] if answer is not None else [])}
    ).encode()


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for name, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def looked(folder: Path, **options: bool) -> Report:
    table = ShardTable.open([SourceSettings(shards=[str(folder / "*.tar")])])
    return lint(table, LintOptions(**options))


def found(report: Report, kind: str) -> list[tuple[str, str]]:
    return [(finding.key, finding.what) for finding in report.findings.get(kind, [])]


def test_good_shards_have_no_findings(shards: Path) -> None:
    report = looked(shards, deep=True, decode=True)
    assert (report.num_samples, report.num_shards) == (52, 3)
    assert not report.num_problems
    assert set(report.findings) <= {"contents"}  # text-only samples of few words


BAD = {
    "fine": {"json": record("a"), "jpg": JPEG},
    "json": {"json": b"{", "jpg": JPEG},
    "fields": {"json": b'{"title": 1}', "jpg": JPEG},
    "silent": {"json": record("only asked", None), "jpg": JPEG},
    "blank": {"json": record("x", " \n"), "jpg": JPEG},
    "surrogate": {"json": record("\ud800")},
    "header": {"json": record("b"), "jpg": b"<html>404</html>"},
    "cut": {"json": record("c"), "jpg": JPEG[:-100]},
    "hair": {"json": record("d"), "png": picture("red", 9000, 1, "PNG")},
    "thin": {"json": record("e"), "png": picture("red", 600, 4, "PNG")},
    "dot": {"json": record("f"), "png": picture("red", 1, 1, "PNG")},
    "alike": {"json": record("What <|end|> is <|image_1|> <image>?")},
    "mov\x1b[2Jie": {"json": record("g"), "mp4": b"film", "cls": b"3"},
    "same": {"json": record("a"), "jpg": JPEG},
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write(folder / "a.tar", BAD)
    write(folder / "b.tar", {"fine": {"json": record("another", "answer")}})
    return folder


@pytest.mark.fault(64)
@pytest.mark.fault(76)
def test_every_problem_is_found_once_and_named(bad_folder: Path) -> None:
    report = looked(bad_folder, decode=True)
    assert [key for key, _ in found(report, "text")] == ["json", "fields", "surrogate"]
    assert [key for key, _ in found(report, "answer")] == ["silent", "blank"]
    assert found(report, "unusable") == [
        ("header", "jpg is not a readable picture: its 16 bytes begin with b'<html>40', as no picture does")
    ]
    assert found(report, "picture") == [("cut", "jpg: Premature end of JPEG file")]
    assert found(report, "hopeless") == [("hair", "png has 9000 x 1 px")]
    assert report.num_problems == 8


@pytest.mark.fault(80)
def test_what_is_odd_but_used_is_a_notice(bad_folder: Path) -> None:
    report = looked(bad_folder)
    assert found(report, "thin") == [("thin", "png has 600 x 4 px")]
    assert found(report, "dot") == [("dot", "png has 1 x 1 px")]
    assert found(report, "look-alike") == [("alike", "<image>, <|end|>, <|image_1|>")]
    assert [key for key, _ in found(report, "odd key")] == [r"mov\x1b[2Jie"]
    assert sorted(found(report, "ignored")) == [("", "1 x .cls"), ("", "1 x .mp4")]
    assert found(report, "contents") == [("same", f"as {bad_folder}/a.tar:fine")]
    assert found(report, "key") == [("fine", f"as {bad_folder}/a.tar:fine")]
    assert "picture" not in report.findings  # only decoding tells


@pytest.mark.fault(65)
def test_deep_finds_a_bit_that_flipped_in_a_picture_after_indexing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {f"k{i}": {"json": record(str(i)), "jpg": JPEG} for i in range(5)})
    assert not looked(tmp_path, deep=True).findings
    flipped = bytearray(path.read_bytes())
    place = [i for i in range(len(flipped)) if flipped.startswith(JPEG, i)][3] + len(JPEG) // 2
    flipped[place] ^= 4
    path.write_bytes(flipped)
    assert not looked(tmp_path).num_problems
    report = looked(tmp_path, deep=True)
    assert [key for key, _ in found(report, "bytes")] == ["k3"] and report.num_problems == 1
    assert "checksum" in found(report, "bytes")[0][1]


@pytest.mark.fault(46)
def test_damage_of_the_tar_itself_is_a_problem_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {f"k{i}": {"json": record(str(i))} for i in range(9)})
    path.write_bytes(path.read_bytes()[: 1024 * 5 + 700])
    report = looked(tmp_path)
    assert len(found(report, "damage")) == 1 and re.match(r"bytes [\d,]+ to [\d,]+: ", found(report, "damage")[0][1])
    assert report.num_samples >= 5


def test_huge_members_and_unequal_shards_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint_module, "HUGE_BYTES", 10_000)
    large = picture("red", 30, 30) + bytes(200_000)
    for name in "abc":
        write(tmp_path / f"{name}.tar", {name: {"json": record(name)}})
    write(tmp_path / "d.tar", {"d": {"json": record("d"), "jpg": large}})
    report = looked(tmp_path)
    assert found(report, "huge") == [("d", "jpg has 0 MB")]
    assert [finding.shard for finding in report.findings["uneven"]] == [str(tmp_path / "d.tar")]


def test_every_kind_says_what_to_do() -> None:
    for title, fix in (PROBLEMS | NOTICES).values():
        assert len(title) > 5 and len(fix) > 20
    assert not PROBLEMS.keys() & NOTICES.keys()


# --- launch/prepare.py lint -----------------------------------------------------------------------------------------


def run_lint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "lint", *words])
    try:
        prepare.run_command()
    except DataError as error:
        return capsys.readouterr().out + error.report()
    return capsys.readouterr().out


def test_the_command_groups_counts_and_ends_with_a_data_error(
    bad_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run_lint(capsys, monkeypatch, str(bad_folder / "*.tar"), "--name", "2")
    assert "3 x text cannot be used: correct the JSON" in out and "… and 1 more (--name 3 names all)" in out
    assert f"{bad_folder}/a.tar:json: its JSON cannot be read" in out
    assert "15 samples in 2 shards: 7 problems" in out and "not looked at: the bytes of pictures (--deep)" in out
    assert "data: 4 problems\n  - 1 x unusable" in out and "\x1b[2J" not in out
    out = run_lint(capsys, monkeypatch, str(bad_folder / "b.tar"), "--decode")
    assert "1 samples in 1 shards: 0 problems, 0 notices" in out and "not looked at" not in out


def test_the_command_prints_names_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TarWriter(str(tmp_path / "a-:fire:-[red].tar"), mtime=0) as tar:
        tar.write({"__key__": "k:smile:[bold]", "json": b"{"})
    out = run_lint(capsys, monkeypatch, str(tmp_path / "*red*.tar"), "--name", "2")
    assert "a-:fire:-[red].tar:k:smile:[bold]: " in out


def test_the_command_takes_the_templates_of_a_configuration(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "52 samples in 3 shards: 0 problems" in run_lint(capsys, monkeypatch, "--config", str(config_file))
    out = run_lint(capsys, monkeypatch, "--config", str(config_file), "data.train.0.answer='{{ titel }}'")
    assert "40 x text cannot be used" in out and "'titel' is undefined (fields: messages)" in out


@pytest.mark.parametrize(
    ("words", "error", "reason"),
    [
        ([], ConfigError, "name shards, for example"),
        (["run.yaml"], ConfigError, "a configuration is given with --config run.yaml"),
        (["none-*.tar", "--prompt", "?"], DataError, "no such shard"),
    ],
)
def test_wrong_words_are_answered(
    words: list[str], error: type[Exception], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "lint", *words])
    with pytest.raises(error, match=reason):
        prepare.run_command()


def test_a_webdataset_writer_and_a_caption_file_are_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TarWriter(str(tmp_path / "x.tar"), mtime=0) as tar:
        tar.write({"__key__": "0", "jpg": JPEG, "txt": b"a red box"})
    assert "1 samples in 1 shards: 0 problems, 0 notices" in run_lint(capsys, monkeypatch, str(tmp_path / "x.tar"))
