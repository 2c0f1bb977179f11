"""Saving: hand the state of a prompt that is being read to the store."""

import warnings
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

from promptcache import codec
from promptcache.errors import PromptCacheWarning
from promptcache.prefill import Cuts, KVSettings
from promptcache.store import PrefixStore
from promptcache.types import EncodedSegment, Fingerprint, Resumption, Worth

if TYPE_CHECKING:
    import mlx.core as mx


class Saver:
    """Saves one prompt, in pieces or as a whole.

    Invariants:
        Only rows and states of the prompt are saved, never of the answer.
    """

    def __init__(
        self,
        store: PrefixStore,
        fingerprint: Fingerprint,
        token_ids: Sequence[int],
        cache: Sequence[Any],
        cuts: Cuts,
        kv: KVSettings,
        *,
        is_prompt: bool,
        is_build: bool = False,
    ) -> None:
        """Take the whole prompt, and the cache that reads it.

        Args:
            store: Where to save.
            fingerprint: What KV values depend on.
            token_ids: The whole prompt.
            cache: The cache; its parts may be replaced by quantized ones.
            cuts: Where the pieces of its prefill end.
            kv: When it is quantized.
            is_prompt: Whether it is answered, and its last token read alone where that
                matters; else it is the start of prompts.
            is_build: Whether its end is to stay until it is evicted or removed.
        """
        self._store = store
        self._fingerprint = fingerprint
        self._token_ids = token_ids
        self._cache = cache
        self._cuts = cuts
        self._kv = kv
        self._is_prompt = is_prompt
        self._is_build = is_build
        self._captures: list[codec.Capture] = []
        self._logits: mx.array | None = None
        self._saved_to = 0

    def capture(self, start: int, end: int, logits: "mx.array | None" = None) -> None:
        """Note the piece `[start, end)`, which the cache has read this moment.

        Args:
            start: Where the piece begins.
            end: Where it ends.
            logits: At the end of the prompt, the logits of the next token.

        Raises:
            UnsupportedCacheError: The cache holds something that cannot be stored.
        """
        every_row = self._kv.bits is not None
        self._captures.append(
            codec.capture(self._cache, start, end, every_row=every_row)
        )
        if logits is not None:
            # Logits processors may change the array in place.
            self._logits = copy(logits)

    def save(self, end: int) -> str:
        """Save `[0, end)`, of which everything new was captured; return its key.

        The end is listed as a prefix if it is the prompt's. Raises StoreError.
        """
        taken = [capture for capture in self._captures if capture.end <= end]
        unsaved = [capture for capture in taken if capture.end > self._saved_to]
        checkpoints = [c for c in unsaved if self._wants_checkpoint(c)]
        is_prefix = end == len(self._token_ids)
        ends_in_checkpoint = bool(checkpoints) and checkpoints[-1].end == end
        key = self._store.save(
            self._token_ids[:end],
            self._fingerprint,
            self._encode,
            is_prefix=is_prefix and not ends_in_checkpoint,
            is_tail=self._is_tail(end),
            cut_at=self._cuts.segment_ends(end, self._kv),
        )
        for capture in checkpoints:
            key = self._store.save_checkpoint(
                self._token_ids[: capture.end],
                self._fingerprint,
                self._checkpoint(capture),
                is_prefix=is_prefix and capture.end == end,
                worth=self._worth(capture.end),
            )
        # The last one stays: it tells the layout, should rows have to be saved again.
        del self._captures[: max(len(taken) - 1, 0)]
        self._saved_to = end
        return key

    def _encode(self, start: int, end: int) -> EncodedSegment:
        segment = codec.encode_rows(
            self._cache, self._captures, self._token_ids, start, end
        )
        is_tail = self._is_tail(end)
        return segment._replace(
            resumption=Resumption(
                divisible=self._cuts.is_divisible(end),
                extendable=not is_tail,
                needs_checkpoint=segment.resumption.needs_checkpoint or is_tail,
            )
        )

    def _checkpoint(self, taken: codec.Capture) -> EncodedSegment:
        is_prompt = taken.end == len(self._token_ids)
        segment = codec.encode_checkpoint(taken, self._logits if is_prompt else None)
        extendable = not self._is_tail(taken.end)
        resumption = segment.resumption._replace(extendable=extendable)
        return segment._replace(resumption=resumption)

    def _wants_checkpoint(self, taken: codec.Capture) -> bool:
        """Return whether to keep the state at a capture's end."""
        is_prompt = taken.end == len(self._token_ids)
        if self._is_tail(taken.end):
            return is_prompt and self._logits is not None
        at_cut = is_prompt or self._cuts.is_cut(taken.end)
        return taken.needs_checkpoint and at_cut

    def _worth(self, position: int) -> Worth:
        if self._is_build and position == len(self._token_ids):
            return Worth.BUILT
        return Worth(self._cuts.is_boundary(position))

    def _is_tail(self, end: int) -> bool:
        """Return whether what ends there is good for this very prompt only.

        Where values depend on the piece they are read in, longer prompts go on only
        from the end of a piece that they are read in, too.
        """
        is_answered = self._is_prompt and end == len(self._token_ids)
        is_whole = self._cuts.is_cut(end) and not is_answered
        return not (self._cuts.is_divisible(end) or is_whole)


class QuietSaver:
    """Saves for a generation: trouble is one warning, and nothing more is saved."""

    def __init__(self, saver: Saver | None) -> None:
        """Take a saver, or None to save nothing."""
        self._saver = saver

    def capture(self, start: int, end: int, logits: "mx.array | None" = None) -> None:
        """Note a piece that the cache has just read."""
        if self._saver is not None:
            try:
                self._saver.capture(start, end, logits)
            # Of a cache class that is not mlx-lm's own, anything can be expected.
            except Exception as error:
                self._stop(error)

    def save(self, end: int) -> str | None:
        """Save `[0, end)` and return its key, or None if it was not saved."""
        if self._saver is None:
            return None
        try:
            return self._saver.save(end)
        # mlx raises RuntimeError where memory is short, or the thread is another one.
        except Exception as error:
            self._stop(error)
            return None

    def _stop(self, error: Exception) -> None:
        warn(f"the prompt is not saved: {error}")
        self._saver = None

    def finish(self, end: int) -> str | None:
        """Save for the last time."""
        key = self.save(end)
        self._saver = None
        return key


def warn(message: str) -> None:
    """Tell that the cache had trouble which the generation survives."""
    warnings.warn(message, PromptCacheWarning, stacklevel=3)
