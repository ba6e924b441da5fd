"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Recorded outputs of the published code; README.md in it says how they were made."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def assets_folder() -> Path:
    """Phi-3-vision's own tokenizer and config files: `phi3_vision` and `phi3_5_vision`."""
    folder = Path(os.environ.get("PHI3V_ASSETS", TESTS.parent.parent / "shared" / "phi3v_assets"))
    if not folder.is_dir():
        pytest.skip(f"no Phi-3-vision tokenizer files at {folder}; set PHI3V_ASSETS to their folder")
    return folder
