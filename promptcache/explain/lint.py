"""Find text early in a prompt that is likely to change, which prevents its reuse."""

import json
import re
from typing import Any, NamedTuple

from promptcache import config
from promptcache.explain.volatile_text import Volatile, find_volatile
from promptcache.prompts.chat import ChatPrompt, system_text
from promptcache.prompts.render import RenderedPrompt

# Arguments of well-known templates in place of what they insert by themselves.
ARGUMENTS = ("date_string", "current_date", "today", "date", "current_time")


class VolatileText(NamedTuple):
    """Text that is likely to be different the next time.

    Attributes:
        kind: What it is, such as "date"; see `volatile_text.KINDS`.
        text: The text.
        position: The token in which it begins.
        place: Where it comes from, such as "line 2 of the system prompt".
        advice: What to move where.
        prompt_tokens: Length of what is built.
    """

    kind: str
    text: str
    position: int
    place: str
    advice: str
    prompt_tokens: int

    @property
    def message(self) -> str:
        """Return all of it in one line."""
        return (
            f"{self.kind} {self.text[:60]!r} at token {self.position} of "
            f"{self.prompt_tokens} ({self.place}): when it changes, all tokens from "
            f"there on are read again; {self.advice}"
        )


def find_volatile_text(tokenizer: Any, prompt: RenderedPrompt) -> list[VolatileText]:
    """Return volatile text in what comes before the first user's text.

    What users say is expected to change; a prompt without chat messages is searched
    as a whole.
    """
    end = len(prompt.token_ids) if prompt.chat is None else prompt.system_end
    text = _decode(tokenizer, prompt.token_ids[:end])
    volatiles = find_volatile(
        text, hostnames=config.hostnames(), directories=config.directories()
    )
    return [
        _located(tokenizer, prompt, text, volatile)
        for volatile in volatiles
        if not _is_given(prompt.chat, volatile.text)
    ]


def _is_given(chat: ChatPrompt | None, text: str) -> bool:
    """Return whether a text is the fixed value of an argument of the template."""
    return chat is not None and any(text in str(v) for v in chat.config.values())


def _located(
    tokenizer: Any, prompt: RenderedPrompt, text: str, volatile: Volatile
) -> VolatileText:
    place, advice = _place(tokenizer, prompt.chat, text, volatile)
    return VolatileText(
        volatile.kind,
        volatile.text,
        _token_at(tokenizer, prompt.token_ids, volatile.start),
        place,
        advice,
        len(prompt.token_ids),
    )


def _place(
    tokenizer: Any, chat: ChatPrompt | None, text: str, volatile: Volatile
) -> tuple[str, str]:
    """Return where volatile text comes from, and what to do about it."""
    if chat is None:
        return "in the text", "move it to the end of the prompt"
    system = system_text(chat).strip()
    start = text.find(system)
    if system and 0 <= start <= volatile.start < start + len(system):
        line = text.count("\n", start, volatile.start) + 1
        return f"line {line} of the system prompt", "move it to the user's message"
    if volatile.text in json.dumps(chat.tools, ensure_ascii=False):
        return "in the tools", "leave it out of the tools, or put it in a message"
    if volatile.text in system:
        return "in the system prompt", "move it to the user's message"
    return "inserted by the chat template", _advice_for(tokenizer)


def _advice_for(tokenizer: Any) -> str:
    template = str(getattr(tokenizer, "chat_template", "") or "")
    # As a variable, and not in what the template says.
    argument = next(
        (
            name
            for name in ARGUMENTS
            if re.search(rf"{{[{{%][^}}]*\b{name}\b(?!['\"])", template)
        ),
        None,
    )
    if argument is None:
        return "use a template that leaves it out"
    return f'fix it with --chat-template-config \'{{"{argument}": "…"}}\''


def _token_at(tokenizer: Any, token_ids: list[int], place: int) -> int:
    """Return the token in which a character of the decoded text lies."""
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(_decode(tokenizer, token_ids[:middle])) <= place:
            low = middle
        else:
            high = middle - 1
    return low


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
