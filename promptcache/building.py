"""One build: match, load, read the rest piece by piece, save."""

from collections.abc import Callable

from mlx_lm.generate import generation_stream, wired_limit

from promptcache.decoding import read_rest
from promptcache.loaded_model import LoadedModel
from promptcache.prefill import check_quantizable, prefill
from promptcache.rendering import RenderedPrompt
from promptcache.resuming import check_blobs, resume
from promptcache.saving import Saver, warn
from promptcache.settings import Settings
from promptcache.store import PrefixStore


class Building:
    """Makes sure that one prefix is stored.

    Invariants:
        What is stored already is not computed again.
        Every piece is saved before the next one is read.
    """

    def __init__(
        self,
        model: LoadedModel,
        store: PrefixStore,
        rendered: RenderedPrompt,
        settings: Settings,
    ) -> None:
        """Take the prefix.

        Raises:
            UnsupportedCacheError: The model's cache cannot be stored.
        """
        model.check_supported(settings)
        self._model = model
        self._store = store
        self._rendered = rendered
        self._settings = settings
        self._cuts = model.cuts(settings, rendered.boundaries)
        self._fingerprint = model.fingerprint(settings)
        self._num_tokens = len(rendered.token_ids)
        self.key = store.key_of(rendered.token_ids, self._fingerprint)

    def run(
        self,
        on_progress: Callable[[int, int], None],
        on_wait: Callable[[], None],
    ) -> int:
        """Save what is missing; return how much was there.

        Args:
            on_progress: Called with tokens processed and their total.
            on_wait: Called when another process builds the same prefix.

        Raises:
            UsageError: The cache cannot be quantized as the settings say.
            StoreError: The store cannot be written.
        """
        with self._store.building(self.key, on_wait):
            num_cached = self._read(on_progress)
        self._warn_of_length()
        return num_cached

    def _read(self, on_progress: Callable[[int, int], None]) -> int:
        token_ids, kv = self._rendered.token_ids, self._settings.kv
        reader = self._model.reader(self._settings)
        cache = self._model.make_cache(self._settings)
        saver = Saver(self._store, self._fingerprint, token_ids, cache, self._cuts)
        if self._is_stored():
            # Lists the prefix also where nothing was missing.
            saver.save(self._num_tokens)
            return self._num_tokens
        resumed = resume(
            self._store,
            self._fingerprint,
            cache,
            token_ids,
            cuts=self._cuts,
            kv=kv,
            generating=False,
        )
        num_cached = resumed.match.cached_tokens
        if num_cached < (self._cuts.quantized_from(kv) or 0) <= self._num_tokens:
            for model in filter(None, (self._model.model, self._settings.draft_model)):
                check_quantizable(model, kv)

        def on_piece(start: int, stop: int) -> None:
            saver.capture(start, stop)
            saver.save(stop)

        end = self._end_of_prefill(num_cached)
        with wired_limit(self._model.model, [generation_stream]):
            prefill(
                reader,
                cache,
                token_ids,
                start=num_cached,
                end=end,
                cuts=self._cuts,
                kv=kv,
                on_piece=on_piece,
                on_progress=lambda done, _: on_progress(done, self._num_tokens),
            )
            if end < self._num_tokens:
                logits = read_rest(reader, cache, token_ids, num_read=end, kv=kv)
                saver.capture(end, self._num_tokens, logits)
                on_progress(self._num_tokens, self._num_tokens)
        saver.save(self._num_tokens)
        return num_cached

    def _is_stored(self) -> bool:
        """Return whether all of it is there, in the index and on disk."""
        match = self._store.lookup(self._rendered.token_ids, self._fingerprint)
        is_whole = match.cached_tokens == self._num_tokens
        return is_whole and check_blobs(self._store, match)

    def _end_of_prefill(self, num_cached: int) -> int:
        """Return where to stop, to read the rest as a generation does.

        A prompt that cannot be taken back by a token needs the logits of the next.
        """
        divisible = self._cuts.is_divisible(self._num_tokens)
        needs_logits = self._model.needs_checkpoints or not divisible
        if self._rendered.is_open or not needs_logits or num_cached == self._num_tokens:
            return self._num_tokens
        kv = self._settings.kv
        return self._cuts.end_of_prefill(self._num_tokens, num_cached, kv)

    def _warn_of_length(self) -> None:
        """Say so where other prompts cannot go on from the end of the prefix."""
        cuts, num_tokens = self._cuts, self._num_tokens
        if cuts.can_resume(num_tokens) or self._settings.exact:
            return
        reason = "what is dropped beyond max_kv_size depends on where pieces end"
        if self._model.length_dependence is not None:
            reason = self._model.length_dependence.reason
        step = num_tokens - num_tokens % cuts.step_size
        reusable = max(step, cuts.exact_from or 0)
        warn(
            f"other prompts can reuse {reusable} of these {num_tokens} tokens: {reason}"
        )
