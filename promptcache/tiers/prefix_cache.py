"""Starting: the cache a generation starts with, and what of the prompt is in it.

It comes from memory, from the store, or is empty.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from mlx_lm.models.cache import make_prompt_cache

from promptcache.errors import (
    ModelError,
    StoreError,
    UnsupportedCacheError,
    warn,
)
from promptcache.kvcache.classes import check_supported
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import Match
from promptcache.store import PrefixStore
from promptcache.tiers.disk_tier import RestoredPrefix, restore_prefix
from promptcache.tiers.memory_tier import MemoryTier
from promptcache.tiers.prompt_read import PromptRead


class FetchedPrefix(NamedTuple):
    """Where a generation starts.

    Attributes:
        cache: One mlx-lm cache object a layer.
        resumed: What it was filled with.
        fingerprint: What its values depend on, None to go on without the store.
        loaded_tokens: How many of its tokens were loaded from the store.
    """

    cache: list[Any]
    resumed: RestoredPrefix
    fingerprint: Fingerprint | None = None
    loaded_tokens: int = 0

    @property
    def match(self) -> Match:
        """Return what the store has of the prompt."""
        return self.resumed.match

    @property
    def cached_tokens(self) -> int:
        """Return how many tokens the cache holds."""
        return self.resumed.cached_tokens


def start(
    reader: Any,
    store: PrefixStore | None,
    hot: MemoryTier,
    fingerprint: Callable[[], Fingerprint],
    read: PromptRead,
) -> FetchedPrefix:
    """Find and load what is cached of a prompt; trouble is a warning and a prefill.

    Args:
        reader: What reads the prompt: the model, or both of a pair.
        store: The store, or None to go without.
        hot: What is in memory.
        fingerprint: Returns what KV values depend on.
        read: The prompt, and how it is read.
    """
    cache = _make_cache(reader, read)
    if store is None:
        return FetchedPrefix(cache, RestoredPrefix())
    try:
        _check_cacheable(reader, cache, read)
        return _resume(store, hot, fingerprint(), cache, read)
    except (ModelError, StoreError) as error:
        warn(f"going on without the store: {error}")
        # With a cache of its own: the other one may have been filled.
        return FetchedPrefix(_make_cache(reader, read), RestoredPrefix())


def _make_cache(reader: Any, read: PromptRead) -> list[Any]:
    cache: list[Any] = make_prompt_cache(reader, read.settings.max_kv_size)
    return cache


def _check_cacheable(reader: Any, cache: list[Any], read: PromptRead) -> None:
    """Raise UnsupportedCacheError if the prompt's state cannot be kept."""
    if not read.can_be_stored:
        raise UnsupportedCacheError("prefixes cannot be stored with input_embeddings")
    check_supported(cache, reader)


def _resume(
    store: PrefixStore,
    hot: MemoryTier,
    fingerprint: Fingerprint,
    cache: list[Any],
    read: PromptRead,
) -> FetchedPrefix:
    """Return a cache with the longest prefix there is, in memory or on disk."""
    if not read.reuse:
        return FetchedPrefix(cache, RestoredPrefix(), fingerprint)
    if found := _resume_hot(store, hot, fingerprint, read):
        return found
    resumed = restore_prefix(
        store,
        fingerprint,
        cache,
        read.token_ids[:-1],
        plan=read.plan,
        kv=read.kv,
        may_decline=True,
    )
    return FetchedPrefix(cache, resumed, fingerprint, resumed.cached_tokens)


def _resume_hot(
    store: PrefixStore, hot: MemoryTier, fingerprint: Fingerprint, read: PromptRead
) -> FetchedPrefix | None:
    """Take a cache from memory, if no longer prefix is on disk."""
    if not read.uses_memory:
        return None
    found = hot.find(fingerprint.digest, read.token_ids, read.plan.last_resume_point)
    if found is None:
        return None
    match = store.lookup(read.token_ids[:-1], fingerprint)
    is_shorter = found.num_tokens < min(match.cached_tokens, read.num_tokens - 1)
    # What is saved has to be captured, piece by piece, from where the store ends.
    is_lost = not found.is_sliceable and read.is_due(match)
    if is_shorter or is_lost:
        return None
    try:
        cache = hot.take(found)
    except (RuntimeError, MemoryError):
        # It does not fit twice; on disk it is safe.
        hot.clear()
        return None
    if cache is None:
        return None
    return FetchedPrefix(cache, RestoredPrefix(match, found.num_tokens), fingerprint)
