"""Strangers' words in logs and errors: letters stay, what does not show is spelled out, no line is forged."""

import logging
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v_dist.cli.app import run_script, say_attempt
from phi3v_dist.config import SourceSettings
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.samples import BadSample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import DataError
from phi3v_dist.printable import printable

FORGED = "k\n2026-12-01 12:00:00 INFO [rank 0] all is well\x1b[2J\x1b]0;title\x07\u202e\r"


@pytest.mark.fault(80)
@given(st.text())
def test_whatever_the_text_only_what_shows_is_left_and_twice_is_once(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and printable(shown) == shown
    assert printable(text, keep="\n").count("\n") == text.count("\n")
    if text.isprintable():
        assert shown == text


def test_letters_of_any_script_stay() -> None:
    for words in ("naïve café", "日本語", "שלום", "emoji 😀", "a b"):
        assert printable(words) == words
    assert printable("\ud800\x00\t\u2028") == r"\ud800\x00\t\u2028"


@pytest.mark.fault(80)
def test_a_bad_sample_names_itself_on_one_line() -> None:
    error = BadSample("shards/\x1b[31m.tar", FORGED, "a reason\nwith lines")
    assert str(error).isprintable() and "sample 'k\\n2026-12-01 12:00:00" in str(error)
    assert (error.key.isprintable(), error.reason) == (True, r"a reason\nwith lines")


@pytest.mark.fault(80)
def test_keys_of_a_tar_are_printed_as_letters(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key in (FORGED, "caf\udce9"):
            tar.addfile(tarfile.TarInfo(f"{key}.json"))
    table = ShardTable.open([SourceSettings(shards=[str(tmp_path / "x.tar")])])
    names = [table.sample_name(sample_id) for sample_id in range(2)]
    assert all(name.isprintable() for name in names) and names[1].endswith(r":caf\xe9")
    assert Fetcher(table).fetch(0) == {"json": b""}


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], int]]:
    """Runs a function as a command does, in this process, and returns its exit code."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/chosen")  # or it would be chosen for all later tests
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    handlers, level = logging.root.handlers[:], logging.root.level

    def run(main: Callable[[], None]) -> int:
        with pytest.raises(SystemExit) as stopped:
            run_script(main, private=False)  # this process's umask is not ours to change
        return stopped.value.code

    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.mark.fault(80)
def test_no_message_looks_like_a_line_of_the_log(run_main, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        logging.warning("reading %s", FORGED)
        raise DataError([f"{FORGED}: is odd"])

    assert run_main(main) == 3
    out, err = capsys.readouterr()
    for printed in (out, err):
        assert "\x1b" not in printed and "\r" not in printed and "\u202e" not in printed
        assert not [line for line in printed.splitlines() if line.startswith("2026-12-01 12:00:00 INFO")]
        assert r"all is well\x1b[2J" in printed


def test_lines_of_the_log_carry_date_level_attempt_and_rank(run_main, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        logging.info("before the run is known")
        say_attempt(3, 0)
        logging.warning("slow")
        raise DataError(["a.tar: no such file"])

    assert run_main(main) == 3
    out, err = capsys.readouterr()
    lines = [line.split(" ", 2) for line in [*out.splitlines(), err.splitlines()[0]]]
    assert [line for _, _, line in lines] == [
        "INFO [rank 0] before the run is known",
        "WARNING [attempt 3, rank 0] slow",
        "ERROR [attempt 3, rank 0] data: 1 problem",
    ]
    for day, clock, _ in lines:
        written = datetime.fromisoformat(f"{day} {clock}")
        assert abs(datetime.now() - written) < timedelta(hours=2), "local time"


def test_an_error_before_a_run_begins_is_an_answer_and_no_line_of_a_log(run_main, capsys) -> None:
    def main() -> None:
        raise DataError(["a.tar: no such file"])

    run_main(main)
    assert capsys.readouterr().err == "data: 1 problem\n  - a.tar: no such file\n"
