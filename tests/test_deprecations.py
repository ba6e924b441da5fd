"""A deprecation warning raised from phi3v_dist is an error in tests, whatever PYTHONWARNINGS says."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

import phi3v_dist

LIBRARY = """
import warnings

def old_function(category):
    warnings.warn("use new_function", category, stacklevel=2)

def calls_itself(category):
    old_function(category)
"""
OURS = """
import made_up_library

def use(name, category):
    getattr(made_up_library, name)(category)
"""
LAUNCHED = "from phi3v_dist import made_up_module; made_up_module.use({!r}, {})"
CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of ours, loaded as the others are, and a library with a deprecated function."""
    (tmp_path / "made_up_library.py").write_text(LIBRARY)
    (tmp_path / "phi3v_dist").mkdir()
    (tmp_path / "phi3v_dist" / "made_up_module.py").write_text(OURS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(phi3v_dist, "__path__", [*phi3v_dist.__path__, str(tmp_path / "phi3v_dist")])
    for name in ("made_up_library", "phi3v_dist.made_up_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("category", CATEGORIES)
def test_what_our_code_calls_must_not_be_deprecated(modules: Path, category: type[Warning]) -> None:
    ours = importlib.import_module("phi3v_dist.made_up_module")
    with pytest.raises(category, match="use new_function"):
        ours.use("old_function", category)
    ours.use("calls_itself", category)  # between libraries it is none of ours


@pytest.mark.parametrize("name, fails", [("old_function", True), ("calls_itself", False)])
def test_nor_what_a_launched_process_calls(modules: Path, name: str, fails: bool) -> None:
    extend = f"import phi3v_dist; phi3v_dist.__path__.append({str(modules / 'phi3v_dist')!r}); "
    env = environment(PYTHONWARNINGS="ignore")
    env["PYTHONPATH"] += f":{modules}"
    for category in CATEGORIES:
        code = extend + LAUNCHED.format(name, category.__name__)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode != 0) is fails, done.stderr
        assert (f"{category.__name__}: use new_function" in done.stderr) is fails
