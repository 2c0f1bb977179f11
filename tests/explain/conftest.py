"""Fixtures: the model of a text adventure."""

from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.adventures import templated


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose template takes arguments."""
    return templated(tiny.save_model(tmp_path / "narrator", tiny.LLAMA))
