"""Fixtures: a store with one of everything."""

from pathlib import Path

import pytest

from tests.helpers.forging import fill


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "store"
    fill(folder)
    return folder
