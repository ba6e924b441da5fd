"""The error file of a rank, from which torchrun's summary is made."""

import json

import pytest
from torch.distributed.elastic.multiprocessing.errors import record

from phi3v_dist.cli.error_file import RedactingErrorHandler
from phi3v_dist.errors import ConfigError

SECRET = "canary-0123456789"


def fail(error: Exception) -> None:
    raise error


@pytest.fixture
def path(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    return path


def test_an_error_of_the_user_is_recorded_as_its_report(path):
    error = ConfigError(["`a` is 1", f"`b` is {SECRET}"])
    with pytest.raises(ConfigError):
        record(fail, RedactingErrorHandler())(error)
    message = json.loads(path.read_text())["message"]
    assert message["message"] == "ConfigError: `a` is 1\n`b` is ***"
    assert message["extraInfo"]["py_callstack"] == error.report().replace(SECRET, "***")
    assert int(message["extraInfo"]["timestamp"]) > 1_700_000_000


def test_any_other_error_is_recorded_with_its_traceback_and_without_secrets(path):
    with pytest.raises(RuntimeError):
        record(fail, RedactingErrorHandler())(RuntimeError(f"refused: https://user:{SECRET}@host/x"))
    text = path.read_text()
    assert SECRET not in text and "test_error_file.py" in text and "RuntimeError: refused: https://***@host/x" in text


def test_without_torchrun_nothing_is_written(path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    with pytest.raises(ValueError):
        record(fail, RedactingErrorHandler())(ValueError("x"))
    assert not path.exists()
