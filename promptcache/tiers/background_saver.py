"""The background saver: stores what a server has read, and lets nobody wait for it.

It encodes on the calling thread, which owns the stream, and a writer stores. What
finds the writer busy is kept until the next call, as far as there is room for that.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from promptcache.errors import StoreError, warn
from promptcache.kvcache.encode import encode_checkpoint, encode_rows
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.kvcache.snapshot import Snapshot
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.segments.chain import common_length, pack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import (
    EncodedSegment,
    Priority,
    PromptOrigin,
    ResumeRules,
)
from promptcache.store import PrefixStore
from promptcache.tiers.background_writer import BackgroundWriter

# How often one save is encoded again because others stored a part of it meanwhile.
ATTEMPTS = 3
# A disk that is full stays so for a while; encoding takes time from generating.
PAUSE_SECONDS = 10.0


@dataclass(eq=False, slots=True)
class Ending:
    """A prefix to store, and the cache that has just read it.

    Attributes:
        token_ids: All of the prefix.
        fingerprint: What its KV values depend on.
        cache: One mlx-lm cache object a layer, of which the caller changes nothing.
        captures: What such a cache has lost of what may have to be stored; the last
            ends where the prefix does.
        plan: Where pieces of its prefill end.
        kv: When it is quantized.
        next_turn: Where the next turn is likely to part from the prompt.
        origin: How the prompt was rendered, where the prefix is to tell.
        is_listed: Whether to list it as a prefix.
        store_bits: In how many bits to keep rows, None for as they are.
        saved: Done when it is stored, or given up.
        attempts: How often it was encoded.
    """

    token_ids: Sequence[int]
    fingerprint: Fingerprint
    cache: list[Any]
    captures: Sequence[Snapshot]
    plan: PrefillPlan
    kv: KVSettings
    next_turn: int
    origin: PromptOrigin | None = None
    is_listed: bool = True
    store_bits: int | None = None
    saved: "Future[None]" = field(default_factory=Future)
    attempts: int = 0

    @property
    def num_tokens(self) -> int:
        """Return the length of the prefix."""
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Return the size of its cache."""
        return sum(int(layer.nbytes) for layer in self.cache)


class _OvertakenError(StoreError):
    """Others have stored a part of what was encoded."""


class BackgroundSaver:
    """Saves prefixes one after the other; trouble is a warning and a skipped save.

    Invariants:
        What waits to be encoded fits into `max_nbytes`.
    """

    def __init__(
        self, store: PrefixStore, writer: BackgroundWriter, max_nbytes: int
    ) -> None:
        """Take the store, what writes to it, and how many bytes may wait."""
        self._store = store
        self._writer = writer
        self._max_nbytes = max_nbytes
        self._waiting: deque[Ending] = deque()
        self._submitted: list[tuple[str, bytes]] = []
        self._paused_until = 0.0
        self.num_saved = 0
        self.num_failed = 0
        self.num_skipped = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes that wait to be encoded."""
        return sum(ending.nbytes for ending in [*self._waiting])

    def __len__(self) -> int:
        return len(self._waiting) + len(self._submitted)

    def save(self, ending: Ending) -> None:
        """Store a prefix soon."""
        if self._store.is_read_only or time.monotonic() < self._paused_until:
            self._skip(ending)
            return
        self._waiting.append(ending)
        self.advance()
        while self._waiting and self.nbytes > self._max_nbytes:
            self._skip(self._waiting.popleft())

    def _skip(self, ending: Ending) -> None:
        self.num_skipped += 1
        ending.saved.set_result(None)

    def advance(self) -> None:
        """Encode what waits, as far as the writer has room."""
        while self._waiting and self._writer.has_room(self._waiting[0].nbytes):
            ending = self._waiting.popleft()
            try:
                self._submit(ending)
            # mlx raises RuntimeError where memory is short.
            except Exception as error:
                self._give_up(ending, error)

    def _give_up(self, ending: Ending, error: Exception) -> None:
        self.num_failed += 1
        if not isinstance(error, _OvertakenError):
            self._paused_until = time.monotonic() + PAUSE_SECONDS
        ending.saved.set_result(None)
        warn(f"a prompt is not saved: {error}")

    def _submit(self, ending: Ending) -> None:
        ending.attempts += 1
        submitted = (ending.fingerprint.digest, pack(ending.token_ids))
        cut_at = ending.plan.segment_ends(ending.num_tokens, ending.kv)
        missing = self._store.segments.missing(
            ending.token_ids,
            ending.fingerprint,
            cut_at=cut_at,
            after=self._submitted_to(submitted),
        )
        rows = {span: _encoded_rows(ending, *span) for span in missing}
        state = _encoded_state(ending)
        nbytes = sum(segment.nbytes for segment in rows.values())
        nbytes += state.nbytes if state else 0
        job = self._job(ending, submitted, cut_at, rows, state)
        self._submitted.append(submitted)
        self._writer.submit(job, nbytes)

    def _submitted_to(self, wanted: tuple[str, bytes]) -> int:
        """Return how much of a prefix is as good as stored."""
        digest, data = wanted
        return max(
            (common_length(data, d) for f, d in [*self._submitted] if f == digest),
            default=0,
        )

    def _job(
        self,
        ending: Ending,
        submitted: tuple[str, bytes],
        cut_at: tuple[int, ...],
        rows: dict[tuple[int, int], EncodedSegment],
        state: EncodedSegment | None,
    ) -> Callable[[], None]:
        def encode(start: int, end: int) -> EncodedSegment:
            if (start, end) not in rows:
                raise _OvertakenError("others stored a part of it meanwhile")
            return rows[start, end]

        def job() -> None:
            try:
                self._store_all(ending, cut_at, encode, state)
                self.num_saved += 1
                ending.saved.set_result(None)
            except _OvertakenError as error:
                if ending.attempts < ATTEMPTS:
                    self._waiting.append(ending)
                else:
                    self._give_up(ending, error)
            except Exception as error:
                self._give_up(ending, error)
            finally:
                self._submitted.remove(submitted)

        return job

    def _store_all(
        self,
        ending: Ending,
        cut_at: tuple[int, ...],
        encode: Callable[[int, int], EncodedSegment],
        state: EncodedSegment | None,
    ) -> None:
        key = self._store.segments.save(
            ending.token_ids,
            ending.fingerprint,
            encode,
            is_prefix=ending.is_listed and state is None,
            cut_at=cut_at,
            state_nbytes=state.nbytes if state is not None else 0,
            next_turn=ending.next_turn,
        )
        if state is not None:
            is_turn = ending.num_tokens == ending.next_turn
            self._store.segments.save_checkpoint(
                ending.token_ids,
                ending.fingerprint,
                state,
                is_prefix=ending.is_listed,
                priority=Priority.ANSWER if is_turn else Priority.BOUNDARY,
                next_turn=ending.next_turn,
            )
        if ending.is_listed and ending.origin is not None:
            self._store.segments.set_origin(key, ending.origin)


def _encoded_rows(ending: Ending, start: int, end: int) -> EncodedSegment:
    segment = encode_rows(
        ending.cache,
        ending.captures,
        ending.token_ids,
        start,
        end,
        store_bits=ending.store_bits,
    )
    resumption = ResumeRules(
        sliceable=ending.plan.is_sliceable(end),
        needs_checkpoint=segment.resumption.needs_checkpoint,
    )
    return segment._replace(resumption=resumption)


def _encoded_state(ending: Ending) -> EncodedSegment | None:
    last = ending.captures[-1]
    return encode_checkpoint(last) if last.needs_checkpoint else None
