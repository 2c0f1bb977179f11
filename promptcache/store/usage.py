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
# Shorter reads tell more of a model's fixed costs than of its speed.
MIN_SPEED_TOKENS = 64
MIN_LOADED_TOKENS = 1000
# Other work, or a page cache that was cold, may have slowed a load down.
LOAD_BELIEVED_SECONDS = 3600


class UsageLog:
    """What runs report to a store, and what it makes of that."""

    def __init__(self, index: Index, budget: DiskBudget) -> None:
        self._index = index
        self._budget = budget

    def record(self, receipt: RequestUsage) -> tuple[str | None, float]:
        """Note what a request reused.

        Return the key of the prefix that it counts for, and the seconds saved: what
        reading the reused tokens would have taken at this model's speed on this
        machine, or 0 until that is known. Raises StoreError.
        """
        match, cached_tokens = receipt.match, receipt.cached_tokens
        speed = self.prefill_speed(receipt.fingerprint)
        saved_seconds = cached_tokens / speed if speed else 0.0
        database = self._index.database
        if database.read_only:
            return match.key, saved_seconds
        with database.impatient():
            with database.writing():
                # Less is shared by chance: templates begin alike.
                least = min(BLOCK_SIZE, cached_tokens + receipt.prefilled_tokens - 1)
                is_hit = cached_tokens >= max(least, 1)
                key = (self.touch(match) or match.key) if is_hit else None
                counts_for = (key or MEMORY_KEY) if is_hit else None
                self._index.history.add_receipt(receipt, counts_for, saved_seconds)
            last = {part.key: part.stop for part in match.slices[-1:]}
            self._budget.try_reserve(0, protect=last)
        return key or match.key, saved_seconds

    def touch(self, match: Match) -> str | None:
        """Note that a match was reused; return the key of the prefix it counts for."""
        keys = [part.key for part in match.slices]
        index = self._index
        with index.database.writing():
            now = index.clock.now()
            if match.ends_in_checkpoint:
                index.touch_passed([(s.key, s.stop) for s in match.slices], now=now)
            index.uses.note(match.slices, now=now)
            return index.touch(keys, match.cached_tokens, now=now)

    def add_speed(
        self, fingerprint: Fingerprint, num_tokens: int, seconds: float
    ) -> None:
        """Note how long a model took to read some tokens. Raises StoreError."""
        if num_tokens >= MIN_SPEED_TOKENS:
            self._add(fingerprint, "prefill", num_tokens, seconds)

    def add_load(
        self, fingerprint: Fingerprint, num_tokens: int, seconds: float
    ) -> None:
        """Note how long it took to load some cached tokens. Raises StoreError."""
        if num_tokens >= MIN_LOADED_TOKENS:
            self._add(fingerprint, "load", num_tokens, seconds)

    def _add(
        self, fingerprint: Fingerprint, deed: Deed, num_tokens: int, seconds: float
    ) -> None:
        if seconds <= 0 or self._index.database.read_only:
            return
        with self._index.database.impatient():
            self._index.history.add_speed(
                fingerprint, deed, num_tokens, seconds, now=time.time()
            )

    def prefill_speed(self, fingerprint: Fingerprint) -> float | None:
        """Return how many tokens a second a model reads here, or None if unknown."""
        return self._index.history.speed(fingerprint.digest, "prefill", now=time.time())

    def estimate(
        self, fingerprint: Fingerprint, num_tokens: int
    ) -> LoadEstimate | None:
        """Return what it takes to load cached tokens, and to read them again.

        None until both were measured on this machine. A load that is an hour old is
        not believed, so that it is tried again from time to time. Raises StoreError.
        """
        now = time.time()
        since = now - LOAD_BELIEVED_SECONDS
        history = self._index.history
        load = history.speed(fingerprint.digest, "load", now=now, since=since)
        prefill = self.prefill_speed(fingerprint)
        if load is None or prefill is None:
            return None
        return LoadEstimate(num_tokens / load, num_tokens / prefill)
