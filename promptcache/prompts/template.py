"""Render a chat with its template, and tokenize the result.

A whole text is always tokenized at once. Text prefixes are not token prefixes:
tokenizers merge across any seam.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from promptcache.errors import UsageError
from promptcache.prompts.chat import (
    SEPARATOR,
    ChatPrompt,
    Message,
    parse_chat,
    system_text,
    text_parts,
    tool_name,
)
from promptcache.segments.fingerprint import hash_json
from promptcache.segments.types import PromptOrigin


def has_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "has_chat_template", tokenizer.chat_template))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of text, with the tokenizer's BOS unless it is there."""
    add_special_tokens = not _has_bos(tokenizer, text)
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _has_bos(tokenizer: Any, text: str) -> bool:
    bos = tokenizer.bos_token
    return bos is not None and text.startswith(bos)


def encode_rendered(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of rendered text, in which a template has put its BOS."""
    if not has_template(tokenizer):
        return encode_text(tokenizer, text)
    return list(tokenizer.encode(text, add_special_tokens=False))


def token_ends(tokenizer: Any, text: str, token_ids: list[int]) -> list[int] | None:
    """Return where each token ends in the text, or None if it does not say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    add_special_tokens = not has_template(tokenizer) and not _has_bos(tokenizer, text)
    encoding = backend.encode(text, add_special_tokens=add_special_tokens)
    return [end for _, end in encoding.offsets] if encoding.ids == token_ids else None


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Message] | None = None,
    chat_template_config: Mapping[str, Any] | None = None,
    generation_prompt: bool = True,
) -> list[int]:
    """Return the token ids of chat messages and of the start of the answer.

    Raises:
        UsageError: They are not messages, or the template refuses them.
    """
    chat = parse_chat(messages, tools, chat_template_config)
    text = render_text(tokenizer, chat, generation_prompt=generation_prompt)
    return encode_rendered(tokenizer, text)


def render_text(
    tokenizer: Any, chat: ChatPrompt, *, generation_prompt: bool = True
) -> str:
    """Return what a chat template makes of a chat.

    A model without a chat template gets the contents one after the other. Where the
    template has no system role, the system message goes before the first user's.

    Raises:
        UsageError: The template refuses the messages.
    """
    messages = [{**m, "content": "".join(text_parts(m))} for m in chat.messages]
    if not has_template(tokenizer):
        return SEPARATOR.join(message["content"] for message in messages)

    def apply(messages: list[dict[str, Any]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=list(chat.tools) or None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **chat.config,
            )
        )

    try:
        return apply(messages)
    except Exception as error:
        # Templates raise whatever they like; the second try shows the reason.
        if len(messages) < 2 or messages[0]["role"] != "system":
            raise _refused(error) from error
    try:
        return apply(_without_system(messages))
    except Exception as error:
        raise _refused(error) from error


def _refused(error: Exception) -> UsageError:
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return UsageError(f"the chat template refuses the messages: {reason}")


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system, first, *rest = messages
    content = f"{system['content']}{SEPARATOR}{first['content']}"
    return [{**first, "content": content}, *rest]


def origin_of(tokenizer: Any, chat: ChatPrompt) -> PromptOrigin:
    """Return how a chat is rendered, so that it can be compared with others."""
    system = system_text(chat)
    return PromptOrigin(
        template=hash_json(getattr(tokenizer, "chat_template", None) or ""),
        # From Python, templates may be given what JSON does not know.
        config=json.loads(json.dumps(chat.config, sort_keys=True, default=str)),
        system=hash_json(system) if system else "",
        tools=tuple((tool_name(tool), hash_json(tool)) for tool in chat.tools),
    )
