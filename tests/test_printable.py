"""Strangers' words in logs and errors: letters stay, what does not show is spelled out, no line is forged."""

import logging
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v_dist.cli.app import run_script
from phi3v_dist.config import SourceSettings
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.samples import BadSample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import DataError
from phi3v_dist.printable import printable

FORGED = "k\n12:00:00 [0] all is well\x1b[2J\x1b]0;title\x07\u202e\r"


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
    assert str(error).isprintable() and "sample 'k\\n12:00:00" in str(error)
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


@pytest.mark.fault(80)
def test_no_message_looks_like_a_line_of_the_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/chosen")  # or it would be chosen for all later tests
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    handlers, level = logging.root.handlers[:], logging.root.level

    def main() -> None:
        logging.warning("reading %s", FORGED)
        raise DataError([f"{FORGED}: is odd"])

    try:
        with pytest.raises(SystemExit) as stopped:
            run_script(main, private=False)  # this process's umask is not ours to change
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    out, err = capsys.readouterr()
    assert stopped.value.code == 3
    for printed in (out, err):
        assert "\x1b" not in printed and "\r" not in printed and "\u202e" not in printed
        assert not [line for line in printed.splitlines() if line.startswith("12:00:00 [0] all")]
        assert r"all is well\x1b[2J" in printed
