"""Prompts: what the prompt options of `build` and `generate` mean as token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from promptcache import UsageError, rendering

if TYPE_CHECKING:
    from promptcache import CachedGenerator


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """The prompt as the command line gives it."""

    prompt: str | None
    system: str | None
    files: Sequence[str]
    messages: Sequence[dict[str, Any]] | None
    tools: Sequence[dict[str, Any]] | None
    raw: bool

    def check(self) -> None:
        """Raise UsageError if there is no prompt, or options contradict each other."""
        self._check_raw()
        if self.prompt is None and not self.files and not self.messages:
            raise UsageError("there is no prompt, give PROMPT, --file or --messages")
        if self.prompt is not None and not self.prompt.strip() and not self.files:
            raise UsageError("the prompt is empty")

    def check_prefix(self) -> None:
        """Raise UsageError if there is nothing to build."""
        if self._is_open:
            self._check_raw()
        else:
            self.check()

    @property
    def _is_open(self) -> bool:
        """Whether the user's text is still to come."""
        given = self.system is not None or self.files or self.tools
        closed = self.raw or self.prompt is not None or self.messages
        return bool(given) and not closed

    def render(self, generator: "CachedGenerator") -> rendering.RenderedPrompt:
        """Return the whole prompt. Raises UsageError."""
        if self.raw:
            parts = [*self.files, *([] if self.prompt is None else [self.prompt])]
            return generator.render("\n\n".join(parts))
        rendered = generator.render(self._messages(self.prompt), self.tools)
        if not self.files:
            return rendered
        # Another question about the same files parts where the question begins.
        token_ids = rendered.token_ids
        render_with = self._render_with(generator.tokenizer)
        question = rendering.shared_length(token_ids, render_with)
        boundaries = {*rendered.boundaries, question} - {len(token_ids)}
        return rendering.RenderedPrompt(token_ids, tuple(sorted(boundaries)))

    def render_prefix(self, generator: "CachedGenerator") -> rendering.RenderedPrompt:
        """Return what to build. Raises UsageError.

        Without a prompt that is everything before the user's text.
        """
        if not self._is_open:
            return self.render(generator)
        tokenizer = generator.tokenizer
        token_ids = rendering.stable_prefix(self._render_with(tokenizer))
        boundaries = rendering.find_boundaries(
            tokenizer, token_ids, self._messages(""), tools=self.tools
        )
        return rendering.RenderedPrompt(token_ids, boundaries, is_open=True)

    def _messages(self, prompt: str | None) -> list[rendering.Message]:
        return rendering.compose(
            system=self.system,
            messages=self.messages or (),
            documents=self.files,
            user=prompt,
        )

    def _render_with(self, tokenizer: Any) -> Callable[[str], list[int]]:
        """Return a function that renders the prompt with another user's text."""
        return lambda text: rendering.render(
            tokenizer, self._messages(text), tools=self.tools
        )

    def _check_raw(self) -> None:
        if self.raw and (self.system is not None or self.messages or self.tools):
            raise UsageError(
                "--raw goes without --system, --messages and --tools, "
                "which need the chat template"
            )
