"""The keeper: what is kept of a request, in memory and on disk, while it runs."""

from collections.abc import Callable, Sequence
from typing import Any

from promptcache.engine.request import Request, RequestState
from promptcache.engine.response import GenerationResponse
from promptcache.errors import ModelError, warn
from promptcache.kvcache.classes import (
    LayerKind,
    evaluate,
    first_row,
    has_only_rows,
    kind_of,
    parts_of,
)
from promptcache.models.loaded import LoadedModel
from promptcache.tiers.prefix_cache import PrefixCache


class Keeper:
    """Saves a request's prompt and answer, and keeps its cache for others.

    Invariants:
        Nothing is kept that a model has read which has changed since.
        What goes wrong is a warning.
    """

    def __init__(
        self,
        model: LoadedModel,
        prefixes: PrefixCache,
        request: Request,
        state: RequestState,
    ) -> None:
        self._model = model
        self._prefixes = prefixes
        self._request = request
        self._read = request.read
        self._state = state

    def begin(self, end: int | None = None) -> None:
        """Begin to save what has been read up to `end`, by default the prompt."""
        self._check_model()
        has_answer = self._request.save_answer and self._state.has_answer
        end = self._read.num_saved if end is None else end
        self._state.saver.begin(end, answer_follows=has_answer)

    def finish(self) -> None:
        """Begin to save what is due, and keep the rest in memory, without a wait.

        It may have been cancelled anywhere; no step of it may be under way.
        """
        state = self._state
        self._check_model()
        if state.has_answer:
            state.saver.finish(self._read.num_saved, self.answer())
            on_recorded = self._request.on_recorded
            self._prefixes.record_soon(
                self._read, state.fetched, on_recorded, **self._seconds()
            )
        else:
            state.saver.finish(state.num_pieced)
        self.give_away()

    def share(self, end: int) -> None:
        """Let others take over what has been read up to `end`, and read on."""
        if not has_only_rows(self._state.fetched.cache):
            # Their own savers have captured nothing of it.
            self.begin(end)
        self._prefixes.share(self._read, self._state.fetched, end)

    def give_away(self) -> None:
        """Have others write to the cache from now on."""
        state = self._state
        state.saver.detach()
        evaluate(state.fetched.cache)
        if state.has_answer:
            self._keep()
        elif state.num_read and not state.has_changed:
            self._prefixes.keep_read(self._read, state.fetched, state.num_read)
        state.fetched = state.fetched._replace(cache=[])

    @property
    def is_settled(self) -> bool:
        """Return whether all that was begun to be saved is saved, or has failed."""
        return self._state.saver.is_settled

    def settle(self) -> str | None:
        """Return the key of what was saved, once it is settled."""
        return self._saved(self._state.saver.wait)

    def end(self, last: GenerationResponse) -> None:
        """Save what is due, note what was reused, and keep the cache in memory."""
        key = self._save(self._read.num_saved, self.answer())
        if key is not None:
            self._request.on_saved(key)
        reused, last.saved_seconds = self._record()
        last.key = key or reused
        self._keep()

    def save_read(self) -> None:
        """Save what has been read of the prompt, for the last time."""
        state = self._state
        end = self._read.num_saved if state.has_answer else state.num_pieced
        self._save(end)

    def _save(self, end: int, answer: Sequence[int] = ()) -> str | None:
        """Save the prompt up to `end` and an answer, for the last time."""
        self._check_model()
        return self._saved(lambda: self._state.saver.save(end, answer))

    def _saved(self, save: Callable[[], str | None]) -> str | None:
        """Save for the last time; return the key, or None if that fails."""
        key = None
        try:
            key = save()
        # mlx raises RuntimeError where memory is short, or the thread is another one.
        except Exception as error:
            warn(f"the prompt is not saved: {error}")
        self._state.saver.stop()
        return key

    def _check_model(self) -> None:
        """Save and keep nothing that was read by what the model is no longer."""
        state = self._state
        if state.fetched.fingerprint is None or state.has_changed:
            return
        try:
            now = self._model.fingerprint(self._read.settings)
            state.has_changed = now.digest != state.fetched.fingerprint.digest
        except ModelError:
            state.has_changed = True
        if state.has_changed and state.saver.is_active:
            warn("the prompt is not saved: the model has changed meanwhile")
            state.saver.stop()

    def answer(self) -> list[int]:
        """Return the tokens after the saved part of the prompt that are saved, too."""
        read, state = self._read, self._state
        can_follow = read.plan.is_sliceable(read.num_tokens) and not (
            read.is_drafted or read.plan.quantizes_at_end(read.num_tokens, read.kv)
        )
        if not (self._request.save_answer and can_follow and state.num_answered):
            return []
        return [*read.token_ids[read.num_saved :], *state.answer[: state.num_answered]]

    def _keep(self) -> None:
        """Keep the cache in memory, with what it has read of the answer."""
        state = self._state
        if not state.has_changed:
            answer = state.answer[: state.num_answered]
            self._prefixes.keep(self._read, state.fetched, answer)

    def _record(self) -> tuple[str | None, float]:
        """Note what was reused; return its key and the seconds saved."""
        return self._prefixes.record(self._read, self._state.fetched, **self._seconds())

    def _seconds(self) -> dict[str, Any]:
        state = self._state
        return {
            "load_seconds": state.load_seconds,
            "prefill_seconds": state.prefill_seconds,
            "timed": state.timed,
        }


def has_rows_since(cache: Sequence[Any], start: int) -> bool:
    """Return whether windows still have the rows of what was read since `start`."""
    windows = (
        part
        for _, part in parts_of(cache)
        if kind_of(part, getattr(part, "offset", 0)) is LayerKind.WINDOW
    )
    return all(first_row(window) <= start for window in windows)
