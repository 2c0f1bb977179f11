"""Saving: hand the state of a prompt that is being read to the store."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from promptcache import codec
from promptcache.errors import PromptCacheError, PromptCacheWarning
from promptcache.prefill import Cuts
from promptcache.store import PrefixStore
from promptcache.types import EncodedSegment, Fingerprint, Resumption

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
    ) -> None:
        """Take the whole prompt, the cache that reads it, and where it is cut."""
        self._store = store
        self._fingerprint = fingerprint
        self._token_ids = token_ids
        self._cache = cache
        self._cuts = cuts
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
        self._captures.append(codec.capture(self._cache, start, end))
        self._logits = logits

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
            cut_at=self._cuts.segment_ends(end),
        )
        for capture in checkpoints:
            key = self._store.save_checkpoint(
                self._token_ids[: capture.end],
                self._fingerprint,
                self._checkpoint(capture),
                is_prefix=is_prefix and capture.end == end,
                is_boundary=self._cuts.is_boundary(capture.end),
            )
        # The last one stays: it tells the layout, should rows have to be saved again.
        del self._captures[: max(len(taken) - 1, 0)]
        self._saved_to = end
        return key

    def _encode(self, start: int, end: int) -> EncodedSegment:
        segment = codec.encode_rows(
            self._cache, self._captures, self._token_ids, start, end
        )
        divisible = self._cuts.is_divisible(end)
        # Where rows depend on the piece they were read in, it has to end there, too.
        extendable = divisible or any(
            piece.end == end and self._is_extendable(piece) for piece in self._captures
        )
        return segment._replace(
            resumption=Resumption(
                divisible=divisible,
                extendable=extendable,
                needs_checkpoint=segment.resumption.needs_checkpoint or not extendable,
            )
        )

    def _checkpoint(self, capture: codec.Capture) -> EncodedSegment:
        is_prompt = capture.end == len(self._token_ids)
        segment = codec.encode_checkpoint(capture, self._logits if is_prompt else None)
        resumption = segment.resumption._replace(
            extendable=self._is_extendable(capture)
        )
        return segment._replace(resumption=resumption)

    def _wants_checkpoint(self, capture: codec.Capture) -> bool:
        """Return whether to keep the state at a capture's end."""
        is_prompt = capture.end == len(self._token_ids)
        if not self._is_extendable(capture):
            # Good for this very prompt, if it tells how to go on.
            return is_prompt and self._logits is not None
        return capture.needs_checkpoint and (
            is_prompt or self._cuts.is_cut(capture.end)
        )

    def _is_extendable(self, piece: codec.Capture) -> bool:
        """Return whether longer prompts are read up to here in the same pieces."""
        cuts = self._cuts
        whole = piece.start <= cuts.last_before(piece.end)
        return cuts.is_divisible(piece.end) or (whole and cuts.is_cut(piece.end))


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
            except PromptCacheError as error:
                self._stop(error)

    def save(self, end: int) -> str | None:
        """Save `[0, end)` and return its key, or None if it was not saved."""
        if self._saver is None:
            return None
        try:
            return self._saver.save(end)
        # mlx raises RuntimeError where memory is short, or the thread is another one.
        except (PromptCacheError, RuntimeError, MemoryError) as error:
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
