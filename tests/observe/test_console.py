import io
import logging
import sys

import pytest
from rich.console import Console

from phi3v_dist.observe.console import ConsoleTracker

ROW = {"train/loss": 2.10341, "train/lr/text": 2e-4, "perf/tokens_per_s_per_gpu": 3210.4, "time/step_s": 0.81}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_greppable_line_per_n_steps_and_one_per_evaluation(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output = io.StringIO()
    tracker = ConsoleTracker(total_steps=20, every_n_steps=10, console=Console(file=output, width=100))
    tracker.start({})
    for step in range(1, 21):
        tracker.log({"train/step": step, **ROW})
    tracker.log({"train/step": 20, "eval/price_mae": 41.2, "eval/blind/price_mae": 148.0})
    tracker.finish({"train/step": 20, "eval/price_mae": 41.2, "eval/blind/price_mae": 148.0})
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in lines] == ["step=1/20", "step=10/20", "step=20/20", "eval"]
    assert lines[1].startswith("step=10/20 loss=2.103 lr=0.0002 tokens_per_s_per_gpu=3210 step_s=0.81 eta=")
    assert lines[3] == "eval step=20/20 price_mae=41.2 blind/price_mae=148"
    table = output.getvalue()
    assert "\x1b" not in table
    assert [word for word in table.split() if word in ("41.2", "148")] == ["41.2", "148"]  # side by side


def test_a_terminal_gets_a_bar_and_log_lines_pass_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    before = sys.stderr
    tracker = ConsoleTracker(20, console=Console(file=terminal, force_terminal=True, width=120))
    tracker.start({})
    assert handler.stream is sys.stderr is not before
    logging.getLogger("elsewhere").warning("a line from another module")
    tracker.log({"train/step": 7, **ROW})
    tracker.finish({})
    shown = terminal.getvalue()
    assert "a line from another module" in shown
    assert "step 7/20" in shown and "loss 2.103" in shown and "3,210 tokens/s" in shown
    assert handler.stream is before and sys.stderr is before
