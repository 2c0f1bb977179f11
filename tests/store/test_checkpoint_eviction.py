"""Under pressure, prompts of models resumed at checkpoints keep what they need."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

from promptcache import CachedGenerator, PromptCacheWarning
from promptcache.errors import StoreFullError
from promptcache.segments.types import Priority
from promptcache.store import PrefixStore
from promptcache.store.reports import PrunePolicy
from tests.architectures import architectures
from tests.helpers import tiny
from tests.helpers.segments import (
    NEEDS_CHECKPOINT,
    TINY,
    blob_nbytes,
    blob_paths,
    cached_tokens,
    save,
    save_checkpoint,
    tokens,
)

SYSTEM = tokens(300)
TURN = 100


def save_turn(
    store: PrefixStore,
    prompt: Sequence[int],
    *,
    priority: Priority = Priority.ANSWER,
    is_prefix: bool = True,
) -> None:
    """Save a prompt with the checkpoint at its end."""
    save(store, prompt, is_prefix=False, width=100, resumption=NEEDS_CHECKPOINT)
    save_checkpoint(store, prompt, width=600, priority=priority, is_prefix=is_prefix)


def question(first: int, num_turns: int = 1) -> list[int]:
    """Return a prompt with the system prompt that all have."""
    return [*SYSTEM, *tokens(num_turns * TURN, first=first)]


def prune_to(store: PrefixStore, share: float) -> None:
    """Evict until no more than a share of the blobs is left."""
    nbytes = store.total_nbytes() - int(blob_nbytes(store) * (1 - share))
    store.execute(store.plan_prune(PrunePolicy(max_nbytes=nbytes)))


@pytest.mark.parametrize("priority", [Priority.BUILT, Priority.BOUNDARY])
def test_system_prompt_goes_after_the_conversations_that_go_through_it(
    store: PrefixStore, priority: Priority
) -> None:
    """Each resumes at a checkpoint of its own, past the system prompt's."""
    save_turn(store, SYSTEM, priority=priority, is_prefix=False)
    for num_turns in (1, 2):
        for first in range(1000, 7000, 1000):
            save_turn(store, question(first, num_turns))

    prune_to(store, 0.3)

    assert cached_tokens(store, question(9000)) == len(SYSTEM)


@pytest.mark.parametrize("priority", [Priority.BUILT, Priority.BOUNDARY])
def test_hit_counts_for_the_system_prompt_that_it_goes_through(
    store: PrefixStore, priority: Priority
) -> None:
    save_turn(store, SYSTEM, priority=priority, is_prefix=False)
    save_turn(store, question(1000))
    for first in range(2000, 5000, 1000):
        save_turn(store, tokens(300, first=first))
    store.usage_log.touch(store.lookup(question(1000, 2), TINY))

    prune_to(store, 0.5)

    assert cached_tokens(store, question(9000)) == len(SYSTEM)


def test_rows_are_not_stored_where_their_state_does_not_fit(
    tmp_path: Path,
) -> None:
    with PrefixStore(tmp_path / "store", max_nbytes=1_500_000) as store:
        save_turn(store, SYSTEM)
        before = blob_paths(store)

        with pytest.raises(StoreFullError):
            save(
                store,
                question(1000),
                resumption=NEEDS_CHECKPOINT,
                state_nbytes=1_400_000,
            )

        assert blob_paths(store) == before
        assert cached_tokens(store, question(1000)) == len(SYSTEM)


@pytest.mark.parametrize("next_turn", [290, None])
def test_place_where_the_next_turn_resumes_stays_while_a_turn_is_saved(
    tmp_path: Path, next_turn: int | None
) -> None:
    """It was not used for the longest time."""
    with PrefixStore(tmp_path / "store") as store:
        for end in (290, 300):
            save_turn(store, SYSTEM[:end], is_prefix=False)
        for first in range(2000, 5000, 1000):
            save_turn(store, tokens(100, first=first))
        # Without what the index takes for a while only.
        store.execute(store.plan_prune(PrunePolicy()))
        store.max_nbytes = store.total_nbytes()

        save(
            store,
            question(1000),
            is_prefix=False,
            width=100,
            resumption=NEEDS_CHECKPOINT,
            state_nbytes=9_600,
            next_turn=next_turn,
        )

        assert cached_tokens(store, tokens(100, first=2000)) == 0
        assert cached_tokens(store, SYSTEM[:295]) == (290 if next_turn else 0)
        assert cached_tokens(store, SYSTEM) == (next_turn or 300)


def test_conversation_that_outgrows_the_limit_keeps_what_it_resumes_at(
    tmp_path: Path,
) -> None:
    model = architectures.build("qwen3_next")
    tiny.save_tokenizer(tmp_path)
    token_ids = [(i * 7) % 200 + 5 for i in range(1800)]
    with PrefixStore(tmp_path / "store", max_nbytes=500_000) as store:
        generator = CachedGenerator(
            model, load_tokenizer(tmp_path), store=store, memory_limit=0
        )

        def turn(end: int) -> int:
            """Return how much of a longer prompt was reused."""
            options = {"max_tokens": 8, "save": True, "save_answer": True}
            *_, last = generator.stream_generate(token_ids[:end], **options)
            return last.cached_tokens

        with pytest.warns(PromptCacheWarning, match="do not fit into the limit"):
            reused = [turn(end) for end in range(300, 1801, 300)]

    assert reused == sorted(reused)
    assert reused[-1] >= 600
