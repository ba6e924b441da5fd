"""Extensions that DeepSpeed compiles: built once, in sight, or refused; never while ranks start."""

import pytest

from phi3v_dist.attempt import build_cache
from phi3v_dist.errors import LaunchError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(build_cache.VARIABLE, str(tmp_path))
    return tmp_path


def test_an_extension_is_built_when_it_is_whole_and_nobody_is_at_it(folder):
    assert not build_cache.is_built("async_io")
    (folder / "async_io").mkdir()
    (folder / "async_io" / "async_io.so").touch()
    assert build_cache.is_built("async_io")
    (folder / "async_io" / "lock").touch()
    assert not build_cache.is_built("async_io")


def test_asking_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv(build_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not build_cache.is_built("async_io")
    assert build_cache.VARIABLE not in build_cache.os.environ and not list(tmp_path.iterdir())


def test_what_cannot_be_built_is_refused(folder):
    with pytest.raises(LaunchError, match="DeepSpeed's `asink_io` cannot be built on"):
        build_cache.build("asink_io")


def test_a_lock_that_a_killed_build_left_is_named_instead_of_waited_for(folder):
    (folder / "async_io").mkdir()
    (folder / "async_io" / "lock").touch()
    with pytest.raises(LaunchError, match="async_io/lock: a build lock, .* delete the file"):
        build_cache.build("async_io")
