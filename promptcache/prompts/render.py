"""Rendering: prompts to token ids, with their boundaries."""

import contextlib
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

from promptcache.errors import UsageError
from promptcache.prompts.boundaries import (
    PROBES,
    end_of_system,
    message_places,
    probed_chat,
    stable_prefix,
    start_of_answer,
    token_positions,
    user_places,
)
from promptcache.prompts.chat import (
    ChatPrompt,
    Message,
    is_messages,
    parse_chat,
    text_parts,
)
from promptcache.prompts.template import (
    encode_rendered,
    encode_text,
    origin_of,
    render_text,
)
from promptcache.segments.types import PromptOrigin


class RenderedPrompt(NamedTuple):
    """A prompt as token ids.

    Attributes:
        token_ids: The whole prompt.
        boundaries: Positions at which other prompts are likely to part from it: where
            the first and the last user's text begin, each part of that and, with
            `every_message`, the texts of other messages and the answer.
        system_end: How many tokens come before the first user's text: the system prompt
            and tools, as the template renders them. 0 for text and token ids.
        answer: How many tokens are still the same once it has been answered: where the
            answer begins in history. None if that is not known.
        is_prefix: Whether it is the start of prompts, and not a whole one.
        chat: What was rendered, or None for text and token ids.
        origin: How it was rendered, in a form to be stored, or None likewise.
    """

    token_ids: list[int]
    boundaries: tuple[int, ...] = ()
    system_end: int = 0
    is_prefix: bool = False
    chat: ChatPrompt | None = None
    origin: PromptOrigin | None = None
    answer: int | None = None


Prompt = str | Sequence[int] | Sequence[Message] | RenderedPrompt


def render_prompt(
    tokenizer: Any,
    prompt: Prompt,
    *,
    tools: Sequence[Message] | None = None,
    chat_template_config: Mapping[str, Any] | None = None,
    every_message: bool = False,
) -> RenderedPrompt:
    """Return text, chat messages or token ids as token ids with their boundaries.

    Text is tokenized as it is, like mlx-lm's `stream_generate` does; chat messages
    go through the model's chat template, with the start of the answer appended.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text, token ids or chat messages.
        tools: Tools for the chat template.
        chat_template_config: Further arguments of the chat template.
        every_message: Whether to find where the last `MAX_MESSAGES` begin, and the
            answer, too.

    Raises:
        UsageError: The prompt is empty, or not a prompt.
    """
    if isinstance(prompt, RenderedPrompt):
        rendered = prompt
    elif isinstance(prompt, str):
        rendered = RenderedPrompt(encode_text(tokenizer, prompt))
    elif is_messages(prompt):
        chat = parse_chat(prompt, tools, chat_template_config)
        rendered = _rendered(tokenizer, chat, every_message=every_message)
    else:
        rendered = RenderedPrompt(_ids_of(prompt))
    if not rendered.token_ids:
        raise UsageError("the prompt is empty, give it at least one token")
    return rendered


def render_prefix(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Message] | None = None,
    chat_template_config: Mapping[str, Any] | None = None,
    every_message: bool = False,
) -> RenderedPrompt:
    """Return the start of prompts: all that does not depend on what the user says.

    The text of the last user's message, or its last part, is still to come. Two
    prompts that differ in it only are rendered, and what they have in common is
    returned: templates do not mark where the system prompt ends.

    Args:
        tokenizer: The model's tokenizer.
        messages: Chat messages with a user's text to be replaced.
        tools: Tools for the chat template.
        chat_template_config: Further arguments of the chat template.
        every_message: See `render_prompt`.

    Raises:
        UsageError: Nothing comes before the user's text.
    """
    chat = parse_chat(messages, tools, chat_template_config)
    place = user_places(chat)[-1]
    last_part = len(text_parts(chat.messages[place])) - 1
    token_ids = stable_prefix(tokenizer, chat, place, last_part)
    if not token_ids:
        raise UsageError("the prompt is empty before the user's text, nothing to build")
    probed = probed_chat(chat, place, last_part, PROBES[0])
    whole = _rendered(tokenizer, probed, every_message=every_message)
    return whole._replace(
        token_ids=token_ids,
        boundaries=tuple(b for b in whole.boundaries if b < len(token_ids)),
        system_end=min(whole.system_end, len(token_ids)),
        is_prefix=True,
        chat=chat,
        answer=None,
    )


def _rendered(
    tokenizer: Any, chat: ChatPrompt, *, every_message: bool
) -> RenderedPrompt:
    text = render_text(tokenizer, chat)
    token_ids = encode_rendered(tokenizer, text)
    places = set(message_places(tokenizer, chat, text, every_message=every_message))
    positions = token_positions(tokenizer, text, token_ids, places)
    system_end = end_of_system(tokenizer, chat, token_ids)
    positions.add(system_end)
    answer = start_of_answer(tokenizer, chat, token_ids) if every_message else 0
    boundaries = tuple(sorted((positions | {answer}) - {0, len(token_ids)}))
    origin = replace(origin_of(tokenizer, chat), head=system_end)
    return RenderedPrompt(
        token_ids,
        boundaries,
        system_end,
        chat=chat,
        origin=origin,
        answer=answer or None,
    )


def _ids_of(prompt: Any) -> list[int]:
    """Return the ids of a sequence, an array of mlx or numpy, or a `BatchEncoding`."""
    is_encoding = isinstance(prompt, Mapping) and "input_ids" in prompt
    items = _items_of(prompt["input_ids"] if is_encoding else prompt)
    is_batch = is_encoding or hasattr(prompt, "tolist")
    if is_batch and len(items) == 1 and isinstance(items[0], list):
        # As tokenizers return it, a batch of one.
        items = items[0]
    return items if {*map(type, items)} == {int} else [*map(_id_of, items)]


def _items_of(prompt: Any) -> list[Any]:
    items = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(items, Iterable) and not isinstance(items, bytes | Mapping | Set):
        return list(items)
    kind = type(prompt).__name__
    raise UsageError(
        f"a prompt is text, token ids or a list of chat messages, and not {kind}"
    )


def _id_of(item: Any) -> int:
    """Return an integer of any kind as one of Python's."""
    # True counts as an integer, for Python and for numpy.
    if type(item).__name__ not in ("bool", "bool_"):
        with contextlib.suppress(TypeError):
            return operator.index(item)
    raise UsageError(
        f"token ids are integers, and not {type(item).__name__} such as {item!r:.40}"
    )
