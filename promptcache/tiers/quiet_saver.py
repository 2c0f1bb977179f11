"""The quiet saver: a saver whose trouble a generation survives."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from promptcache.errors import warn
from promptcache.tiers.saver import Saver

if TYPE_CHECKING:
    pass

Result = TypeVar("Result")


class QuietSaver:
    """Saves for a generation: trouble is one warning, and nothing more is saved."""

    def __init__(self, saver: Saver | None) -> None:
        """Take a saver, or None to save nothing."""
        self._saver = saver

    def capture(self, start: int, end: int) -> None:
        """Note a piece that the cache has just read."""
        if self._saver is not None:
            try:
                self._saver.capture(start, end)
            # Of a cache class that is not mlx-lm's own, anything can be expected.
            except Exception as error:
                self.stop(error)

    def capture_answer(self, num_tokens: int) -> None:
        """Note what the cache is about to lose of an answer."""
        if self._saver is not None:
            try:
                self._saver.capture_answer(num_tokens)
            except Exception as error:
                self.stop(error)

    def begin(self, end: int, *, is_listed: bool = True) -> None:
        """Begin to save `[0, end)`, and list its end if that is the prompt's."""

        def begin(saver: Saver) -> None:
            if is_listed or not saver.joins_answer(end):
                saver.begin(end, is_listed=is_listed)

        self._try(begin)
        self.advance()

    def advance(self) -> None:
        """Save some more of it, if that needs no wait."""
        self._try(lambda saver: saver.advance())

    def _try(self, save: Callable[[Saver], Result]) -> Result | None:
        if self._saver is None:
            return None
        try:
            return save(self._saver)
        # mlx raises RuntimeError where memory is short, or the thread is another one.
        except Exception as error:
            self.stop(error)
            return None

    @property
    def is_saving(self) -> bool:
        """Return whether something is left to save."""
        return self._saver is not None

    def stop(self, reason: object) -> None:
        """Save nothing more."""
        warn(f"the prompt is not saved: {reason}")
        self._saver = None

    def finish(self, end: int, answer: Sequence[int] = ()) -> str | None:
        """Save for the last time, and return the key of what was saved."""

        def save(saver: Saver) -> str | None:
            if not end:
                return None
            if not saver.can_keep(len(answer)):
                return saver.save(end)
            if not saver.joins_answer(end):
                saver.save(end, is_listed=False)
            return saver.save_answer(answer)

        key = self._try(save)
        self._saver = None
        return key
