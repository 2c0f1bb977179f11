"""Fixtures: a folder of blobs."""

from pathlib import Path

import pytest

from promptcache.store.blobs.folder import BlobFolder


@pytest.fixture
def blobs(tmp_path: Path) -> BlobFolder:
    folder = BlobFolder(tmp_path / "blobs")
    folder.files.create()
    return folder
