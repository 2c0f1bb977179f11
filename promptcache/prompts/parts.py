"""The parts of a prompt, as a command line or a manifest gives them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promptcache.errors import UsageError
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
    def is_prefix(self) -> bool:
        """Return whether they are the start of prompts, whose user's text may vary."""
        has_start = self.system is not None or self.files or self.tools
        has_end = self.raw or self.prompt is not None or self.messages
        return bool(has_start) and not has_end

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


def parse_json(text: str, name: str) -> Any:
    """Return a JSON value. Raises UsageError with the name of what is not one."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UsageError(f"{name} is not JSON (nested too deeply)") from error
    except ValueError as error:
        raise UsageError(f"{name} is not JSON ({error})") from error


def parse_objects(text: str, name: str) -> list[dict[str, Any]]:
    """Return a JSON list of objects, such as messages or tools; see `parse_json`."""
    value = parse_json(text, name)
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise UsageError(f"{name} must hold a JSON list of objects")
    return value
