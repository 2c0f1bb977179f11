"""The served cache: what mlx-lm's server takes for its prompt cache.

It looks for the longest prefix in memory and on disk, and keeps what was read in
both. mlx-lm calls it on the thread that generates, which it never makes wait for the
disk to write, and which no trouble of its own may end.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import mlx.core as mx

from promptcache.errors import StoreError, warn
from promptcache.kvcache import snapshot
from promptcache.kvcache.classes import (
    LayerKind,
    first_row,
    has_only_rows,
    is_all_plain,
    kind_of,
    parts_of,
    shared_rows,
)
from promptcache.server.backend.clerk import Clerk
from promptcache.server.backend.request_state import RequestState, RequestTokens
from promptcache.server.metrics import Gauges, ServingMetrics
from promptcache.store import PrefixStore
from promptcache.tiers.background_saver import BackgroundSaver, Ending
from promptcache.tiers.background_writer import MAX_QUEUED_NBYTES, BackgroundWriter
from promptcache.tiers.disk_tier import restore_prefix
from promptcache.tiers.memory_tier import MemoryTier

# What an interrupted prefill may lose of the time it read; see `generation`.
KEEP_SECONDS = 5.0
# Of the memory that caches may take, what may be on its way to the disk, and the least
# with which the ends of one prompt need not wait for each other.
QUEUE_SHARE = 4
MIN_QUEUE_NBYTES = 32 * 1024**2
# Clients ask for as many tokens as they may get; few answers are that long.
EXPECTED_ANSWER_TOKENS = 1024
Found = tuple[list[Any] | None, int, str]


class ServerPromptCache:
    """Prompt caches in memory and on disk, with the methods of mlx-lm's own.

    Attributes:
        on_kept: Called when something was kept, which others may wait for.
        num_waiting: How many requests wait, to be told.
        metrics: What it did.

    Invariants:
        What it holds in memory fits into `memory_limit`, together with the caches of
        running requests as mlx-lm told last, as long as these alone do.
    """

    def __init__(
        self,
        store: PrefixStore | None,
        *,
        memory_limit: int,
        save_answers: bool = True,
    ) -> None:
        """Take the store, how many bytes of memory to use, and the policy."""
        self._store = store
        self._memory_limit = memory_limit
        self._save_answers = save_answers
        share = max(memory_limit // QUEUE_SHARE, MIN_QUEUE_NBYTES)
        queue = min(share, MAX_QUEUED_NBYTES)
        self._writer = BackgroundWriter(queue)
        self._saver = BackgroundSaver(store, self._writer, queue) if store else None
        self._hot = MemoryTier(memory_limit)
        self._running: list[RequestState] = []
        self._active_nbytes = 0
        self._token_nbytes = 0.0
        self.num_waiting = 0
        self.on_kept: Callable[[], None] = lambda: None
        self.metrics = ServingMetrics(self._levels)
        self._clerk = Clerk(store, self.metrics) if store else None

    # What mlx-lm calls

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[Any] | None, list[int]]:
        """Return a cache with the longest prefix of a prompt, and what is left of it.

        At least one token is left. The cache is the caller's.
        """
        if not isinstance(tokens, RequestTokens):
            return None, tokens
        reading = tokens.reading
        reading.started_at = time.perf_counter()
        try:
            cache, num_cached, tier = self._find(reading)
        # Whatever it is, the prompt can be read.
        except Exception as error:
            warn(f"going on without the cache: {error}")
            cache, num_cached, tier = None, 0, ""
        reading.begin(num_cached)
        self._count(reading, tier)
        self._run(reading)
        return cache, tokens[num_cached:]

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep a cache that has read tokens; the caller keeps nothing of it."""
        if not isinstance(tokens, RequestTokens):
            return
        reading, saved = tokens.reading, None
        try:
            saved = self._insert(reading, tokens, prompt_cache)
        except Exception as error:
            warn(f"a prompt is not kept: {error}")
        self.on_kept()
        if len(tokens) >= reading.num_tokens:
            reading.settle_with(saved)

    def trim_to(
        self, *, n_sequences: int | None = None, n_bytes: int | None = None
    ) -> None:
        """Leave so many bytes to what is kept; running requests take the others."""
        if n_bytes is not None:
            self._active_nbytes = max(self._memory_limit - n_bytes, 0)
            self._hold_limit()

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that it holds."""
        return self._hot.nbytes + self._queued_nbytes

    def __len__(self) -> int:
        return len(self._hot)

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Return what mlx-lm logs before each request."""
        queued = len(self._saver) if self._saver is not None else 0
        return {
            "memory": {"n_sequences": len(self), "n_bytes": self._hot.nbytes},
            "queued": {"n_sequences": queued, "n_bytes": self._queued_nbytes},
        }

    # Finding

    def _find(self, reading: RequestState) -> Found:
        reading.check_model()
        hot = None
        if reading.settings.kv.bits is None:
            hot = self._hot.find(
                reading.fingerprint.digest,
                reading.token_ids,
                reading.plan.last_resume_point,
            )
        num_hot = hot.num_tokens if hot else 0
        if num_hot < reading.num_tokens - 1:
            cache, num_cold = self._resume(reading, num_hot)
            if num_cold > num_hot:
                return cache, num_cold, "disk"
        cache = self._hot.share(hot) if hot else None
        return (cache, num_hot, "memory") if cache else (None, 0, "")

    def _resume(
        self, reading: RequestState, num_hot: int
    ) -> tuple[list[Any] | None, int]:
        """Load what the store has, if that is more than what memory has."""
        if self._store is None:
            return None, 0
        # A server reads the last token itself.
        token_ids, fingerprint = reading.token_ids[:-1], reading.fingerprint
        try:
            reading.match = self._store.lookup(token_ids, fingerprint)
            if reading.match.cached_tokens <= num_hot:
                return None, 0
            cache = reading.model.make_cache(reading.settings)
            resumed = restore_prefix(
                self._store,
                fingerprint,
                cache,
                token_ids,
                plan=reading.plan,
                kv=reading.settings.kv,
                may_decline=True,
            )
        except StoreError as error:
            warn(f"going on without the store: {error}")
            return None, 0
        reading.match, reading.loaded_tokens = resumed.match, resumed.cached_tokens
        if resumed.taken is not None:
            reading.captures = [resumed.taken]
        self._keep_resumed(reading, cache, resumed.cached_tokens)
        return cache, resumed.cached_tokens

    def _keep_resumed(
        self, reading: RequestState, cache: list[Any], num_cached: int
    ) -> None:
        """Have the next request find in memory what this one loaded."""
        if num_cached and reading.settings.kv.bits is None and has_only_rows(cache):
            token_ids = reading.token_ids[:num_cached]
            shared = shared_rows(cache, num_cached)
            self._hot.add(reading.fingerprint.digest, token_ids, shared)

    def num_cached(self, reading: RequestState) -> int:
        """Return how much of a prompt could be taken over now."""
        digest, token_ids = reading.fingerprint.digest, reading.token_ids
        found = self._hot.find(digest, token_ids, reading.plan.last_resume_point)
        num_hot = found.num_tokens if found else 0
        if self._store is None or num_hot == reading.num_tokens - 1:
            return num_hot
        with contextlib.suppress(StoreError):
            match = self._store.lookup(token_ids[:-1], reading.fingerprint)
            return max(num_hot, match.cached_tokens)
        return num_hot

    def _count(self, reading: RequestState, tier: str) -> None:
        num_new = reading.num_tokens - reading.cached_tokens
        if tier:
            self.metrics.hit(tier, reading.cached_tokens, num_new)
        else:
            self.metrics.miss(num_new)

    # Running requests

    def _run(self, reading: RequestState) -> None:
        for other in self.reading():
            other.is_alone = reading.is_alone = False
        self._running.append(reading)

    def running(self) -> list[RequestState]:
        """Return the requests that somebody waits for.

        To be called on the thread that generates.
        """
        self._running = [r for r in self._running if not r.over.is_set()]
        return self._running

    def reading(self) -> list[RequestState]:
        """Return those of them whose prompt is being read."""
        return [reading for reading in self.running() if not reading.is_read]

    def has_room_for(self, reading: RequestState) -> bool:
        """Return whether one more request fits into memory, by what others took."""
        running = self.running()
        nbytes = sum(map(self._expected_nbytes, [*running, reading]))
        return not running or nbytes <= self._memory_limit

    def _expected_nbytes(self, reading: RequestState) -> float:
        answer = min(reading.max_tokens, EXPECTED_ANSWER_TOKENS)
        return self._token_nbytes * (reading.num_tokens + answer)

    # Keeping

    def _insert(
        self, reading: RequestState, tokens: RequestTokens, cache: list[Any]
    ) -> "Future[None] | None":
        """Keep a cache, and return what is done when it is stored, too."""
        start, reading.num_read = reading.num_read, len(tokens)
        was_read = start >= reading.num_tokens - 1
        if reading.is_read and not was_read:
            self._note(reading)
        cache, end = _usable(reading, cache, len(tokens))
        if end <= reading.cached_tokens or not cache:
            return None
        is_answer = end >= reading.num_tokens
        if not self._is_due(reading, cache, end):
            return None
        reading.check_model()
        mx.eval([part.state for _, part in parts_of(cache) if not part.empty()])
        reading.kept_at = time.perf_counter()
        self._token_nbytes = sum(layer.nbytes for layer in cache) / end
        saved = None
        if self._saver is not None and (self._save_answers or not is_answer):
            saved = self._save(reading, [*tokens[:end]], cache, start=start)
        self._hot.add(reading.fingerprint.digest, tokens[:end], cache)
        self._hold_limit()
        return saved

    def _is_due(self, reading: RequestState, cache: list[Any], end: int) -> bool:
        """Return whether to keep a place, which costs a copy of the whole cache."""
        if not has_only_rows(cache):
            return True
        is_late = time.perf_counter() - reading.kept_at >= KEEP_SECONDS
        is_end = end == reading.head or end >= reading.num_tokens - 1
        return is_end or is_late

    def _save(
        self,
        reading: RequestState,
        token_ids: list[int],
        cache: list[Any],
        *,
        start: int,
    ) -> "Future[None] | None":
        assert self._saver is not None
        end = len(token_ids)
        if not _has_rows_since(cache, start):
            # An answer that was longer than a window.
            reading.captures.clear()
            return None
        taken = snapshot.capture(cache, start, end)
        mx.eval(taken.rows, taken.states)
        reading.captures.append(taken)
        ending = Ending(
            token_ids,
            reading.fingerprint,
            cache,
            tuple(reading.captures),
            reading.plan,
            reading.settings.kv,
            # mlx-lm reads a prompt's last token with its answer.
            reading.plan.next_turn(reading.num_tokens - 1),
            origin=reading.origin,
            is_listed=self._is_listed(reading, end),
            store_bits=reading.settings.store_bits,
        )
        self._saver.save(ending)
        # What it held is on its way to the disk.
        del reading.captures[:-1]
        return ending.saved

    def _is_listed(self, reading: RequestState, end: int) -> bool:
        """Return whether to list an end: of a system prompt and the last of a turn."""
        last = reading.num_tokens if self._save_answers else reading.num_tokens - 1
        return end == reading.head or end >= last

    def advance(self) -> None:
        """Hand to the writer what waits for it."""
        if not self.running():
            # mlx-lm tells it only when it takes one in.
            self._active_nbytes = 0
        if self._saver is not None:
            self._saver.advance()
        self._hold_limit()

    @property
    def _queued_nbytes(self) -> int:
        waiting = self._saver.nbytes if self._saver is not None else 0
        return waiting + self._writer.queued_nbytes

    def _hold_limit(self) -> None:
        taken = self._active_nbytes + self._queued_nbytes
        self._hot.hold(max(self._memory_limit - taken, 0))

    # Telling

    def _note(self, reading: RequestState) -> None:
        if self._clerk is not None:
            self._clerk.note(reading)

    def _levels(self) -> Gauges:
        store, saver = self._store, self._saver
        nbytes = {"memory": self._hot.nbytes, "active": self._active_nbytes}
        limits = {"memory": self._memory_limit}
        evictions = {"memory": self._hot.num_evicted}
        if store is not None:
            nbytes["disk"], limits["disk"] = store.total_nbytes(), store.max_nbytes
            evictions["disk"] = store.num_evicted
        return Gauges(
            nbytes,
            limits,
            evictions,
            {
                "stored": saver.num_saved if saver is not None else 0,
                "failed": saver.num_failed if saver is not None else 0,
                "skipped": saver.num_skipped if saver is not None else 0,
            },
            self._queued_nbytes,
            len(saver) if saver is not None else 0,
            sum(not reading.over.is_set() for reading in [*self._running]),
            self.num_waiting,
        )

    def finish(self) -> None:
        """Wait until all is stored, on the thread that owns the arrays."""
        while self._saver is not None and len(self._saver):
            self._saver.advance()
            time.sleep(0.01)

    def close(self) -> None:
        """Give up what is in memory; to be called after `finish`."""
        self._writer.close()
        if self._clerk is not None:
            self._clerk.close()
        self._hot.clear()


def _usable(
    reading: RequestState, cache: list[Any], num_tokens: int
) -> tuple[list[Any], int]:
    """Return what of a cache other prompts may take over, and up to where.

    That is nothing where it cannot be told apart from the rest. Speculation may leave
    one of two models' caches ahead or behind.
    """
    kv, plan = reading.settings.kv, reading.plan
    parts = [part for _, part in parts_of(cache)]
    if kv.bits is not None and any(hasattr(part, "bits") for part in parts):
        return [], 0
    offsets = {part.offset for part in parts if getattr(part, "offset", 0)}
    is_plain = is_all_plain(cache)
    end = min(offsets | {num_tokens}) if is_plain else num_tokens
    if not plan.is_sliceable(end):
        end = plan.last_resume_point(min(end, reading.num_tokens - 1))
    if end == num_tokens and (not offsets or offsets == {end}):
        return cache, end
    if is_plain and end:
        return shared_rows(cache, end), end
    # What counts in its own way is kept as it is, but only where the others agree.
    return (cache, end) if end == num_tokens and end in offsets else ([], 0)


def _has_rows_since(cache: Sequence[Any], start: int) -> bool:
    """Return whether windows still have the rows of what was read since `start`."""
    windows = (
        part
        for _, part in parts_of(cache)
        if kind_of(part, getattr(part, "offset", 0)) is LayerKind.WINDOW
    )
    return all(first_row(window) <= start for window in windows)
