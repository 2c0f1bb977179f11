"""The parts of a prompt, as a command line or a manifest gives them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promptcache.prompts.chat import SEPARATOR, Message


@dataclass(frozen=True, slots=True)
class PromptParts:
    """A prompt as a command line or a manifest gives it.

    Attributes:
        prompt: The user's text, or None if it is still to come.
        system: The system prompt.
        files: Texts to put before the user's.
        messages: Chat messages between the two.
        tools: Tools for the chat template.
        chat_template_config: Further arguments of the chat template.
        raw: Whether to go without the chat template.
    """

    prompt: str | None = None
    system: str | None = None
    files: Sequence[str] = ()
    messages: Sequence[Message] | None = None
    tools: Sequence[Message] | None = None
    chat_template_config: Mapping[str, Any] | None = None
    raw: bool = False

    @property
    def is_open(self) -> bool:
        """Return whether they are the start of prompts, whose user's text may vary."""
        given = self.system is not None or self.files or self.tools
        closed = self.raw or self.prompt is not None or self.messages
        return bool(given) and not closed

    def text(self) -> str:
        """Return them without a chat template."""
        user = [] if self.prompt is None else [self.prompt]
        return SEPARATOR.join([*self.files, *user])

    def compose(self, user: str | None) -> list[Message]:
        """Return them as chat messages with a user's text."""
        return compose(
            system=self.system,
            messages=self.messages or (),
            documents=self.files,
            user=user,
        )


def compose(
    *,
    system: str | None = None,
    messages: Sequence[Message] = (),
    documents: Sequence[str] = (),
    user: str | None = None,
) -> list[Message]:
    """Return chat messages from what a command line gives.

    Documents are parts of the user's message and come before the question, so that a
    second question about the same documents finds them cached.
    """
    first = [{"role": "system", "content": system}] if system is not None else []
    texts = [*documents, user] if user is not None else [*documents]
    last = [{"role": "user", "content": _content(texts)}] if texts else []
    return [*first, *messages, *last]


def _content(texts: Sequence[str]) -> str | list[Message]:
    if len(texts) == 1:
        return texts[0]
    *before, last = texts
    parts = [*(text + SEPARATOR for text in before), last]
    return [{"type": "text", "text": part} for part in parts]
