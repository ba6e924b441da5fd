"""Progress is a line a minute in a log, and a bar on a terminal."""

import io
import logging
import sys
from functools import partial

import pytest
from rich.console import Console

from phi3v_dist.progress import BYTES, LiveDisplay, show_progress, summed, track


class Clock:
    """Seconds that a test sets."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_rank_0(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def file() -> Console:
    return Console(file=io.StringIO())


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def shown_on(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_gets_a_line_a_minute_with_rate_and_remaining_time(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with show_progress("shards", console=file(), clock=clock) as report:
        for second in range(150):
            clock.now_s = 100 + second
            report("indexing", 10 + 2 * second, 1000)
    assert caplog.messages == [
        "indexing: 130 of 1,000 shards, 2.0/s, 7 min 15 s left",
        "indexing: 250 of 1,000 shards, 2.0/s, 6 min 15 s left",
    ]


def test_a_task_of_less_than_a_minute_prints_nothing_and_an_unknown_total_has_no_end(caplog) -> None:
    clock = Clock()
    with show_progress("records", console=file(), clock=clock) as report:
        report("copying", 0, None)
        clock.now_s += 59
        report("copying", 900, None)
        assert caplog.messages == []
        report("indexing", 1, 2, unit="shards")  # each task has its own minute, and may have its own unit
        clock.now_s += 1
        report("copying", 90_000, None)
        clock.now_s += 59
        report("indexing", 2, 2, unit="shards")
    assert caplog.messages == ["copying: 90,000 records, 1,500/s", "indexing: 2 of 2 shards, 1.0/min, 0 s left"]


def test_bytes_are_shown_as_a_person_reads_them(caplog) -> None:
    clock = Clock()
    with show_progress(BYTES, console=file(), clock=clock) as report:
        add = summed(report, "downloading", 8_000_000_000)
        add(500_000_000)
        clock.now_s += 60
        add(1_500_000_000)
    assert caplog.messages == ["downloading: 2.0 GB of 8.0 GB, 25.0 MB/s, 4 min 00 s left"]


def test_a_task_that_stands_still_has_no_remaining_time(caplog) -> None:
    clock = Clock()
    with show_progress("shards", console=file(), clock=clock) as report:
        report("indexing", 3, 9)
        clock.now_s += 60
        report("indexing", 3, 9)
    assert caplog.messages == ["indexing: 3 of 9 shards, 0.0/s"]


def test_items_are_tracked_from_the_first_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal()
    monkeypatch.setattr("phi3v_dist.progress.show_progress", partial(show_progress, console=console))
    assert list(track("abc", "reading", "tensors")) == ["a", "b", "c"]
    assert "3 of 3 tensors" in shown_on(console) and LiveDisplay.current is None


def test_a_terminal_shows_a_bar_and_the_log_stays_empty(caplog) -> None:
    console, clock = terminal(), Clock()
    with show_progress("shards", console=console, clock=clock) as report:
        report("indexing", 3, 7)
        clock.now_s += 3600
        report("indexing", 4, 7)
    shown = shown_on(console)
    assert "indexing" in shown and "4 of 7 shards" in shown
    assert caplog.messages == []


def test_a_bar_within_a_bar_is_lines(caplog) -> None:
    outer_console, inner_console, clock = terminal(), terminal(), Clock()
    with (
        show_progress("shards", console=outer_console) as outer,
        show_progress("tokens", console=inner_console, clock=clock) as inner,
    ):
        outer("indexing", 1, 2)
        inner("counting", 1, 2)
        clock.now_s += 60
        inner("counting", 2, 2)
    assert shown_on(inner_console) == "" and caplog.messages == ["counting: 2 of 2 tokens, 1.0/min, 0 s left"]
    assert "1 of 2 shards" in shown_on(outer_console) and LiveDisplay.current is None


def test_a_failed_task_takes_its_bar_away(caplog) -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), show_progress("shards", console=terminal()):
        raise ZeroDivisionError
    assert LiveDisplay.current is None and (sys.stdout, sys.stderr) == before


def test_log_lines_appear_above_the_bar_and_what_goes_to_a_file_stays_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, output = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", output)  # as `phi3v-prepare stats … > FILE`
    handlers = [logging.StreamHandler(screen), logging.StreamHandler(output)]
    monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
    console = Console(file=screen, width=120)
    with show_progress("shards", console=console) as report:
        report("indexing", 3, 7)
        assert handlers[0].stream is sys.stderr is not screen
        logging.getLogger("elsewhere").warning("a line from another module")
        print("a result")
        assert sys.stdout is output
    assert output.getvalue() == "a line from another module\na result\n"
    assert "a line from another module\n" in screen.getvalue()
    assert sys.stderr is screen and [handler.stream for handler in handlers] == [screen, output]


def test_ranks_other_than_0_show_nothing(caplog) -> None:
    console, clock = terminal(), Clock()
    with caplog.at_level(logging.WARNING), show_progress("shards", console=console, clock=clock) as report:
        report("indexing", 1, 7)
        clock.now_s += 61
        report("indexing", 2, 7)
    assert shown_on(console) == "" and caplog.messages == []
