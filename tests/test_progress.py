"""Progress is a line a minute in a log, and a bar on a terminal."""

import io
import logging

import pytest
from rich.console import Console

from phi3v_dist.progress import show_progress


class Clock:
    """Seconds that a test sets."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def file() -> Console:
    return Console(file=io.StringIO())


def test_a_log_gets_a_line_a_minute_with_rate_and_remaining_time(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO), show_progress("shards", console=file(), clock=clock) as report:
        for second in range(150):
            clock.now_s = 100 + second
            report("indexing", 10 + 2 * second, 1000)
    assert caplog.messages == [
        "indexing: 130 of 1,000 shards, 2.0/s, 7 min 15 s left",
        "indexing: 250 of 1,000 shards, 2.0/s, 6 min 15 s left",
    ]


def test_a_task_of_less_than_a_minute_prints_nothing_and_an_unknown_total_has_no_end(caplog) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO), show_progress("records", console=file(), clock=clock) as report:
        report("copying", 0, None)
        clock.now_s += 59
        report("copying", 900, None)
        assert caplog.messages == []
        report("writing", 1, 2)  # each task has its own minute
        clock.now_s += 1
        report("copying", 90_000, None)
    assert caplog.messages == ["copying: 90,000 records, 1,500/s"]


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def test_a_terminal_shows_a_bar_and_the_log_stays_empty(caplog) -> None:
    console, clock = terminal(), Clock()
    with caplog.at_level(logging.INFO), show_progress("shards", console=console, clock=clock) as report:
        report("indexing", 3, 7)
        clock.now_s += 3600
        report("indexing", 4, 7)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "indexing" in shown and "4/7" in shown and "shards" in shown
    assert caplog.messages == []


def test_two_at_once_on_a_terminal_do_not_fail(caplog) -> None:
    console = terminal()
    with (
        caplog.at_level(logging.INFO),
        show_progress("shards", console=console) as outer,
        show_progress("tokens", console=console) as inner,
    ):
        outer("indexing", 1, 2)
        inner("counting", 1, 2)


def test_ranks_other_than_0_show_nothing(caplog) -> None:
    console, clock = terminal(), Clock()
    with caplog.at_level(logging.WARNING), show_progress("shards", console=console, clock=clock) as report:
        report("indexing", 1, 7)
        clock.now_s += 61
        report("indexing", 2, 7)
    assert console.file.getvalue() == "" and caplog.messages == []  # type: ignore[attr-defined]
