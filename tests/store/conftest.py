"""Stores with prefixes of plain bytes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from promptcache.segments.types import Priority
from promptcache.store import PrefixStore
from tests.helpers.segments import (
    NEEDS_CHECKPOINT,
    TINY,
    expected_key,
    save,
    save_checkpoint,
    save_with_checkpoints,
    tokens,
)
from tests.helpers.stores import OTHER, STORED, TURNS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def filled(store: PrefixStore) -> Iterator[PrefixStore]:
    """A store with a chain, two forks, a pin inside a segment, and another model."""
    for prompt in STORED:
        save(store, prompt)
    store.pin(save(store, STORED[0][:77]), "inside")
    store.pin(expected_key(TINY.digest, STORED[1]), "end")
    save(store, STORED[0], OTHER)
    yield store


@pytest.fixture
def resumable(store: PrefixStore) -> Iterator[PrefixStore]:
    """A store whose prefixes can be resumed at checkpoints only, with a fork and a pin.

    There are checkpoints on the way at 40, which is a boundary, and at 300.
    """
    save(store, TURNS[1], is_prefix=False, resumption=NEEDS_CHECKPOINT)
    save_checkpoint(store, tokens(40), priority=Priority.BOUNDARY)
    save_checkpoint(store, tokens(300))
    save_checkpoint(store, TURNS[0], is_prefix=True)
    save_checkpoint(store, TURNS[1], is_prefix=True)
    save_with_checkpoints(store, TURNS[2])
    store.pin(expected_key(TINY.digest, TURNS[0]), "first")
    yield store
