"""Saving: hand the state of a prompt that is being read to the store."""

import warnings
from collections.abc import Sequence
from typing import Any

from promptcache import codec
from promptcache.errors import PromptCacheWarning, StoreError
from promptcache.store import PrefixStore
from promptcache.types import EncodedSegment, Fingerprint


class Saver:
    """Saves one prompt, in pieces or as a whole.

    Invariants:
        Only rows of the prompt are saved, never of the answer.
    """

    def __init__(
        self,
        store: PrefixStore,
        fingerprint: Fingerprint,
        token_ids: Sequence[int],
        cache: Sequence[Any],
    ) -> None:
        """Take the whole prompt and the cache that reads it."""
        self._store = store
        self._fingerprint = fingerprint
        self._token_ids = token_ids
        self._cache = cache

    def save(self, end: int) -> str:
        """Save `[0, end)`, which the cache must hold; return its key.

        The end is listed as a prefix if it is the prompt's. Raises StoreError.
        """
        return self._store.save(
            self._token_ids[:end],
            self._fingerprint,
            self._encode,
            is_prefix=end == len(self._token_ids),
        )

    def _encode(self, start: int, end: int) -> EncodedSegment:
        return codec.encode(self._cache, self._token_ids, start, end)


class QuietSaver:
    """Saves for a generation: trouble is one warning, and nothing more is saved."""

    def __init__(self, saver: Saver | None) -> None:
        """Take a saver, or None to save nothing."""
        self._saver = saver

    def save(self, end: int) -> str | None:
        """Save `[0, end)` and return its key, or None if it was not saved."""
        if self._saver is None:
            return None
        try:
            return self._saver.save(end)
        # mlx raises RuntimeError where memory is short, or the thread is another one.
        except (StoreError, RuntimeError, MemoryError) as error:
            warn(f"the prompt is not saved: {error}")
            self._saver = None
            return None

    def finish(self, end: int) -> str | None:
        """Save for the last time."""
        key = self.save(end)
        self._saver = None
        return key


def warn(message: str) -> None:
    """Tell that the cache had trouble which the generation survives."""
    warnings.warn(message, PromptCacheWarning, stacklevel=3)
