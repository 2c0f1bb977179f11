"""What is removed goes and what is shared stays: segments split where others hang."""

from collections.abc import Sequence

import pytest
from invariants import check_invariants
from segments import (
    TINY,
    blob_paths,
    cached_tokens,
    check_match,
    encoder,
    expected_key,
    save,
    tokens,
)

from promptcache.blobs import BlobFolder
from promptcache.reports import PrunePolicy
from promptcache.store import PrefixStore
from promptcache.types import SegmentInfo

SECRET = tokens(70)
PIRATE = [*tokens(40), *tokens(30, first=900)]
LONGER = [*PIRATE, *tokens(50, first=2000)]


def publish_root(store: PrefixStore, token_ids: Sequence[int]) -> str:
    """Publish the blob of a segment from the start that no row refers to."""
    key = expected_key(TINY.digest, token_ids)
    info = SegmentInfo(key, TINY.digest, TINY, 0, len(token_ids), False, 1.0)
    BlobFolder(store.path).publish(info, encoder(token_ids)(0, len(token_ids)))
    return key


def check_found(store: PrefixStore, prompts: Sequence[Sequence[int]]) -> None:
    for prompt in prompts:
        match = store.lookup(prompt, TINY)
        assert match.cached_tokens == len(prompt)
        check_match(store, match, prompt)


# Both a segment and its head are there


@pytest.mark.parametrize("position", [40, 41, 64, 69])
def test_of_a_segment_and_its_head_a_new_index_takes_the_one_that_has_all(
    store: PrefixStore, position: int
) -> None:
    for prompt in (SECRET, PIRATE, LONGER):
        save(store, prompt)
    store.pin(store.key_of(SECRET, TINY), "secret")
    before = {prefix.key: prefix.name for prefix in store.prefixes()}
    publish_root(store, SECRET[:position])
    store.close()
    (store.path / "index.db").unlink()

    with PrefixStore(store.path) as rebuilt:
        assert rebuilt.rebuilt == 3
        check_invariants(rebuilt)
        check_found(rebuilt, [SECRET, PIRATE, LONGER])
        assert {prefix.key: prefix.name for prefix in rebuilt.prefixes()} == before
        assert rebuilt.verify().orphans == 1
        rebuilt.execute(rebuilt.plan_prune(PrunePolicy()))
        assert len(blob_paths(rebuilt)) == 3


@pytest.mark.parametrize("stored", [SECRET[:40], SECRET])
def test_verify_adopts_neither_a_segment_beside_its_head_nor_the_head(
    store: PrefixStore, stored: list[int]
) -> None:
    save(store, stored)
    save(store, PIRATE)
    publish_root(store, SECRET if len(stored) == 40 else SECRET[:40])

    report = store.verify()

    assert (report.rebuilt, report.orphans) == (0, 1)
    assert cached_tokens(store, SECRET) == len(stored)
    check_invariants(store)


def test_children_find_their_parent_in_whatever_segment_has_the_place(
    store: PrefixStore,
) -> None:
    for prompt in (SECRET, PIRATE, LONGER):
        save(store, prompt)
    key = publish_root(store, SECRET[:40])
    store.close()
    for path in blob_paths(store):
        if path.stem == expected_key(TINY.digest, SECRET):
            path.unlink()
    (store.path / "index.db").unlink()

    with PrefixStore(store.path) as rebuilt:
        assert rebuilt.rebuilt == 3
        check_found(rebuilt, [SECRET[:40], PIRATE, LONGER])
        assert cached_tokens(rebuilt, SECRET) == 40
        assert rebuilt.lookup(PIRATE, TINY).slices[0].key == key
        check_invariants(rebuilt)
