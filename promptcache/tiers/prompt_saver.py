"""Saving a prompt: what to keep of it, and when, while a run reads it."""

import time
from collections.abc import Sequence
from typing import Any

from promptcache.kvcache.classes import frozen, least_window
from promptcache.kvcache.snapshot import Snapshot, capture, copied
from promptcache.segments.fingerprint import Fingerprint
from promptcache.tiers.prefix_saver import PrefixSaver, SaveJob
from promptcache.tiers.prompt_read import PromptRead

# A turn with fewer new tokens is saved in one segment with its answer: many short
# segments take longer to read than a few.
JOINED_TOKENS = 512
# What an interrupted run may lose of the time it read. Where reading is fast, encoding
# what was read would delay the first token.
SAVE_SECONDS = 5.0


class PromptSaver:
    """Saves one prompt that is being read, and perhaps its answer.

    It is told of every piece. What goes wrong is raised by `save` only.
    """

    def __init__(
        self,
        saver: PrefixSaver | None,
        read: PromptRead,
        fingerprint: Fingerprint | None,
        cache: Sequence[Any],
        *,
        num_tokens: int,
        restored: Snapshot | None = None,
        is_build: bool = False,
    ) -> None:
        """Take what is read.

        Args:
            saver: What saves it, None to save nothing.
            read: The prompt.
            fingerprint: What KV values depend on.
            cache: The cache that reads it; its parts may be replaced by quantized ones.
            num_tokens: How much of the prompt is to be saved in the end.
            restored: What it was filled with, if that is to be saved here, too.
            is_build: Whether its end is to stay until it is evicted or removed.
        """
        self._saver = saver
        self._read = read
        self._token_ids = read.token_ids[:num_tokens]
        self._fingerprint = fingerprint
        self._cache = cache
        self._is_build = is_build
        self._snapshots = [restored] if restored is not None else []
        self._answer_snapshots: list[Snapshot] = []
        self._window = least_window(cache) if saver is not None else 0
        # What `save` waits for, and up to where everything has been submitted.
        self._jobs: list[SaveJob] = []
        self._submitted_to = 0
        self._begun_at = time.perf_counter()
        self._error: Exception | None = None

    @property
    def is_active(self) -> bool:
        """Return whether something is still to be saved."""
        return self._saver is not None

    @property
    def is_overdue(self) -> bool:
        """Return whether what has been read is to be saved while more is read."""
        return time.perf_counter() - self._begun_at >= SAVE_SECONDS

    def stop(self) -> None:
        """Save nothing more."""
        if self._saver is not None:
            self._saver.cancel(self._jobs)
        self._saver = None
        self._snapshots.clear()
        self._answer_snapshots.clear()

    def capture(self, start: int, end: int) -> None:
        """Note the piece `[start, end)`, which the cache has read this moment."""
        if self._saver is None or self._error is not None:
            return
        every_row = self._read.kv.bits is not None
        try:
            snapshot = capture(self._cache, start, end, every_row=every_row)
            self._snapshots.append(snapshot)
        # Of a cache class that is not mlx-lm's own, anything can be expected.
        except Exception as error:
            self._error = error

    def capture_answer(self, num_tokens: int) -> None:
        """Note what the cache is about to lose of so many tokens of the answer.

        The cache has read exactly them after what is saved of the prompt.
        """
        begin, end = self._answer_start, len(self._token_ids) + num_tokens
        if not self._window or end - begin < max(self._window // 2, 1):
            return
        if self._saver is None or self._error is not None:
            return
        try:
            snapshot = capture(self._cache, begin, end)
            self._answer_snapshots.append(copied(snapshot))
        except Exception as error:
            self._error = error

    @property
    def _answer_start(self) -> int:
        """Return up to where the answer has been captured."""
        if self._answer_snapshots:
            return self._answer_snapshots[-1].end
        return len(self._token_ids)

    def begin(self, end: int, *, answer_follows: bool = False) -> None:
        """Begin to save `[0, end)`, of which everything new was captured.

        The end is listed as a prefix if it is the prompt's, unless an answer follows;
        what is short is then left to be saved with the answer.
        """
        if self._saver is None or not end:
            return
        if not (answer_follows and self._joins_answer(end)):
            self._submit(self._token_ids[:end], is_listed=not answer_follows)
            self.advance()
            self._begun_at = time.perf_counter()

    def advance(self) -> None:
        """Save one more part, if that needs no wait."""
        if self._saver is None or self._error is not None:
            return
        try:
            self._saver.advance()
        # A writer that was closed meanwhile takes nothing more.
        except Exception as error:
            self._error = error

    def save(self, end: int, answer: Sequence[int] = ()) -> str | None:
        """Save `[0, end)`, with an answer where that can be, and wait for it.

        Return the key, or None if nothing is saved. Raises what went wrong first.

        Args:
            end: How much of the prompt has been read.
            answer: All that the cache has read after what is saved of the prompt.
        """
        if self._saver is None or not end:
            return None
        self.finish(end, answer)
        return self.wait()

    def wait(self) -> str | None:
        """Wait until all that was begun is saved; return and raise as `save` does."""
        if self._error is not None:
            raise self._error
        if self._saver is None or not self._jobs:
            return None
        keys = [self._saver.wait(job) for job in self._jobs]
        self._jobs.clear()
        return keys[-1]

    def finish(self, end: int, answer: Sequence[int] = ()) -> None:
        """Begin to save all that `save` would save, and do not wait for it."""
        if self._saver is None or not end:
            return
        keeps_answer = self._can_keep(len(answer))
        self.begin(end, answer_follows=keeps_answer)
        if keeps_answer:
            self._submit_answer(answer)

    @property
    def is_settled(self) -> bool:
        """Return whether nothing that was begun is still to be saved."""
        return self._error is not None or all(job.done.done() for job in self._jobs)

    def use(self, cache: Sequence[Any]) -> None:
        """Go on with a cache that has read on from where the last one was."""
        self._cache = cache

    def detach(self) -> None:
        """Have the cache written to by others from now on."""
        self._cache = frozen(self._cache)
        for job in self._jobs:
            if not job.done.done():
                job.cache = frozen(job.cache)

    def _submit(self, token_ids: list[int], *, is_listed: bool) -> None:
        """Submit what is new of a prefix, unless that was done already."""
        assert self._saver is not None and self._fingerprint is not None
        end, num_prompt = len(token_ids), len(self._token_ids)
        is_listed = is_listed and end >= num_prompt
        if any((job.end, job.is_listed) == (end, is_listed) for job in self._jobs):
            return
        self._forget_saved()
        job = SaveJob(
            token_ids,
            self._fingerprint,
            self._cache,
            [snapshot for snapshot in self._snapshots if snapshot.end <= end],
            self._read.plan,
            self._read.settings,
            num_prompt,
            self._read.plan.next_turn(num_prompt),
            origin=self._read.origin,
            is_listed=is_listed,
            is_build=self._is_build and end >= num_prompt,
            saved_to=self._submitted_to,
        )
        self._jobs.append(job)
        self._submitted_to = end
        self._saver.submit(job)

    def _submit_answer(self, answer: Sequence[int]) -> None:
        token_ids = [*self._token_ids, *answer]
        if self._answer_start == len(token_ids):
            # The last snapshot is to have states, too.
            self._answer_snapshots.pop()
        last = capture(self._cache, self._answer_start, len(token_ids))
        self._snapshots += [*self._answer_snapshots, last]
        self._submit(token_ids, is_listed=True)

    def _can_keep(self, num_tokens: int) -> bool:
        """Return whether an answer of so many tokens can be saved.

        It cannot where its rows would not be those of a prompt that repeats it.
        """
        plan, kv = self._read.plan, self._read.kv
        start, end = len(self._token_ids), len(self._token_ids) + num_tokens
        quantized_from = plan.quantized_from(kv)
        is_mixed = quantized_from is not None and (
            end >= kv.start and start < quantized_from
        )
        return num_tokens > 0 and not is_mixed and plan.is_sliceable(end)

    def _joins_answer(self, end: int) -> bool:
        """Return whether what is new up to `end` is to share an answer's segment."""
        start = max(self._submitted_to, *(s.start for s in self._snapshots[:1]), 0)
        needs_checkpoint = any(
            snapshot.needs_checkpoint for snapshot in self._snapshots
        )
        return end - start < JOINED_TOKENS and not needs_checkpoint

    def _forget_saved(self) -> None:
        """Drop the snapshots of what is stored, but for the last.

        That one has the layout, should rows have to be saved again.
        """
        if all(_is_stored(job) for job in self._jobs):
            num_stored = sum(s.end <= self._submitted_to for s in self._snapshots)
            del self._snapshots[: max(num_stored - 1, 0)]


def _is_stored(job: SaveJob) -> bool:
    return job.done.done() and not job.done.cancelled() and not job.done.exception()
