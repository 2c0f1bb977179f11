"""One build: match, load, read the rest piece by piece, save."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mlx_lm.generate import generation_stream, wired_limit

from promptcache.engine.prefill import read_prompt
from promptcache.errors import (
    KeyNotFoundError,
    ModelError,
    StoreError,
    UsageError,
    warn,
)
from promptcache.kvcache.snapshot import Snapshot
from promptcache.models.loaded import LoadedModel
from promptcache.models.settings import Settings
from promptcache.prompts.render import RenderedPrompt
from promptcache.store import PrefixStore
from promptcache.store.reports import Prefix
from promptcache.tiers.background_writer import BackgroundWriter
from promptcache.tiers.disk_tier import check_blobs, restore_prefix
from promptcache.tiers.prefix_saver import PrefixSaver
from promptcache.tiers.prompt_read import PromptRead
from promptcache.tiers.prompt_saver import PromptSaver


@dataclass(frozen=True, slots=True)
class BuiltPrefix(Prefix):
    """A prefix that `build` made sure of.

    Attributes:
        cached_tokens: Tokens that were in the store before.
        seconds: Time it took, without loading the model.
    """

    cached_tokens: int = 0
    seconds: float = 0.0


class Build:
    """Makes sure that one prefix is stored.

    Invariants:
        What is stored already is not computed again.
        Every piece is saved before the next one is read.
    """

    def __init__(
        self,
        model: LoadedModel,
        store: PrefixStore,
        writer: BackgroundWriter,
        rendered: RenderedPrompt,
        settings: Settings,
    ) -> None:
        """Take the prefix.

        Raises:
            UnsupportedCacheError: The model's cache cannot be stored.
            UsageError: Nothing of it can be reused.
        """
        model.check_supported(settings)
        self._model = model
        self._store = store
        self._writer = writer
        self._settings = settings
        self._plan = model.plan(settings, rendered.boundaries, rendered.answer)
        self._fingerprint = model.fingerprint(settings)
        self._reuse_warning: str | None = None
        token_ids = self._reusable(rendered)
        self._read = PromptRead(token_ids, self._plan, settings, rendered.origin)
        self.key = store.segments.key_of(token_ids, self._fingerprint)

    def _reusable(self, rendered: RenderedPrompt) -> list[int]:
        """Return as much of the prefix as other prompts can reuse.

        Raises UsageError if that is nothing.
        """
        token_ids, num_tokens = rendered.token_ids, len(rendered.token_ids)
        end = self._end(num_tokens, is_prefix=rendered.is_prefix)
        if self._plan.is_sliceable(num_tokens) and end:
            return token_ids[:end]
        if end < num_tokens:
            message = (
                f"other prompts can reuse {end} of these {num_tokens} tokens: "
                f"{self._reason()}"
            )
            if not end:
                raise UsageError(f"{message}; try a smaller prefill_step_size")
            if not self._settings.exact:
                self._reuse_warning = message
        return token_ids[:end]

    def _end(self, num_tokens: int, *, is_prefix: bool) -> int:
        """Return up to where the prefix is stored.

        A whole prompt ends where its last token is read alone, if that matters.
        """
        is_drafted = self._settings.draft_model is not None
        can_step_back = not self._plan.needs_checkpoint and self._plan.is_sliceable(
            num_tokens
        )
        if is_prefix or is_drafted or can_step_back:
            return self._plan.last_resume_point(num_tokens)
        return self._plan.last_kept(num_tokens, self._settings.kv)

    def _reason(self) -> str:
        if self._settings.exact:
            return f"exact mode resumes at multiples of {self._plan.step_size}"
        if self._model.length_dependence is not None:
            return self._model.length_dependence.reason
        return "what is dropped beyond max_kv_size depends on where pieces end"

    def run(
        self,
        name: str | None,
        on_progress: Callable[[int, int], None],
        on_wait: Callable[[], None],
    ) -> BuiltPrefix:
        """Save what is missing, and return what is stored then.

        Args:
            name: A name to pin it under.
            on_progress: Called with tokens processed and their total.
            on_wait: Called when another process builds the same prefix.

        Raises:
            ModelError: The model has changed meanwhile.
            UsageError: The cache cannot be quantized as the settings say.
            StoreError: The store cannot be written.
        """
        started = time.perf_counter()
        with self._store.segments.building(self.key, on_wait):
            cached_tokens = self._save_missing(on_progress)
        if self._reuse_warning is not None:
            warn(self._reuse_warning)
        prefix = self._stored(name)
        seconds = time.perf_counter() - started
        return BuiltPrefix(
            **asdict(prefix), cached_tokens=cached_tokens, seconds=seconds
        )

    def _stored(self, name: str | None) -> Prefix:
        namespace = self._settings.namespace
        try:
            if name is not None:
                self._store.pin(self.key, name, namespace=namespace)
            return self._store.resolve(self.key, namespace=namespace)
        except KeyNotFoundError as error:
            raise StoreError(
                "what was built has been evicted by another process already"
            ) from error

    def _save_missing(self, on_progress: Callable[[int, int], None]) -> int:
        """Read and save what is missing; return how much was there."""
        read = self._read
        cache = self._model.make_cache(read.settings)
        if self.is_stored():
            # Lists the prefix where only that was missing.
            self._saver(read, cache, None).save(read.num_tokens)
            return read.num_tokens
        restored = restore_prefix(
            self._store,
            self._fingerprint,
            cache,
            read.token_ids,
            plan=read.plan,
            kv=read.kv,
        )
        saver = self._saver(read, cache, restored.restored)

        start, seconds = restored.cached_tokens, 0.0
        on_progress(start, read.num_tokens)
        with wired_limit(self._model.model, [generation_stream]):
            for piece in read_prompt(
                self._model, read, cache, start=start, end=read.num_tokens
            ):
                saver.capture(piece.start, piece.stop)
                self._check_model()
                saver.save(piece.stop)
                seconds += piece.seconds
                on_progress(piece.stop, read.num_tokens)
        num_read = read.num_tokens - restored.cached_tokens
        # A receipt is not worth waiting for, let alone failing.
        with contextlib.suppress(StoreError):
            self._store.usage_log.add_speed(self._fingerprint, num_read, seconds)
        self._check_model()
        saver.save(read.num_tokens)
        return restored.cached_tokens

    def _saver(
        self, read: PromptRead, cache: list[Any], restored: Snapshot | None
    ) -> PromptSaver:
        return PromptSaver(
            PrefixSaver(self._store, self._writer),
            read,
            self._fingerprint,
            cache,
            num_tokens=read.num_tokens,
            restored=restored,
            is_build=True,
        )

    def _check_model(self) -> None:
        """Raise ModelError if what has been read was read by another model."""
        now = self._model.fingerprint(self._settings)
        if now.digest != self._fingerprint.digest:
            raise ModelError("the model has changed while it was read, build it again")

    def is_stored(self) -> bool:
        """Return whether all of it is there, in the index and on disk."""
        # In its own tree: exact rows of the same are no reason to store nothing.
        fingerprint = self._fingerprint.reusable[-1]
        match = self._store.lookup(self._read.token_ids, fingerprint)
        is_whole = match.cached_tokens == self._read.num_tokens
        return is_whole and check_blobs(self._store, match)
