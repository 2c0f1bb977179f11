"""Requests of tests on a scheduler, and what they were told."""

from dataclasses import dataclass, field
from typing import Any

from promptcache import CachedGenerator
from promptcache.engine.batch.run import Run
from promptcache.engine.decode import Step
from promptcache.engine.request import RequestState


@dataclass
class Heard:
    """What a request was told.

    Attributes:
        tokens: Of its answer.
        cached_tokens: Tokens of its prompt that were not read, None before it started.
        finish_reason: Why its last token was the last.
        ends: The error with which it ended, or None, once for each time it was told.
        stop_after: After so many tokens it wants no more.
    """

    tokens: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    finish_reason: str | None = None
    ends: list[Exception | None] = field(default_factory=list)
    stop_after: int | None = None

    def on_start(self, state: RequestState) -> None:
        assert self.cached_tokens is None
        self.cached_tokens = state.fetched.cached_tokens

    def on_token(self, step: Step, finish_reason: str | None) -> bool:
        assert not self.ends and self.finish_reason is None
        self.tokens.append(step.token)
        self.finish_reason = finish_reason
        return len(self.tokens) != self.stop_after

    def on_end(self, error: Exception | None) -> None:
        self.ends.append(error)


class Requests:
    """A generator's scheduler, and requests for it."""

    def __init__(self, generator: CachedGenerator, **options: Any) -> None:
        self.generator = generator
        self.engine = generator.engine(**options)
        self.scheduler = self.engine._scheduler

    def submit(
        self,
        prompt: Any,
        max_tokens: int = 12,
        *,
        stop_after: int | None = None,
        **options: Any,
    ) -> tuple[Run, Heard]:
        """Submit a prompt; return the request and what it will be told."""
        rendered = self.generator.render(prompt)
        heard = Heard(stop_after=stop_after)
        return self.engine.submit(rendered, max_tokens, heard, **options), heard
