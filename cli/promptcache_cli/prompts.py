"""Prompts: what the prompt options of `build` and `generate` mean as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from promptcache import UsageError, rendering


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

    def token_ids(self, tokenizer: Any) -> list[int]:
        """Return the token ids of the whole prompt. Raises UsageError."""
        return self._render(tokenizer, self.prompt)

    def prefix_token_ids(self, tokenizer: Any) -> list[int]:
        """Return the token ids to build. Raises UsageError.

        Without a prompt that is everything before the user's text.
        """
        if not self._is_open:
            return self.token_ids(tokenizer)
        return rendering.stable_prefix(lambda text: self._render(tokenizer, text))

    def _check_raw(self) -> None:
        if self.raw and (self.system is not None or self.messages or self.tools):
            raise UsageError(
                "--raw goes without --system, --messages and --tools, "
                "which need the chat template"
            )

    def _render(self, tokenizer: Any, prompt: str | None) -> list[int]:
        if self.raw:
            parts = [*self.files, *([] if prompt is None else [prompt])]
            return rendering.to_token_ids(tokenizer, "\n\n".join(parts))
        messages = rendering.compose(
            system=self.system,
            messages=self.messages or (),
            documents=self.files,
            user=prompt,
        )
        return rendering.to_token_ids(tokenizer, messages, tools=self.tools)
