"""Speeds: how fast this machine reads tokens with a model, and loads cached ones."""

import time

from promptcache.index import Index
from promptcache.index.history import Deed
from promptcache.types import Fingerprint, LoadEstimate

# Shorter reads tell more of a model's fixed costs than of its speed.
LEAST_SPEED_TOKENS = 64
LEAST_LOADED_TOKENS = 1000
# Other work, or a page cache that was cold, may have slowed a load down.
LOAD_BELIEVED_SECONDS = 3600


def add_prefill(
    index: Index, fingerprint: Fingerprint, num_tokens: int, seconds: float
) -> None:
    """Note how long a model took to read so many tokens."""
    if num_tokens >= LEAST_SPEED_TOKENS:
        _add(index, fingerprint, "prefill", num_tokens, seconds)


def add_load(
    index: Index, fingerprint: Fingerprint, num_tokens: int, seconds: float
) -> None:
    """Note how long it took to load so many cached tokens."""
    if num_tokens >= LEAST_LOADED_TOKENS:
        _add(index, fingerprint, "load", num_tokens, seconds)


def _add(
    index: Index,
    fingerprint: Fingerprint,
    deed: Deed,
    num_tokens: int,
    seconds: float,
) -> None:
    if seconds <= 0 or index.database.read_only:
        return
    with index.database.impatient():
        now = time.time()
        index.history.add_speed(fingerprint, deed, num_tokens, seconds, now=now)


def prefill_speed(index: Index, fingerprint: Fingerprint) -> float | None:
    """Return how many tokens a second a model reads here, or None if unknown."""
    return index.history.speed(fingerprint.digest, "prefill", now=time.time())


def estimate(
    index: Index, fingerprint: Fingerprint, num_tokens: int
) -> LoadEstimate | None:
    """Return what it takes to load so many cached tokens, and to read them again."""
    now = time.time()
    since = now - LOAD_BELIEVED_SECONDS
    load = index.history.speed(fingerprint.digest, "load", now=now, since=since)
    prefill = prefill_speed(index, fingerprint)
    if load is None or prefill is None:
        return None
    return LoadEstimate(num_tokens / load, num_tokens / prefill)
