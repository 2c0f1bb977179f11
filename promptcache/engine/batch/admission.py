"""Admission: which requests have to wait for others."""

from collections.abc import Sequence
from typing import Any

from promptcache.engine.batch.run import Run
from promptcache.tiers.prefix_cache import PrefixCache

# What is shared by less is read again: templates begin alike.
MIN_SHARED_TOKENS = 32
# Clients ask for as many tokens as they may get; few answers are that long.
EXPECTED_ANSWER_TOKENS = 1024


class Admission:
    """Lets requests in for which there is memory, and nothing of theirs is being read.

    Invariants:
        Of the requests that share a prefix, one reads it.
    """

    def __init__(self, prefixes: PrefixCache) -> None:
        self._prefixes = prefixes
        self._memory_limit = prefixes.memory.max_nbytes
        # By what others took, how many bytes of cache a token needs.
        self._token_nbytes = 0.0

    def admits(
        self,
        run: Run,
        *,
        loading: Sequence[Run],
        reading: Sequence[Run],
        answering: Sequence[Run],
        in_batch: Sequence[Run],
    ) -> bool:
        """Return whether a request need not wait for the others.

        What one of them has read already is handed over.

        Args:
            run: The request.
            loading: Those whose prefix is being loaded.
            reading: Those whose prompt is being read.
            answering: Those that are answered alone, with a cache of their own.
            in_batch: Those that are answered together.
        """
        if not self._has_room_for(run, [*loading, *reading, *answering, *in_batch]):
            return False
        if run.fingerprint is None:
            return True
        sources = [*loading, *reading, *answering]
        source = max(sources, key=lambda other: other.shareable(run), default=None)
        end = 0 if source is None else source.shareable(run)
        if source is None or end < MIN_SHARED_TOKENS:
            return True
        if any(other.takes_away(run) for other in loading):
            # What memory has of it may be gone this moment.
            return False
        num_cached = self._prefixes.num_cached(run.read, run.fingerprint)
        if end - num_cached < MIN_SHARED_TOKENS:
            return True
        if source in loading or source.num_read < end:
            return source in answering
        source.generation.keeper.share(end)
        return True

    def _has_room_for(self, run: Run, running: Sequence[Run]) -> bool:
        """Return whether one more request fits into memory, by what others took."""
        if not running or not self._memory_limit:
            return True
        nbytes = sum(map(self._expected_nbytes, [*running, run]))
        return nbytes <= self._memory_limit

    def _expected_nbytes(self, run: Run) -> float:
        most = run.generation.request.max_tokens
        answer = EXPECTED_ANSWER_TOKENS if most < 0 else most
        num_tokens = run.read.num_tokens + min(answer, EXPECTED_ANSWER_TOKENS)
        return self._token_nbytes * num_tokens

    def note_size(self, run: Run) -> None:
        """Note how much memory a request took that ends now."""
        if not run.num_read:
            return
        state = run.generation.state
        nbytes = cache_nbytes(state.fetched.cache)
        self._token_nbytes = nbytes / (run.num_read + state.num_answered)

    def hold_limit(self, running: Sequence[Run], batch_nbytes: int) -> None:
        """Leave to what is kept in memory what a batch and others do not take."""
        caches = (run.generation.state.fetched.cache for run in running)
        nbytes = batch_nbytes + sum(map(cache_nbytes, caches))
        self._prefixes.hold_limit(max(self._memory_limit - nbytes, 0))


def cache_nbytes(cache: list[Any]) -> int:
    """Return the size of a cache, 0 if its classes do not say."""
    try:
        return sum(int(layer.nbytes) for layer in cache)
    except (AttributeError, NotImplementedError):
        return 0
