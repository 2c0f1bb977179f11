"""Receipts: what requests reused, and which prefix that counts for."""

from promptcache.chain import BLOCK_SIZE
from promptcache.index import Index
from promptcache.store.room import Room
from promptcache.store.speeds import prefill_speed
from promptcache.types import Match, Receipt

# In place of a key: what was reused is in memory and nowhere on disk.
MEMORY_KEY = "memory"


def record(index: Index, room: Room, receipt: Receipt) -> tuple[str | None, float]:
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
        room.keep(0, protect={part.key: part.stop for part in match.slices[-1:]})
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
