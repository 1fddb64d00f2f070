"""Fixtures of the engine's tests."""

from pathlib import Path

import pytest

from tests.tiny import write_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base."""
    return write_tiny_base(tmp_path_factory.mktemp("base"))
