"""Prompts: what the prompt options of `build` and `generate` mean as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

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
    chat_template_config: dict[str, Any] | None
    raw: bool

    @classmethod
    def take(cls, options: dict[str, Any]) -> Self:
        """Take what makes up the prompt out of a command's options."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

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
        return generator.render(
            self._messages(self.prompt), self.tools, self.chat_template_config
        )

    def render_prefix(self, generator: "CachedGenerator") -> rendering.RenderedPrompt:
        """Return what to build. Raises UsageError.

        Without a prompt that is everything before the user's text.
        """
        if not self._is_open:
            return self.render(generator)
        return generator.render_open(
            self._messages(""), self.tools, self.chat_template_config
        )

    def _messages(self, prompt: str | None) -> list[rendering.Message]:
        return rendering.compose(
            system=self.system,
            messages=self.messages or (),
            documents=self.files,
            user=prompt,
        )

    def _check_raw(self) -> None:
        needs_template = (self.messages, self.tools, self.chat_template_config)
        if self.raw and (self.system is not None or any(needs_template)):
            raise UsageError(
                "--raw goes without --system, --messages, --tools and "
                "--chat-template-config, which need the chat template"
            )
