"""Boundaries: where other prompts are likely to part from a chat.

A template does not mark them, so the chat is rendered again with other texts, and
compared.
"""

import bisect
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from promptcache.errors import UsageError
from promptcache.prompts.chat import ChatPrompt, text_parts
from promptcache.prompts.template import encode_rendered, render_text, token_ends
from promptcache.segments.chain import common_length, pack

# Boundaries are found in this number of the last messages.
MAX_MESSAGES = 16
# Two user messages that share no first token, to find where a template stops
# depending on what the user says.
PROBES = ("Hello", "42 reasons why")
BLANK_PROBE = "\n\nHello"


def user_places(chat: ChatPrompt) -> list[int]:
    """Return the indices of the user's messages."""
    return [i for i, m in enumerate(chat.messages) if m["role"] == "user"]


def probed_chat(chat: ChatPrompt, place: int, part: int, text: str) -> ChatPrompt:
    """Return a chat that ends in a part of one of its messages, with this text."""
    content = "".join([*text_parts(chat.messages[place])[:part], text])
    message = {**chat.messages[place], "content": content}
    return replace(chat, messages=(*chat.messages[:place], message))


def stable_prefix(tokenizer: Any, chat: ChatPrompt, place: int, part: int) -> list[int]:
    """Return the token ids before a part of a user's message, whatever that says."""
    probes = [
        encode_rendered(
            tokenizer, render_text(tokenizer, probed_chat(chat, place, part, probe))
        )
        for probe in PROBES
    ]
    return probes[0][: common_length(*map(pack, probes))]


def end_of_system(tokenizer: Any, chat: ChatPrompt, token_ids: list[int]) -> int:
    """Return where the first user's text begins, or would: after system and tools."""
    if not user_places(chat):
        chat = replace(chat, messages=(*chat.messages, {"role": "user"}))
    # A template may refuse a part of what it takes as a whole.
    with contextlib.suppress(UsageError):
        stable = stable_prefix(tokenizer, chat, user_places(chat)[0], 0)
        return common_length(pack(token_ids), pack(stable))
    return 0


def start_of_answer(tokenizer: Any, chat: ChatPrompt, token_ids: list[int]) -> int:
    """Return how much of a prompt is still the same once it has been answered.

    A template may render an answer differently in history, without its thinking.
    """
    packed = pack(token_ids)

    def shared(probe: str) -> int:
        text = _answered(tokenizer, chat, probe)
        return common_length(packed, pack(encode_rendered(tokenizer, text)))

    with contextlib.suppress(UsageError):
        place = min(map(shared, PROBES))
        # After thinking, an answer's own blanks may merge with the template's.
        return place if place == len(token_ids) else min(place, shared(BLANK_PROBE))
    return 0


def _answered(tokenizer: Any, chat: ChatPrompt, probe: str) -> str:
    """Return the text of a chat that goes on after an answer."""
    more = ({"role": role, "content": probe} for role in ("assistant", "user"))
    return render_text(tokenizer, replace(chat, messages=(*chat.messages, *more)))


def message_places(
    tokenizer: Any, chat: ChatPrompt, text: str, *, every_message: bool
) -> Iterator[int]:
    """Yield where the texts of messages begin that are likely to change."""
    places = user_places(chat)
    if not places:
        return
    last = places[-1]
    parts = {(last, part) for part in range(len(text_parts(chat.messages[last])))}
    if every_message:
        end = len(chat.messages)
        parts |= {(place, 0) for place in range(max(end - MAX_MESSAGES, 0), end)}
    # The first one is found by its tokens, which is surer.
    for place, part in parts - {(places[0], 0)}:
        with contextlib.suppress(UsageError):
            yield min(
                _common_text(text, render_text(tokenizer, probed))
                for probed in (probed_chat(chat, place, part, p) for p in PROBES)
            )


def _common_text(left: str, right: str) -> int:
    # In UTF-32 a character takes four bytes, like a packed token id.
    encoded = (t.encode("utf-32-le", "surrogatepass") for t in (left, right))
    return common_length(*encoded)


def token_positions(
    tokenizer: Any, text: str, token_ids: list[int], places: Iterable[int]
) -> set[int]:
    """Return how many whole tokens come before places in the text."""
    ends = token_ends(tokenizer, text, token_ids)
    if ends is not None:
        return {bisect.bisect_right(ends, place) for place in places}
    packed = pack(token_ids)
    parts = (pack(encode_rendered(tokenizer, text[:place])) for place in places)
    return {common_length(packed, part) for part in parts}
