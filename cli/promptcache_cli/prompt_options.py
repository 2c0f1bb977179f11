"""Prompts: the prompt options of commands, checked."""

from dataclasses import dataclass, fields
from typing import Any, Self

from promptcache import UsageError
from promptcache.prompts.parts import PromptParts


@dataclass(frozen=True, slots=True)
class PromptOptions(PromptParts):
    """The prompt as the command line gives it."""

    @classmethod
    def take(cls, options: dict[str, Any]) -> Self:
        """Return the prompt, and remove its parts from a command's options."""
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
        if self.is_prefix:
            self._check_raw()
        else:
            self.check()

    def _check_raw(self) -> None:
        needs_template = (self.messages, self.tools, self.chat_template_config)
        if self.raw and (self.system is not None or any(needs_template)):
            raise UsageError(
                "--raw goes without --system, --messages, --tools and "
                "--chat-template-config, which need the chat template"
            )
