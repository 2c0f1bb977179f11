"""Starting: the cache a generation starts with, and what of the prompt is in it.

It comes from memory, from the store, or is empty.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from mlx_lm.models.cache import make_prompt_cache

from promptcache.errors import (
    ModelError,
    PromptCacheError,
    StoreError,
    UnsupportedCacheError,
    warn,
)
from promptcache.hot_tier import HotTier
from promptcache.request import Request
from promptcache.resuming import Resumed, resume
from promptcache.store import PrefixStore
from promptcache.treatment import check_supported
from promptcache.types import Fingerprint, Match


class Start(NamedTuple):
    """Where a generation starts.

    Attributes:
        cache: One mlx-lm cache object a layer.
        resumed: What it was filled with.
        fingerprint: What its values depend on, None to go on without the store.
        loaded_tokens: How many of its tokens were loaded from the store.
    """

    cache: list[Any]
    resumed: Resumed
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
    hot: HotTier,
    fingerprint: Callable[[], Fingerprint],
    request: Request,
) -> Start:
    """Find and load what is cached of a prompt; trouble is a warning and a prefill.

    Args:
        reader: What reads the prompt: the model, or both of a pair.
        store: The store, or None to go without.
        hot: What is in memory.
        fingerprint: Returns what KV values depend on.
        request: What is asked for.
    """
    cache = _make_cache(reader, request)
    if store is None:
        return Start(cache, Resumed())
    try:
        _check_cacheable(reader, cache, request)
        found = _resume(store, hot, fingerprint(), cache, request)
    except (ModelError, StoreError) as error:
        warn(f"going on without the store: {error}")
        # With a cache of its own: the other one may have been filled.
        return Start(_make_cache(reader, request), Resumed())
    with contextlib.suppress(PromptCacheError):
        request.on_match(found.match)
    return found


def _make_cache(reader: Any, request: Request) -> list[Any]:
    cache: list[Any] = make_prompt_cache(reader, request.max_kv_size)
    return cache


def _check_cacheable(reader: Any, cache: list[Any], request: Request) -> None:
    """Raise UnsupportedCacheError if the prompt's state cannot be kept."""
    if request.input_embeddings is not None:
        raise UnsupportedCacheError("prefixes cannot be stored with input_embeddings")
    check_supported(cache, reader)


def _resume(
    store: PrefixStore,
    hot: HotTier,
    fingerprint: Fingerprint,
    cache: list[Any],
    request: Request,
) -> Start:
    """Return a cache with the longest prefix there is, in memory or on disk."""
    if not request.reuse:
        return Start(cache, Resumed(), fingerprint)
    if found := _resume_hot(store, hot, fingerprint, request):
        return found
    # Speculation reads the last token itself.
    is_drafted = request.draft_model is not None
    resumed = resume(
        store,
        fingerprint,
        cache,
        request.token_ids[:-1] if is_drafted else request.token_ids,
        cuts=request.cuts,
        kv=request.kv,
        generating=not is_drafted,
        may_decline=True,
    )
    return Start(cache, resumed, fingerprint, resumed.cached_tokens)


def _resume_hot(
    store: PrefixStore, hot: HotTier, fingerprint: Fingerprint, request: Request
) -> Start | None:
    """Take a cache from memory, if no longer prefix is on disk."""
    if not request.uses_hot:
        return None
    found = hot.find(fingerprint.digest, request.token_ids, request.cuts.last_resumable)
    if found is None:
        return None
    match = store.lookup(request.token_ids, fingerprint, generating=True)
    is_shorter = found.num_tokens < min(match.cached_tokens, request.num_tokens - 1)
    # What is saved has to be captured, piece by piece, from where the store ends.
    is_lost = not found.is_divisible and request.is_due(match)
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
    return Start(cache, Resumed(match, found.num_tokens), fingerprint)
