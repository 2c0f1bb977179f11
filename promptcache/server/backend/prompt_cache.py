"""The prompt cache that is handed to mlx-lm's server.

It fetches prefixes from all tiers, and keeps what was read in them. mlx-lm calls it on
the thread that generates, which it never makes wait for the disk to write, and which no
trouble of its own may end.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import mlx.core as mx

from promptcache.errors import warn
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
from promptcache.server.backend.request_state import RequestState, RequestTokens
from promptcache.server.metrics import Gauges, ServingMetrics
from promptcache.store import PrefixStore
from promptcache.tiers.background_writer import MAX_QUEUED_NBYTES, BackgroundWriter
from promptcache.tiers.memory_tier import MemoryTier
from promptcache.tiers.prefix_cache import PrefixCache
from promptcache.tiers.prefix_saver import OvertakenError, PrefixSaver, SaveJob
from promptcache.tiers.prompt_saver import SAVE_SECONDS

# Of the memory that caches may take, what may be on its way to the disk, and the least
# with which the ends of one prompt need not wait for each other.
QUEUE_SHARE = 4
MIN_QUEUE_NBYTES = 32 * 1024**2
# Clients ask for as many tokens as they may get; few answers are that long.
EXPECTED_ANSWER_TOKENS = 1024
# A disk that is full stays so for a while; encoding takes time from generating.
PAUSE_SECONDS = 10.0


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
        self._store = store
        self._memory_limit = memory_limit
        self._save_answers = save_answers
        share = max(memory_limit // QUEUE_SHARE, MIN_QUEUE_NBYTES)
        self._max_queued_nbytes = min(share, MAX_QUEUED_NBYTES)
        self._writer = BackgroundWriter(self._max_queued_nbytes)
        self._saver = PrefixSaver(store, self._writer) if store else None
        self._paused_until = 0.0
        self._memory = MemoryTier(memory_limit)
        self._prefixes = PrefixCache(store, self._memory, self._writer)
        self._running: list[RequestState] = []
        self._active_nbytes = 0
        self._token_nbytes = 0.0
        self.num_waiting = 0
        self.on_kept: Callable[[], None] = lambda: None
        self.metrics = ServingMetrics(self._levels)
        # By result, how many prefixes were to be stored.
        self._num_saves = {"stored": 0, "failed": 0, "skipped": 0}

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
        fetched = None
        try:
            reading.check_model()
            fetched = self._prefixes.fetch(reading.model, reading.read, is_shared=True)
        # Whatever it is, the prompt can be read.
        except Exception as error:
            warn(f"going on without the cache: {error}")
        reading.begin(fetched)
        self._count(reading)
        self._run(reading)
        if fetched is None or not fetched.cached_tokens:
            return None, tokens
        return fetched.cache, tokens[fetched.cached_tokens :]

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
        reading = tokens.reading
        try:
            self._insert(reading, tokens, prompt_cache)
        except Exception as error:
            warn(f"a prompt is not kept: {error}")
        self.on_kept()
        if len(tokens) >= reading.num_tokens:
            reading.settle()

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
        return self._memory.nbytes + self._queued_nbytes

    def __len__(self) -> int:
        return len(self._memory)

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Return what mlx-lm logs before each request."""
        queued = len(self._saver) if self._saver is not None else 0
        return {
            "memory": {"n_sequences": len(self), "n_bytes": self._memory.nbytes},
            "queued": {"n_sequences": queued, "n_bytes": self._queued_nbytes},
        }

    def num_cached(self, reading: RequestState) -> int:
        """Return how much of a prompt could be taken over now."""
        return self._prefixes.num_cached(reading.read, reading.fingerprint)

    def _count(self, reading: RequestState) -> None:
        num_new = reading.num_tokens - reading.cached_tokens
        if reading.fetched is not None and reading.fetched.tier:
            self.metrics.hit(reading.fetched.tier, reading.cached_tokens, num_new)
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
    ) -> None:
        """Keep a cache in memory, and have it stored."""
        start, reading.num_read = reading.num_read, len(tokens)
        was_read = start >= reading.num_tokens - 1
        if reading.is_read and not was_read:
            self._record(reading)
        cache, end = _usable(reading, cache, len(tokens))
        if end <= reading.cached_tokens or not cache:
            return
        is_answer = end >= reading.num_tokens
        if not self._is_due(reading, cache, end):
            return
        reading.check_model()
        mx.eval([part.state for _, part in parts_of(cache) if not part.empty()])
        reading.kept_at = time.perf_counter()
        self._token_nbytes = sum(layer.nbytes for layer in cache) / end
        if self._saver is not None and (self._save_answers or not is_answer):
            self._save(reading, [*tokens[:end]], cache, start=start)
        self._memory.insert_shared(reading.fingerprint.digest, tokens[:end], cache)
        self._hold_limit()

    def _is_due(self, reading: RequestState, cache: list[Any], end: int) -> bool:
        """Return whether to keep a place, which costs a copy of the whole cache."""
        if not has_only_rows(cache):
            return True
        is_late = time.perf_counter() - reading.kept_at >= SAVE_SECONDS
        is_end = end == reading.head or end >= reading.num_tokens - 1
        return is_end or is_late

    def _save(
        self,
        reading: RequestState,
        token_ids: list[int],
        cache: list[Any],
        *,
        start: int,
    ) -> None:
        assert self._saver is not None
        end = len(token_ids)
        if not _has_rows_since(cache, start):
            # An answer that was longer than a window.
            reading.snapshots.clear()
            return
        taken = snapshot.capture(cache, start, end)
        mx.eval(taken.rows, taken.states)
        reading.snapshots.append(taken)
        # mlx-lm reads a prompt's last token with its answer.
        num_prompt = reading.num_tokens - 1
        job = SaveJob(
            token_ids,
            reading.fingerprint,
            cache,
            tuple(reading.snapshots),
            reading.read.plan,
            reading.read.settings,
            num_prompt,
            reading.read.plan.next_turn(num_prompt),
            origin=reading.read.origin,
            is_listed=self._is_listed(reading, end),
            saved_to=start,
        )
        job.done.add_done_callback(self._on_saved)
        is_paused = time.monotonic() < self._paused_until
        if self._store is None or self._store.is_read_only or is_paused:
            job.done.cancel()
            return
        reading.saved = job.done
        self._saver.submit(job)
        self._advance()
        # What it held is on its way to the disk.
        del reading.snapshots[:-1]

    def _on_saved(self, done: "Future[str]") -> None:
        """Count a save, and pause after one that failed."""
        if done.cancelled():
            self._num_saves["skipped"] += 1
        elif (error := done.exception()) is not None:
            self._num_saves["failed"] += 1
            if not isinstance(error, OvertakenError):
                self._paused_until = time.monotonic() + PAUSE_SECONDS
            warn(f"a prompt is not saved: {error}")
        else:
            self._num_saves["stored"] += 1

    def _advance(self) -> None:
        """Encode what the writer has room for, and give up what is too much."""
        if self._saver is not None:
            while self._saver.advance():
                pass
            self._saver.hold(self._max_queued_nbytes)

    def _is_listed(self, reading: RequestState, end: int) -> bool:
        """Return whether to list an end: of a system prompt and the last of a turn."""
        last = reading.num_tokens if self._save_answers else reading.num_tokens - 1
        return end == reading.head or end >= last

    def advance(self) -> None:
        """Hand to the writer what waits for it."""
        if not self.running():
            # mlx-lm tells it only when it takes one in.
            self._active_nbytes = 0
        self._advance()
        self._hold_limit()

    @property
    def _queued_nbytes(self) -> int:
        waiting = self._saver.nbytes if self._saver is not None else 0
        return waiting + self._writer.queued_nbytes

    def _hold_limit(self) -> None:
        used_nbytes = self._active_nbytes + self._queued_nbytes
        self._memory.set_limit(max(self._memory_limit - used_nbytes, 0))

    # Recording

    def _record(self, reading: RequestState) -> None:
        """Note what a request reused; its prompt has just been read to the end."""
        if self._store is None or reading.fetched is None:
            return
        now = time.perf_counter()
        seconds = now - reading.started_at - reading.load_seconds
        num_new = reading.num_tokens - reading.cached_tokens
        # A speed among others says nothing of the model's.
        timed = (num_new - 1, seconds) if reading.is_alone else (0, 0.0)
        record = partial(
            self._prefixes.record,
            reading.read,
            # The writer needs no arrays.
            reading.fetched._replace(cache=[], restored=None),
            load_seconds=reading.load_seconds,
            prefill_seconds=seconds,
            timed=timed,
        )
        self._writer.submit(lambda: self.metrics.save_seconds(record()[1]), 0)

    def _levels(self) -> Gauges:
        store, saver = self._store, self._saver
        nbytes = {"memory": self._memory.nbytes, "active": self._active_nbytes}
        limits = {"memory": self._memory_limit}
        evictions = {"memory": self._memory.num_evicted}
        if store is not None:
            nbytes["disk"], limits["disk"] = store.total_nbytes(), store.max_nbytes
            evictions["disk"] = store.num_evicted
        return Gauges(
            nbytes,
            limits,
            evictions,
            self._num_saves,
            self._queued_nbytes,
            len(saver) if saver is not None else 0,
            sum(not reading.over.is_set() for reading in [*self._running]),
            self.num_waiting,
        )

    def finish(self) -> None:
        """Wait until all is stored, on the thread that owns the arrays."""
        if self._saver is not None:
            self._saver.finish()

    def close(self) -> None:
        """Give up what is in memory; to be called after `finish`."""
        self._writer.close()
        self._memory.clear()


def _usable(
    reading: RequestState, cache: list[Any], num_tokens: int
) -> tuple[list[Any], int]:
    """Return what of a cache other prompts may take over, and up to where.

    That is nothing where it cannot be told apart from the rest. Speculation may leave
    one of two models' caches ahead or behind.
    """
    kv, plan = reading.read.kv, reading.read.plan
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
