"""Under pressure, prompts of models resumed at checkpoints keep what they need."""

from collections.abc import Sequence

import pytest
from segments import (
    NEEDS_CHECKPOINT,
    TINY,
    blob_nbytes,
    cached_tokens,
    save,
    save_checkpoint,
    tokens,
)

from promptcache.reports import PrunePolicy
from promptcache.store import PrefixStore
from promptcache.types import Worth

SYSTEM = tokens(300)
TURN = 100


def save_turn(
    store: PrefixStore,
    prompt: Sequence[int],
    *,
    worth: Worth = Worth.ANSWER,
    is_prefix: bool = True,
) -> None:
    """Save a prompt with the checkpoint at its end."""
    save(store, prompt, is_prefix=False, width=100, resumption=NEEDS_CHECKPOINT)
    save_checkpoint(store, prompt, width=600, worth=worth, is_prefix=is_prefix)


def question(first: int, num_turns: int = 1) -> list[int]:
    """Return a prompt with the system prompt that all have."""
    return [*SYSTEM, *tokens(num_turns * TURN, first=first)]


def prune_to(store: PrefixStore, share: float) -> None:
    """Evict until no more than a share of the blobs is left."""
    nbytes = store.total_nbytes() - int(blob_nbytes(store) * (1 - share))
    store.execute(store.plan_prune(PrunePolicy(max_nbytes=nbytes)))


@pytest.mark.parametrize("worth", [Worth.BUILT, Worth.BOUNDARY])
def test_system_prompt_goes_after_the_conversations_that_go_through_it(
    store: PrefixStore, worth: Worth
) -> None:
    """Each resumes at a checkpoint of its own, past the system prompt's."""
    save_turn(store, SYSTEM, worth=worth, is_prefix=False)
    for num_turns in (1, 2):
        for first in range(1000, 7000, 1000):
            save_turn(store, question(first, num_turns))

    prune_to(store, 0.3)

    assert cached_tokens(store, question(9000)) == len(SYSTEM)


@pytest.mark.parametrize("worth", [Worth.BUILT, Worth.BOUNDARY])
def test_hit_counts_for_the_system_prompt_that_it_goes_through(
    store: PrefixStore, worth: Worth
) -> None:
    save_turn(store, SYSTEM, worth=worth, is_prefix=False)
    save_turn(store, question(1000))
    for first in range(2000, 5000, 1000):
        save_turn(store, tokens(300, first=first))
    store.touch(store.lookup(question(1000, 2), TINY))

    prune_to(store, 0.5)

    assert cached_tokens(store, question(9000)) == len(SYSTEM)
