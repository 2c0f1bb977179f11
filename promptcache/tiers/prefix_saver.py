"""The saver: prefixes that runs have read, part by part into the store.

A job is encoded on the thread that generates, which owns the arrays, and stored by the
writer's.
"""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from promptcache.errors import StoreError
from promptcache.kvcache.encode import encode_checkpoint, encode_rows
from promptcache.kvcache.snapshot import Snapshot
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.models.settings import Settings
from promptcache.segments.chain import common_length, pack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import EncodedSegment, Priority, PromptOrigin
from promptcache.store import PrefixStore
from promptcache.tiers.background_writer import BackgroundWriter

# How often a job is encoded again because others changed its ancestors meanwhile.
MAX_ATTEMPTS = 3
# A disk that is full stays so for a while.
PAUSE_SECONDS = 10.0


class OvertakenError(StoreError):
    """Other processes changed what a segment depends on since it was encoded."""


class _Part(NamedTuple):
    """Rows `[start, stop)` to store, or a state at `stop`; perhaps a prefix's end."""

    start: int
    stop: int
    state: Snapshot | None = None
    is_listed: bool = False
    # Of the largest state that follows; each may take the room of the one before.
    state_nbytes: int = 0


@dataclass(eq=False, slots=True)
class SaveJob:
    """A prefix to store.

    Attributes:
        token_ids: All of the prefix.
        fingerprint: What its KV values depend on.
        cache: One mlx-lm cache object a layer, holding these tokens or more.
        snapshots: What such a cache has lost of what may have to be stored; the last
            ends where the prefix does.
        plan: Where the pieces of its prefill end.
        settings: How it was read.
        num_prompt: How many of the tokens are the prompt's, and not its answer's.
        next_turn: Where the next turn is likely to part from it.
        origin: How the prompt was rendered, to note it where the prefix is listed.
        is_listed: Whether to list it as a prefix.
        is_build: Whether its end is to stay until it is evicted or removed.
        saved_to: Up to where its states have been handed over by other jobs.
        parts: What is left to encode, None before that is known.
        num_encoded: Up to where its rows have been handed to the writer.
        attempts: How often it was begun.
        error: What went wrong with a part of it.
        done: Its key when it is stored; cancelled if it is given up.
    """

    token_ids: list[int]
    fingerprint: Fingerprint
    cache: Sequence[Any]
    snapshots: Sequence[Snapshot]
    plan: PrefillPlan
    settings: Settings
    num_prompt: int
    next_turn: int
    origin: PromptOrigin | None = None
    is_listed: bool = True
    is_build: bool = False
    saved_to: int = 0
    parts: deque[_Part] | None = None
    num_encoded: int = 0
    attempts: int = 0
    error: Exception | None = None
    done: "Future[str]" = field(default_factory=Future)

    @property
    def end(self) -> int:
        """Return the length of the prefix."""
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Return the size of its cache, 0 if its classes do not say."""
        try:
            return sum(int(layer.nbytes) for layer in self.cache)
        except (AttributeError, NotImplementedError):
            return 0

    def states(self) -> list[Snapshot]:
        """Return the snapshots whose states are to be stored."""
        return [s for s in self.snapshots if s.end > self.saved_to and self._keeps(s)]

    def _keeps(self, snapshot: Snapshot) -> bool:
        # Of an answer, only the last snapshot has states.
        is_cut = snapshot.end <= self.num_prompt and self.plan.is_cut(snapshot.end)
        return snapshot.needs_checkpoint and (is_cut or snapshot.end == self.end)

    def priority(self, position: int) -> Priority:
        """Return how much the state at a position is worth against others."""
        if self.is_build and position == self.end:
            return Priority.BUILT
        if position == self.next_turn:
            return Priority.ANSWER
        # Where an answer begins, others may begin.
        is_boundary = self.plan.is_boundary(position) or position == self.num_prompt
        return Priority.BOUNDARY if is_boundary else Priority.STEP

    def encode(self, part: _Part) -> EncodedSegment:
        """Return a part as plain bytes. Raises StoreError."""
        if part.state is not None:
            return encode_checkpoint(part.state)
        segment = encode_rows(
            self.cache,
            self.snapshots,
            self.token_ids,
            part.start,
            part.stop,
            store_bits=self.settings.store_bits,
        )
        sliceable = self.plan.is_sliceable(part.stop)
        rules = segment.resumption._replace(sliceable=sliceable)
        return segment._replace(resumption=rules)


class PrefixSaver:
    """Saves jobs one after the other; what goes wrong is the job's result.

    All methods but the properties belong to the thread that owns the arrays.
    """

    def __init__(self, store: PrefixStore, writer: BackgroundWriter) -> None:
        self._store = store
        self._writer = writer
        # To be encoded, and those together with what the writer has of others.
        self._waiting: deque[SaveJob] = deque()
        self._unfinished: list[SaveJob] = []
        # By result, how many jobs there were.
        self.num_jobs = {"stored": 0, "failed": 0, "skipped": 0}
        self._paused_until = 0.0

    def __len__(self) -> int:
        return len(self._unfinished)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the caches that wait to be encoded."""
        return sum(job.nbytes for job in [*self._waiting])

    @property
    def is_paused(self) -> bool:
        """Return whether nothing is to be saved for a while, as the disk is in trouble.

        Encoding for it would take time from generating.
        """
        return time.monotonic() < self._paused_until

    def submit(self, job: SaveJob) -> None:
        """Save a prefix when `advance` is called."""
        self._waiting.append(job)
        self._unfinished.append(job)

    def hold(self, max_nbytes: int) -> None:
        """Give up the oldest jobs that wait beyond so many bytes."""
        while self._waiting and self.nbytes > max_nbytes:
            self._drop(self._waiting.popleft())

    def cancel(self, jobs: Sequence[SaveJob]) -> None:
        """Give up those of the jobs that wait to be encoded."""
        for job in [*self._waiting]:
            if job in jobs:
                self._waiting.remove(job)
                self._drop(job)

    def _drop(self, job: SaveJob) -> None:
        self._unfinished.remove(job)
        self.num_jobs["skipped"] += 1
        job.done.cancel()

    def advance(self) -> bool:
        """Encode one more part if the writer has room; return whether it had."""
        if not self._waiting:
            return False
        job = self._waiting[0]
        if self._begin(job) and not self._writer.has_room(_expected_nbytes(job)):
            return False
        self._encode_next()
        return True

    def wait(self, job: SaveJob) -> str:
        """Save a job to its end; return its key, or raise what went wrong."""
        while not job.done.done():
            if self._waiting:
                self._encode_next()
            else:
                # It may have to be encoded again then.
                self._writer.wait()
        return job.done.result()

    def finish(self) -> None:
        """Save all jobs to their ends, whatever comes of them."""
        while self._unfinished:
            if self._waiting:
                self._encode_next()
            else:
                self._writer.wait()

    def _begin(self, job: SaveJob) -> bool:
        """Find out what is missing, unless that is known; return whether that works."""
        if job.parts is None:
            job.attempts += 1
            try:
                job.parts = self._parts_of(job)
            except Exception as error:
                job.error, job.parts = error, deque()
        return bool(job.parts) and job.error is None

    def _encode_next(self) -> None:
        """Encode the next part, and hand it over once the writer has room for it."""
        job = self._waiting[0]
        if job.done.done():
            # An interrupt came after its end was handed over.
            self._waiting.popleft()
            return
        if self._begin(job) and job.parts:
            try:
                self._hand_over(job, job.parts[0])
                # Only now, lest an interrupt lose it.
                job.parts.popleft()
            # mlx raises RuntimeError where memory is short, or the thread is another.
            except Exception as error:
                job.error = error
        if job.error is not None or not job.parts:
            # What comes after a failure depends on what is not there. It waits until
            # its end is handed over, lest an interrupt lose it.
            self._writer.submit(partial(self._finish, job), 0)
            self._waiting.popleft()

    def _parts_of(self, job: SaveJob) -> deque[_Part]:
        """Return what is missing of a prefix: rows, each with the states in them."""
        missing = self._store.segments.missing(
            job.token_ids,
            job.fingerprint,
            cut_at=job.plan.segment_ends(job.end, job.settings.kv),
            after=self._encoded_to(job),
        )
        states = job.states()
        ends_in_state = bool(states) and states[-1].end == job.end
        parts: deque[_Part] = deque()
        done = 0
        for start, stop in missing or [(job.end, job.end)]:
            # What rows are resumed at follows them, lest only one of both fits.
            here = [state for state in states if done < state.end <= stop]
            is_last = job.is_listed and stop == job.end
            room = max((state.state_nbytes for state in here), default=0)
            parts.append(_Part(start, stop, None, is_last and not ends_in_state, room))
            parts += [
                _Part(s.end, s.end, s, is_last and s.end == job.end) for s in here
            ]
            done = stop
        return parts

    def submitted_to(self, token_ids: Sequence[int], fingerprint: Fingerprint) -> int:
        """Return how much of a prompt is on its way into the store."""
        data, digest = pack(token_ids), fingerprint.digest
        jobs = (j for j in [*self._unfinished] if j.fingerprint.digest == digest)
        return max((common_length(data, pack(j.token_ids)) for j in jobs), default=0)

    def _encoded_to(self, job: SaveJob) -> int:
        """Return how much of a prefix other jobs have handed over already."""
        data, digest = pack(job.token_ids), job.fingerprint.digest
        return max(
            (
                min(common_length(data, pack(other.token_ids)), other.num_encoded)
                for other in [*self._unfinished]
                if other is not job and other.fingerprint.digest == digest
            ),
            default=0,
        )

    def _hand_over(self, job: SaveJob, part: _Part) -> None:
        is_empty = part.state is None and part.start == part.stop
        segment = None if is_empty else job.encode(part)
        nbytes = segment.nbytes if segment is not None else 0
        job.num_encoded = part.stop
        self._writer.submit(partial(self._store_part, job, part, segment), nbytes)

    # On the writer's thread

    def _store_part(
        self, job: SaveJob, part: _Part, segment: EncodedSegment | None
    ) -> None:
        if job.error is not None:
            return
        try:
            if part.state is None:
                self._store_rows(job, part, segment)
            elif segment is not None:
                self._store.segments.save_checkpoint(
                    job.token_ids[: part.stop],
                    job.fingerprint,
                    segment,
                    is_prefix=part.is_listed,
                    priority=job.priority(part.stop),
                    next_turn=job.next_turn,
                )
        except Exception as error:
            job.error = error

    def _store_rows(
        self, job: SaveJob, part: _Part, segment: EncodedSegment | None
    ) -> None:
        def encoded(start: int, stop: int) -> EncodedSegment:
            if segment is None or (start, stop) != (part.start, part.stop):
                raise OvertakenError(
                    "other processes evict faster than this one can save"
                )
            return segment

        self._store.segments.save(
            job.token_ids[: part.stop],
            job.fingerprint,
            encoded,
            is_prefix=part.is_listed,
            cut_at=job.plan.segment_ends(part.stop, job.settings.kv),
            state_nbytes=part.state_nbytes,
            next_turn=job.next_turn,
        )

    def _finish(self, job: SaveJob) -> None:
        """Complete a job, or have it encoded again where others were faster."""
        if job.done.done():
            # After an interrupt, its end may have been handed over twice.
            return
        error, job.error, job.parts, job.num_encoded = job.error, None, None, 0
        if isinstance(error, OvertakenError) and job.attempts < MAX_ATTEMPTS:
            self._waiting.append(job)
            return
        try:
            if error is not None:
                raise error
            key = self._store.segments.key_of(job.token_ids, job.fingerprint)
            if job.is_listed and job.origin is not None:
                self._store.segments.set_origin(key, job.origin)
        except Exception as error:
            self.num_jobs["failed"] += 1
            if not isinstance(error, OvertakenError):
                self._paused_until = time.monotonic() + PAUSE_SECONDS
            outcome = partial(job.done.set_exception, error)
        else:
            self.num_jobs["stored"] += 1
            outcome = partial(job.done.set_result, key)
        # The arrays are no longer needed, whoever keeps the job.
        job.cache, job.snapshots = (), ()
        self._unfinished.remove(job)
        outcome()


def _expected_nbytes(job: SaveJob) -> int:
    """Return about how many bytes the next part of a job takes."""
    part = job.parts[0] if job.parts else None
    if part is None:
        return 0
    if part.state is not None:
        return part.state.state_nbytes
    return job.nbytes * (part.stop - part.start) // job.end
