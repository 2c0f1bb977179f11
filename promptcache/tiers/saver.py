"""Saving: hand the state of a prompt that is being read to the store."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from promptcache.errors import StoreError
from promptcache.kvcache import snapshot
from promptcache.kvcache.classes import least_window
from promptcache.kvcache.encode import encode_checkpoint, encode_rows
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import (
    EncodedSegment,
    Priority,
    PromptOrigin,
)
from promptcache.store import PrefixStore
from promptcache.tiers.background_writer import BackgroundWriter

if TYPE_CHECKING:
    pass

# How often a save starts again because others changed what it hangs on meanwhile.
SAVE_ATTEMPTS = 3
# A turn with less that is new is saved in one piece with its answer.
JOINED_TOKENS = 512


class _OvertakenError(StoreError):
    """What a segment hangs on has changed since it was encoded."""


class Saver:
    """Saves one prompt, in pieces or as a whole.

    It encodes on the calling thread, and a writer stores.

    Invariants:
        Only rows and states of the prompt are saved, unless an answer is asked for.
    """

    def __init__(
        self,
        store: PrefixStore,
        writer: BackgroundWriter,
        fingerprint: Fingerprint,
        token_ids: Sequence[int],
        cache: Sequence[Any],
        plan: PrefillPlan,
        kv: KVSettings,
        *,
        is_build: bool = False,
        origin: PromptOrigin | None = None,
        store_bits: int | None = None,
    ) -> None:
        """Take the whole prompt, and the cache that reads it.

        Args:
            store: Where to save.
            writer: What writes to it.
            fingerprint: What KV values depend on.
            token_ids: The whole prompt.
            cache: The cache; its parts may be replaced by quantized ones.
            plan: Where the pieces of its prefill end.
            kv: When it is quantized.
            is_build: Whether its end is to stay until it is evicted or removed.
            origin: How the prompt was rendered.
            store_bits: In how many bits to keep rows; see `encode_rows`.
        """
        self._store = store
        self._writer = writer
        self._fingerprint = fingerprint
        self._token_ids = token_ids
        self._cache = cache
        self._plan = plan
        self._kv = kv
        self._is_build = is_build
        self._origin = origin
        self._store_bits = store_bits
        self._captures: list[snapshot.Snapshot] = []
        self._answer_captures: list[snapshot.Snapshot] = []
        self._window = least_window(cache)
        self._num_prompt = len(token_ids)
        self._next_turn = plan.next_turn(len(token_ids))
        # Up to where captures have been handed over, are stored, and rows handed over.
        self._saved_to = 0
        self._stored_to = 0
        self._submitted_to = 0
        self._jobs: list[Future[None]] = []
        self._error: Exception | None = None
        # What `begin` began, and what is left of it.
        self._begun = (0, False)
        self._rest: Iterator[None] = iter(())

    def capture(self, start: int, end: int) -> None:
        """Note the piece `[start, end)`, which the cache has read this moment.

        Raises:
            UnsupportedCacheError: The cache holds something that cannot be stored.
        """
        every_row = self._kv.bits is not None
        self._captures.append(
            snapshot.capture(self._cache, start, end, every_row=every_row)
        )

    def take_over(self, restored: snapshot.Snapshot | None) -> None:
        """Note what the cache was filled with, if it is to be saved here, too."""
        if restored is not None:
            self._captures.append(restored)

    def capture_answer(self, num_tokens: int) -> None:
        """Note what the cache is about to lose of so many tokens of the answer.

        The cache has read exactly them after the prompt.
        """
        begin = self._answer_start
        end = len(self._token_ids) + num_tokens
        if self._window and end - begin >= max(self._window // 2, 1):
            taken = snapshot.capture(self._cache, begin, end)
            self._answer_captures.append(snapshot.copied(taken))

    def can_keep(self, num_tokens: int) -> bool:
        """Return whether an answer of so many tokens can be saved.

        It cannot where its rows would not be those of a prompt that repeats it.
        """
        start, end = len(self._token_ids), len(self._token_ids) + num_tokens
        quantized_from = self._plan.quantized_from(self._kv)
        is_mixed = quantized_from is not None and (
            end >= self._kv.start and start < quantized_from
        )
        return num_tokens > 0 and not is_mixed and self._plan.is_sliceable(end)

    def joins_answer(self, end: int) -> bool:
        """Return whether what is new up to `end` goes into one segment with an answer.

        Many short segments take longer to read than a few.
        """
        begin = max([self._submitted_to, *(c.start for c in self._captures[:1])])
        is_short = end - begin < JOINED_TOKENS
        return is_short and not any(c.needs_checkpoint for c in self._captures)

    def save_answer(self, answer: Sequence[int]) -> str:
        """Save the prompt with an answer, all of which the cache has read.

        Return the key. Raises StoreError.
        """
        assert self.can_keep(len(answer))
        end = len(self._token_ids) + len(answer)
        if self._answer_start == end:
            # The last capture is to have states, too.
            self._answer_captures.pop()
        last = snapshot.capture(self._cache, self._answer_start, end)
        self._captures += [*self._answer_captures, last]
        self._token_ids = [*self._token_ids, *answer]
        return self.save(end)

    @property
    def _answer_start(self) -> int:
        """Return up to where the answer has been captured."""
        if self._answer_captures:
            return self._answer_captures[-1].end
        return len(self._token_ids)

    def begin(self, end: int, *, is_listed: bool = True) -> None:
        """Begin to save `[0, end)`, of which everything new was captured.

        The end is listed as a prefix if it is the prompt's, unless more of it is about
        to be saved.
        """
        if self._error is None and all(job.done() for job in self._jobs):
            self._forget()
        self._begun = (end, is_listed)
        self._rest = self._whole(self._submissions(end, is_listed=is_listed))

    def _whole(self, submissions: Iterator[None]) -> Iterator[None]:
        """Yield from what begins anew where it has been interrupted."""
        try:
            yield from submissions
        except GeneratorExit:
            raise
        except BaseException:
            self._begun = (0, False)
            raise

    def advance(self) -> None:
        """Hand over one more part, if the writer has room. Raises StoreError."""
        if not self._writer.is_full():
            next(self._rest, None)

    def save(self, end: int, *, is_listed: bool = True) -> str:
        """Save `[0, end)`, wait until that is done, and return its key.

        See `begin`. Raises StoreError.
        """
        if self._begun != (end, is_listed):
            self.begin(end, is_listed=is_listed)
        for attempt in range(SAVE_ATTEMPTS):
            try:
                for _ in self._rest:
                    pass
                self._finish()
                break
            except _OvertakenError:
                if attempt == SAVE_ATTEMPTS - 1:
                    raise
                self._submitted_to, self._saved_to = 0, self._stored_to
                self.begin(end, is_listed=is_listed)
        self._begun = (0, False)
        self._forget()
        return self._store.segments.key_of(self._token_ids[:end], self._fingerprint)

    def _submissions(self, end: int, *, is_listed: bool) -> Iterator[None]:
        """Hand over what is new of `[0, end)`, and yield after each part of it."""
        token_ids, cut_at = self._token_ids, self._plan.segment_ends(end, self._kv)
        taken = [capture for capture in self._captures if capture.end <= end]
        unsaved = [capture for capture in taken if capture.end > self._saved_to]
        checkpoints = [c for c in unsaved if self._wants_checkpoint(c)]
        is_prefix = is_listed and end == len(token_ids)
        is_state_last = bool(checkpoints) and checkpoints[-1].end == end
        missing = self._store.segments.missing(
            token_ids[:end],
            self._fingerprint,
            cut_at=cut_at,
            after=min(self._submitted_to, end),
        )
        done = 0
        for start, stop in missing or [(end, end)]:
            # What rows are resumed at follows them, lest only one of both fits.
            states = [c for c in checkpoints if done < c.end <= stop]
            is_listed_here = is_prefix and stop == end and not is_state_last
            self._submit_rows(start, stop, is_listed_here, self._room_for(states))
            self._submitted_to = stop
            yield
            for capture in states:
                is_last = is_prefix and capture.end == end
                self._submit_state(capture.end, encode_checkpoint(capture), is_last)
                yield
            done = stop
        if is_prefix and self._origin is not None:
            key, origin = (
                self._store.segments.key_of(token_ids, self._fingerprint),
                self._origin,
            )
            self._submit(lambda: self._store.segments.set_origin(key, origin), 0)
        self._saved_to = end

    def _room_for(self, states: Sequence[snapshot.Snapshot]) -> int:
        """Return the size of the largest; each may take the room of the one before."""
        return max((taken.state_nbytes for taken in states), default=0)

    def _forget(self) -> None:
        """Give up the captures of what is stored, but for the last.

        That one tells the layout, should rows have to be saved again.
        """
        self._stored_to = self._saved_to
        taken = [capture for capture in self._captures if capture.end <= self._saved_to]
        del self._captures[: max(len(taken) - 1, 0)]

    def _submit_rows(
        self, start: int, stop: int, is_prefix: bool, state_nbytes: int
    ) -> None:
        """Have the rows `[start, stop)` stored, or only the end listed."""
        segment = self._encode(start, stop) if start < stop else None

        def encode(first: int, last: int) -> EncodedSegment:
            if segment is None or (first, last) != (start, stop):
                raise _OvertakenError(
                    "other processes evict faster than this one can save"
                )
            return segment

        token_ids = self._token_ids[:stop]
        cut_at = self._plan.segment_ends(stop, self._kv)

        def job() -> None:
            self._store.segments.save(
                token_ids,
                self._fingerprint,
                encode,
                is_prefix=is_prefix,
                cut_at=cut_at,
                state_nbytes=state_nbytes,
                next_turn=self._next_turn,
            )

        self._submit(job, segment.nbytes if segment else 0)

    def _submit_state(self, end: int, segment: EncodedSegment, is_prefix: bool) -> None:
        token_ids, priority = self._token_ids[:end], self._worth(end)

        def job() -> None:
            self._store.segments.save_checkpoint(
                token_ids,
                self._fingerprint,
                segment,
                is_prefix=is_prefix,
                priority=priority,
                next_turn=self._next_turn,
            )

        self._submit(job, segment.nbytes)

    def _submit(self, job: Callable[[], object], nbytes: int) -> None:
        """Hand a job to the writer. Raises what an earlier one raised."""
        if isinstance(self._error, _OvertakenError):
            # `save` begins anew, and needs none of this.
            return
        if self._error is not None:
            self._finish()

        def quietly() -> None:
            # What comes after a failure hangs on what is not there.
            if self._error is None:
                try:
                    job()
                except Exception as error:
                    self._error = error

        self._jobs.append(self._writer.submit(quietly, nbytes))

    def _finish(self) -> None:
        """Wait until all that was handed over is stored. Raises StoreError."""
        wait(self._jobs)
        self._jobs.clear()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _encode(self, start: int, end: int) -> EncodedSegment:
        segment = encode_rows(
            self._cache,
            self._captures,
            self._token_ids,
            start,
            end,
            store_bits=self._store_bits,
        )
        rules = segment.resumption._replace(sliceable=self._plan.is_sliceable(end))
        return segment._replace(resumption=rules)

    def _wants_checkpoint(self, taken: snapshot.Snapshot) -> bool:
        """Return whether to keep the state at a capture's end."""
        is_end = taken.end == len(self._token_ids)
        # Of an answer, only the last capture has states.
        is_cut = taken.end <= self._num_prompt and self._plan.is_cut(taken.end)
        return taken.needs_checkpoint and (is_end or is_cut)

    def _worth(self, position: int) -> Priority:
        if self._is_build and position == len(self._token_ids):
            return Priority.BUILT
        if position == self._next_turn:
            return Priority.ANSWER
        # Where an answer begins, others may begin.
        is_boundary = self._plan.is_boundary(position) or position == self._num_prompt
        return Priority(is_boundary)
