"""The prefix cache: all tiers, as a run sees them.

`fetch` finds the longest prefix of a prompt in memory and on disk, and loads it; `keep`
and `saver` put into both what was read. Another tier is fetched from here.
"""

import contextlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

from promptcache.errors import ModelError, StoreError, UnsupportedCacheError, warn
from promptcache.kvcache.classes import evaluate, has_only_rows, shared_rows
from promptcache.kvcache.snapshot import Snapshot
from promptcache.models.loaded import LoadedModel
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import Match
from promptcache.store import PrefixStore
from promptcache.store.types import LoadEstimate, RequestUsage
from promptcache.tiers.background_writer import BackgroundWriter
from promptcache.tiers.disk_tier import restore_prefix
from promptcache.tiers.memory_tier import MemoryPrefix, MemoryTier
from promptcache.tiers.prefix_saver import PrefixSaver
from promptcache.tiers.prompt_read import PromptRead
from promptcache.tiers.prompt_saver import PromptSaver

# Of the memory that is left to caches, what may wait to be saved, and the least with
# which the ends of one prompt need not wait for each other.
QUEUE_SHARE = 4
MIN_QUEUE_NBYTES = 32 * 1024**2


class FetchedPrefix(NamedTuple):
    """Where a run starts.

    Attributes:
        cache: One mlx-lm cache object a layer, which is the run's.
        cached_tokens: How many tokens of the prompt it holds.
        fingerprint: What its values depend on, None to go on without the store.
        match: What the store has of the prompt.
        tier: Where it is from: "memory", "disk", or "" if it is empty.
        declined: Why the match was not loaded, if it was not.
        restored: All of it, if it is stored under another fingerprint only.
    """

    cache: list[Any]
    cached_tokens: int = 0
    fingerprint: Fingerprint | None = None
    match: Match = Match()
    tier: str = ""
    declined: LoadEstimate | None = None
    restored: Snapshot | None = None

    @property
    def loaded_tokens(self) -> int:
        """Return how many tokens were loaded from the store."""
        return self.cached_tokens if self.tier == "disk" else 0


class PrefixCache:
    """Fetches prefixes from all tiers, and has what was read kept in them.

    Attributes:
        store: The tier on disk, or None to go without.
        memory: The tier in memory.
    """

    def __init__(
        self, store: PrefixStore | None, memory: MemoryTier, writer: BackgroundWriter
    ) -> None:
        self.store = store
        self.memory = memory
        self._writer = writer
        self._saver = None if store is None else PrefixSaver(store, writer)

    def fetch(
        self, model: LoadedModel, read: PromptRead, *, is_shared: bool = False
    ) -> FetchedPrefix:
        """Find and load the longest prefix; trouble is a warning and a prefill.

        At least one token is left to read.

        Args:
            model: The model that reads the prompt.
            read: The prompt, and how it is read.
            is_shared: Whether the prefix stays in memory, to be found by others
                meanwhile; the run must not write to its arrays.
        """
        has_tiers = self.store is not None or self.memory.max_nbytes
        if not has_tiers or not (read.reuse or read.save):
            return FetchedPrefix(model.make_cache(read.settings))
        try:
            if not read.can_be_stored:
                raise UnsupportedCacheError(
                    "prefixes cannot be stored with input_embeddings"
                )
            model.check_supported(read.settings)
            fingerprint = model.fingerprint(read.settings)
            if not read.reuse:
                cache = model.make_cache(read.settings)
                return FetchedPrefix(cache, fingerprint=fingerprint)
            return self._fetch(model, read, fingerprint, is_shared)
        except (ModelError, StoreError, OSError) as error:
            warn(f"going on without the store: {error}")
            # With a cache of its own: the other one may have been filled.
            return FetchedPrefix(model.make_cache(read.settings))

    def _fetch(
        self,
        model: LoadedModel,
        read: PromptRead,
        fingerprint: Fingerprint,
        is_shared: bool,
    ) -> FetchedPrefix:
        match = Match()
        if self.store is not None:
            match = self.store.lookup(read.token_ids[:-1], fingerprint)
        # Another thread may have changed what was found.
        while prefix := self._in_memory(read, fingerprint, match):
            if cached := self._from_memory(prefix, is_shared):
                num_tokens = prefix.num_tokens
                return FetchedPrefix(cached, num_tokens, fingerprint, match, "memory")
        cache = model.make_cache(read.settings)
        if self.store is None:
            return FetchedPrefix(cache, fingerprint=fingerprint)
        restored = restore_prefix(
            self.store,
            fingerprint,
            cache,
            read.token_ids[:-1],
            plan=read.plan,
            kv=read.kv,
            match=match,
            may_decline=True,
        )
        num_tokens = restored.cached_tokens
        if is_shared and read.uses_memory and num_tokens and has_only_rows(cache):
            shared = shared_rows(cache, num_tokens)
            self.memory.insert_shared(
                fingerprint.digest, read.token_ids[:num_tokens], shared
            )
        return FetchedPrefix(
            cache,
            num_tokens,
            fingerprint,
            restored.match,
            "disk" if num_tokens else "",
            restored.declined,
            restored.restored,
        )

    def _in_memory(
        self, read: PromptRead, fingerprint: Fingerprint, match: Match
    ) -> MemoryPrefix | None:
        """Return what memory has, if the store has no more."""
        prefix = self._find(read, fingerprint)
        if prefix is None or prefix.num_tokens < match.cached_tokens:
            return None
        if prefix.is_sliceable or not read.is_due(match):
            return prefix
        # What is saved has to be captured, piece by piece, from where the store ends.
        is_saved = self._saver is not None and prefix.num_tokens <= (
            self._saver.submitted_to(read.token_ids, fingerprint)
        )
        return prefix if is_saved else None

    def _find(self, read: PromptRead, fingerprint: Fingerprint) -> MemoryPrefix | None:
        if not read.uses_memory:
            return None
        return self.memory.find(
            fingerprint.digest, read.token_ids, read.plan.last_resume_point
        )

    def _from_memory(self, prefix: MemoryPrefix, is_shared: bool) -> list[Any] | None:
        try:
            return self.memory.view(prefix) if is_shared else self.memory.pop(prefix)
        except (RuntimeError, MemoryError):
            # It does not fit twice; on disk it is safe.
            self.memory.clear()
            return None

    def num_cached(self, read: PromptRead, fingerprint: Fingerprint) -> int:
        """Return how much of a prompt could be fetched now."""
        prefix = self._find(read, fingerprint)
        num_tokens = prefix.num_tokens if prefix else 0
        if self.store is not None and num_tokens < read.num_tokens - 1:
            with contextlib.suppress(StoreError):
                match = self.store.lookup(read.token_ids[:-1], fingerprint)
                return max(num_tokens, match.cached_tokens)
        return num_tokens

    def saver(self, read: PromptRead, fetched: FetchedPrefix) -> PromptSaver:
        """Return what saves a prompt while it is read, or nothing if it is not due."""
        is_due = fetched.fingerprint is not None and read.is_due(fetched.match)
        saver = self._saver if is_due and read.num_saved else None
        if saver is not None and saver.is_paused:
            saver = None
        return PromptSaver(
            saver,
            read,
            fetched.fingerprint,
            fetched.cache,
            num_tokens=read.num_saved,
            restored=fetched.restored,
        )

    @property
    def num_saves(self) -> dict[str, int]:
        """Return how many saves were "stored", "failed" and "skipped"."""
        return {} if self._saver is None else self._saver.num_jobs

    @property
    def num_queued(self) -> int:
        """Return how many prefixes are on their way into the store."""
        return 0 if self._saver is None else len(self._saver)

    @property
    def queued_nbytes(self) -> int:
        """Return the bytes of what is on its way into the store."""
        waiting = 0 if self._saver is None else self._saver.nbytes
        return waiting + self._writer.queued_nbytes

    def advance(self) -> None:
        """Hand to the writer what it has room for of all that is to be saved."""
        while self._saver is not None and self._saver.advance():
            pass

    def hold_limit(self, max_nbytes: int) -> None:
        """Leave so many bytes of memory to what is kept, and to what is to be saved.

        What waits to be saved for too long is given up.
        """
        if self._saver is not None:
            self._saver.hold(max(max_nbytes // QUEUE_SHARE, MIN_QUEUE_NBYTES))
            max_nbytes -= self._saver.nbytes
        self.memory.set_limit(max(max_nbytes, 0))

    def keep(self, read: PromptRead, fetched: FetchedPrefix, answer: list[int]) -> None:
        """Keep a run's cache in memory, which has read the prompt and an answer."""
        end = read.num_tokens + len(answer)
        if not read.plan.is_sliceable(end):
            end = read.plan.last_resume_point(read.num_tokens - 1)
        self._keep(read, fetched, [*read.token_ids, *answer], end)

    def keep_read(self, read: PromptRead, fetched: FetchedPrefix, end: int) -> None:
        """Keep a run's cache in memory, which has read the prompt up to `end`."""
        good_to = read.plan.last_resume_point(end)
        self._keep(read, fetched, read.token_ids[:end], good_to)

    def _keep(
        self, read: PromptRead, fetched: FetchedPrefix, token_ids: list[int], end: int
    ) -> None:
        fingerprint = fetched.fingerprint
        if fetched.cache and fingerprint and read.uses_memory and not read.is_drafted:
            self.memory.insert(
                fingerprint.digest, token_ids, fetched.cache, good_to=end
            )

    def share(self, read: PromptRead, fetched: FetchedPrefix, end: int) -> None:
        """Let others take over what a run has read up to `end`, while it reads on.

        Of a cache that cannot be cut, that is all it has read.
        """
        if not read.uses_memory or read.is_drafted or fetched.fingerprint is None:
            return
        cache = fetched.cache
        shared = shared_rows(cache, end) if has_only_rows(cache) else deepcopy(cache)
        evaluate(shared)
        digest = fetched.fingerprint.digest
        self.memory.insert(digest, read.token_ids[:end], shared)

    def record(
        self,
        read: PromptRead,
        fetched: FetchedPrefix,
        *,
        load_seconds: float,
        prefill_seconds: float,
        timed: tuple[int, float] = (0, 0.0),
    ) -> tuple[str | None, float]:
        """Note in the store what a run reused.

        Return the key of what it reused, and the seconds saved; see `UsageLog.record`.

        Args:
            read: The prompt.
            fetched: What was fetched of it.
            load_seconds: Time to find and load that.
            prefill_seconds: From then to the first token.
            timed: Tokens that the model read by itself, and the seconds that took.
        """
        nothing = (fetched.match.key, 0.0)
        if self.store is None or fetched.fingerprint is None or not read.reuse:
            return nothing
        usage = RequestUsage(
            fetched.fingerprint,
            fetched.match,
            fetched.cached_tokens,
            read.num_tokens - fetched.cached_tokens,
            load_seconds,
            prefill_seconds,
        )
        log = self.store.usage_log
        # It is not worth waiting for, let alone failing.
        with contextlib.suppress(StoreError):
            log.add_speed(fetched.fingerprint, *timed)
            log.add_load(fetched.fingerprint, fetched.loaded_tokens, load_seconds)
            return log.record(usage)
        return nothing

    def record_soon(
        self,
        read: PromptRead,
        fetched: FetchedPrefix,
        on_recorded: Callable[[float], None],
        **seconds: Any,
    ) -> None:
        """Note the same on the writer's thread, and tell the seconds."""
        # It needs no arrays.
        plain = fetched._replace(cache=[], restored=None)

        def record() -> None:
            _, saved_seconds = self.record(read, plain, **seconds)
            on_recorded(saved_seconds)

        self._writer.submit(record, 0)
