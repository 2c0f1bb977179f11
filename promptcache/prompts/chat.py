"""Chat prompts: what goes through a chat template, checked."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from promptcache.errors import UsageError

Message = Mapping[str, Any]
# Between documents, and before the question about them.
SEPARATOR = "\n\n"
# Roles of messages that describe what the model is.
SYSTEM_ROLES = ("system", "developer")
# Arguments of `apply_chat_template` that are not the template's.
OWN_ARGUMENTS = {"tools", "add_generation_prompt", "tokenize", "conversation"}


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What goes through a chat template.

    Attributes:
        messages: The chat messages. Content is text, or a list of parts with text.
        tools: The tools.
        config: Further arguments of the template.
    """

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def is_messages(prompt: Any) -> TypeGuard[Sequence[Message]]:
    """Return whether a prompt is a list of chat messages."""
    return (
        isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
    )


def parse_chat(
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    config: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """Return messages in the form that chat templates expect.

    As mlx-lm's server does, arguments of tool calls become objects, and content that
    is missing becomes empty.

    Raises:
        UsageError: They are not messages, or an argument is not the template's.
    """
    for number, message in enumerate(messages, start=1):
        _check_message(message, number)
    if own := OWN_ARGUMENTS & (config or {}).keys():
        raise UsageError(f"{min(own)} is not an argument of chat templates")
    plain = tuple(_with_parsed_calls(message) for message in messages)
    return ChatPrompt(plain, tuple(tools or ()), dict(config or {}))


def _check_message(message: Any, number: int) -> None:
    """Raise UsageError for what is not a message of text."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise UsageError("each message needs a role and content")
    content = message.get("content")
    whole = [{"text": content or ""}]
    for part in content if isinstance(content, list | tuple) else whole:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise UsageError(f"message {number} must have text as content")
        _check_text(part["text"], number)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list | tuple) or not all(
        isinstance(call, Mapping) and isinstance(call.get("function") or {}, Mapping)
        for call in calls
    ):
        raise UsageError(f"tool_calls of message {number} must be a list of objects")


def _check_text(text: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"message {number} is not valid Unicode") from error


def _with_parsed_calls(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [_with_parsed_arguments(call) for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _with_parsed_arguments(call: Message) -> Message:
    function = call.get("function") or {}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    # What a model wrote need not be JSON.
    with contextlib.suppress(ValueError):
        arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def text_parts(message: Message) -> list[str]:
    """Return the parts of a message's text; most messages have one."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [str(part.get("text", "")) for part in content] or [""]


def message_texts(chat: ChatPrompt) -> list[str]:
    """Return what is said in each message, without blanks around it."""
    texts = ("".join(text_parts(message)).strip() for message in chat.messages)
    return [text for text in texts if text]


def system_text(chat: ChatPrompt) -> str:
    """Return the text of the system prompt, empty without one."""
    return "".join(
        text
        for message in chat.messages
        if message["role"] in SYSTEM_ROLES
        for text in text_parts(message)
    )


def tool_name(tool: Message) -> str:
    """Return the name of a tool, in OpenAI's form or a plain one."""
    function = tool.get("function")
    named = function if isinstance(function, Mapping) else tool
    return str(named.get("name", ""))
