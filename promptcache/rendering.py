"""Rendering: text and chat messages to token ids.

The whole prompt is always tokenized at once. Text prefixes are not token prefixes:
tokenizers merge across any seam.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from promptcache.chain import common_length, pack
from promptcache.errors import UsageError

Message = Mapping[str, Any]


class RenderedPrompt(NamedTuple):
    """A prompt as token ids.

    Attributes:
        token_ids: The whole prompt.
        boundaries: Positions at which other prompts are likely to part from it: the
            end of the system prompt and tools, and what comes before the last
            user's text.
        is_open: Whether more is to come before an answer: it is the start of prompts,
            and none itself.
    """

    token_ids: list[int]
    boundaries: tuple[int, ...] = ()
    is_open: bool = False


Prompt = str | Sequence[int] | Sequence[Message] | RenderedPrompt

# Of how many users' messages the ends are found.
MOST_MESSAGES = 16
# Two user messages that share no first token, to find where a template stops
# depending on what the user says.
PROBES = ("Hello", "42 reasons why")


def render_prompt(
    tokenizer: Any,
    prompt: Prompt,
    *,
    tools: Sequence[Message] | None = None,
    every_message: bool = False,
) -> RenderedPrompt:
    """Return text, chat messages or token ids as token ids with their boundaries.

    Text is tokenized as it is, like mlx-lm's `stream_generate` does; chat messages
    go through the model's chat template, with the start of the answer appended.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text, token ids or chat messages.
        tools: Tools for the chat template.
        every_message: Whether to find the ends of the users' messages, too, which
            takes a rendering for each of the last `MOST_MESSAGES`.

    Raises:
        UsageError: The prompt is empty, or no prompt.
    """
    if isinstance(prompt, RenderedPrompt):
        rendered = prompt
    elif isinstance(prompt, str):
        rendered = RenderedPrompt(encode_text(tokenizer, prompt))
    elif is_messages(prompt):
        token_ids = render(tokenizer, prompt, tools=tools)
        boundaries = find_boundaries(tokenizer, token_ids, prompt, tools=tools)
        if every_message:
            ends = find_message_ends(tokenizer, token_ids, prompt, tools=tools)
            boundaries = tuple(sorted({*boundaries, *ends}))
        rendered = RenderedPrompt(token_ids, boundaries)
    else:
        rendered = RenderedPrompt([int(token_id) for token_id in _flat(prompt)])
    if not rendered.token_ids:
        raise UsageError("the prompt is empty, give it at least one token")
    return rendered


def find_boundaries(
    tokenizer: Any,
    token_ids: list[int],
    messages: Sequence[Message],
    *,
    tools: Sequence[Message] | None = None,
) -> tuple[int, ...]:
    """Return where the first and the last user's text begin in rendered messages."""

    def shared_before(place: int) -> int:
        def render_with(text: str) -> list[int]:
            user = {"role": "user", "content": text}
            return render(tokenizer, [*messages[:place], user], tools=tools)

        # A template may refuse a part of what it takes as a whole.
        with contextlib.suppress(UsageError):
            return shared_length(token_ids, render_with)
        return 0

    places = [i for i, message in enumerate(messages) if message["role"] == "user"]
    found = {shared_before(place) for place in {*places[:1], *places[-1:]}}
    return tuple(sorted(found - {0, len(token_ids)}))


def find_message_ends(
    tokenizer: Any,
    token_ids: list[int],
    messages: Sequence[Message],
    *,
    tools: Sequence[Message] | None = None,
) -> tuple[int, ...]:
    """Return where the last users' messages end in rendered messages.

    A template may render an answer in another way once it is history, without its
    thinking: what a turn surely shares with the next ends with the user's message.
    """
    packed = pack(token_ids)
    places = [i for i, message in enumerate(messages) if message["role"] == "user"]
    found = set()
    for place in places[-MOST_MESSAGES:]:
        history = messages[: place + 1]
        # A template may refuse a part of what it takes as a whole.
        with contextlib.suppress(UsageError):
            part = render(tokenizer, history, tools=tools, generation_prompt=False)
            found.add(common_length(packed, pack(part)))
    return tuple(sorted(found - {0, len(token_ids)}))


def shared_length(token_ids: list[int], render_with: Callable[[str], list[int]]) -> int:
    """Return how many tokens prompts with any other user's text share with this one."""
    packed = pack(token_ids)
    return min(common_length(packed, pack(render_with(probe))) for probe in PROBES)


def is_messages(prompt: Any) -> TypeGuard[Sequence[Message]]:
    """Return whether a prompt is a list of chat messages."""
    return (
        isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
    )


def _flat(prompt: Any) -> list[Any]:
    """Return the ids of a sequence, of an mlx array or of a numpy array."""
    token_ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in token_ids):
        raise UsageError("a prompt is text, token ids or a list of chat messages")
    return token_ids


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of text, with the tokenizer's BOS unless it is there."""
    bos = tokenizer.bos_token
    add_special_tokens = bos is None or not text.startswith(bos)
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def compose(
    *,
    system: str | None = None,
    messages: Sequence[Message] = (),
    documents: Sequence[str] = (),
    user: str | None = None,
) -> list[Message]:
    """Return chat messages from what a command line gives.

    Documents come before the question, so that a second question about the same
    documents finds them cached.
    """
    first = [{"role": "system", "content": system}] if system is not None else []
    parts = [*documents, user] if user is not None else [*documents]
    last = [{"role": "user", "content": "\n\n".join(parts)}] if parts else []
    return [*first, *messages, *last]


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Message] | None = None,
    generation_prompt: bool = True,
) -> list[int]:
    """Return the token ids of chat messages and, if wanted, the start of the answer.

    A model without a chat template gets the contents one after the other. Where the
    template has no system role, the system message goes before the first user's.

    Raises:
        UsageError: The messages are not such, or the template refuses them.
    """
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise UsageError("each message needs a role and content")
    if not getattr(tokenizer, "has_chat_template", tokenizer.chat_template):
        contents = (_content(message) for message in messages)
        return encode_text(tokenizer, "\n\n".join(contents))
    try:
        return _apply_template(tokenizer, messages, tools, generation_prompt)
    except Exception as error:
        # Templates raise whatever they like; the second try shows the reason.
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise UsageError(
                f"the chat template refuses the messages: {error}"
            ) from error
    try:
        messages = _without_system(messages)
        return _apply_template(tokenizer, messages, tools, generation_prompt)
    except Exception as error:
        raise UsageError(f"the chat template refuses the messages: {error}") from error


def _apply_template(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Message] | None,
    generation_prompt: bool,
) -> list[int]:
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=list(tools) if tools else None,
        add_generation_prompt=generation_prompt,
        tokenize=False,
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def _without_system(messages: Sequence[Message]) -> list[Message]:
    system, first, *rest = messages
    content = f"{_content(system)}\n\n{_content(first)}"
    return [{**first, "content": content}, *rest]


def _content(message: Message) -> str:
    """Return a message's text, also where content is a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def stable_prefix(render_with: Callable[[str], list[int]]) -> list[int]:
    """Return the token ids that do not depend on what the user says.

    Renders two prompts that differ in the user's text only and returns what they
    have in common: the end of a system prompt is no place that a template tells.

    Raises:
        UsageError: They share nothing.
    """
    rendered = render_with(PROBES[0])
    shared = rendered[: shared_length(rendered, render_with)]
    if not shared:
        raise UsageError("the prompt is empty before the user's text, nothing to build")
    return shared
