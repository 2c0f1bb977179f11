"""Usage: what requests reused, and how fast this machine loads and prefills."""

import time

from promptcache.segments.chain import BLOCK_SIZE
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import Match
from promptcache.store.index import Index
from promptcache.store.index.events import Deed
from promptcache.store.maintenance.disk_budget import DiskBudget
from promptcache.store.types import LoadEstimate, RequestUsage

# In place of a key: what was reused is in memory and nowhere on disk.
MEMORY_KEY = "memory"


def record(
    index: Index, budget: DiskBudget, receipt: RequestUsage
) -> tuple[str | None, float]:
    """Note what a request reused; return the prefix's key and the seconds saved."""
    match, cached_tokens = receipt.match, receipt.cached_tokens
    speed = prefill_speed(index, receipt.fingerprint)
    saved_seconds = cached_tokens / speed if speed else 0.0
    if index.database.read_only:
        return match.key, saved_seconds
    with index.database.impatient():
        with index.database.writing():
            # Less is shared by chance: templates begin alike.
            least = min(BLOCK_SIZE, cached_tokens + receipt.prefilled_tokens - 1)
            is_hit = cached_tokens >= max(least, 1)
            key = (touch(index, match) or match.key) if is_hit else None
            counts_for = (key or MEMORY_KEY) if is_hit else None
            index.history.add_receipt(receipt, counts_for, saved_seconds)
        budget.try_reserve(
            0, protect={part.key: part.stop for part in match.slices[-1:]}
        )
    return key or match.key, saved_seconds


def touch(index: Index, match: Match) -> str | None:
    """Note that a match was reused; return the key of the prefix it counts for."""
    keys = [part.key for part in match.slices]
    with index.database.writing():
        now = index.clock.now()
        if match.ends_in_checkpoint:
            index.touch_passed([(s.key, s.stop) for s in match.slices], now=now)
        index.uses.note(match.slices, now=now)
        return index.touch(keys, match.cached_tokens, now=now)


# Shorter reads tell more of a model's fixed costs than of its speed.
MIN_SPEED_TOKENS = 64
MIN_LOADED_TOKENS = 1000
# Other work, or a page cache that was cold, may have slowed a load down.
LOAD_BELIEVED_SECONDS = 3600


def add_prefill(
    index: Index, fingerprint: Fingerprint, num_tokens: int, seconds: float
) -> None:
    """Note how long a model took to read so many tokens."""
    if num_tokens >= MIN_SPEED_TOKENS:
        _add(index, fingerprint, "prefill", num_tokens, seconds)


def add_load(
    index: Index, fingerprint: Fingerprint, num_tokens: int, seconds: float
) -> None:
    """Note how long it took to load so many cached tokens."""
    if num_tokens >= MIN_LOADED_TOKENS:
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
