"""Rendering: text and chat messages to token ids.

The whole prompt is always tokenized at once. Text prefixes are not token prefixes:
tokenizers merge across any seam.
"""

import bisect
import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeGuard

from promptcache.chain import common_length, pack
from promptcache.errors import UsageError
from promptcache.fingerprint import hash_json
from promptcache.types import Origin

Message = Mapping[str, Any]


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


class RenderedPrompt(NamedTuple):
    """A prompt as token ids.

    Attributes:
        token_ids: The whole prompt.
        boundaries: Positions at which other prompts are likely to part from it: where
            the first and the last user's text begin, each part of that and, if asked
            for, the texts of other messages and the answer.
        head: How many tokens come before the first user's text: the system prompt and
            tools, as the template puts them. 0 for text and token ids.
        is_open: Whether more is to come before an answer: it is the start of prompts,
            and none itself.
        chat: What was rendered, or None for text and token ids.
        origin: How it was rendered, in a form to be stored, or None likewise.
    """

    token_ids: list[int]
    boundaries: tuple[int, ...] = ()
    head: int = 0
    is_open: bool = False
    chat: ChatPrompt | None = None
    origin: Origin | None = None


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


Prompt = str | Sequence[int] | Sequence[Message] | RenderedPrompt

# Of how many messages the beginnings are found.
MOST_MESSAGES = 16
# Two user messages that share no first token, to find where a template stops
# depending on what the user says.
PROBES = ("Hello", "42 reasons why")
# Between documents, and before the question about them.
SEPARATOR = "\n\n"
# Of messages that tell the model what it is.
SYSTEM_ROLES = ("system", "developer")
# Arguments of `apply_chat_template` that are not the template's.
OWN_ARGUMENTS = {"tools", "add_generation_prompt", "tokenize", "conversation"}


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
        every_message: Whether to find where the last `MOST_MESSAGES` begin, and the
            answer, too.

    Raises:
        UsageError: The prompt is empty, or no prompt.
    """
    if isinstance(prompt, RenderedPrompt):
        rendered = prompt
    elif isinstance(prompt, str):
        rendered = RenderedPrompt(encode_text(tokenizer, prompt))
    elif is_messages(prompt):
        chat = make_chat(prompt, tools, chat_template_config)
        rendered = _rendered(tokenizer, chat, every_message=every_message)
    else:
        rendered = RenderedPrompt([int(token_id) for token_id in _flat(prompt)])
    if not rendered.token_ids:
        raise UsageError("the prompt is empty, give it at least one token")
    return rendered


def render_open(
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
    returned: the end of a system prompt is no place that a template tells.

    Args:
        tokenizer: The model's tokenizer.
        messages: Chat messages with a user's text to be replaced.
        tools: Tools for the chat template.
        chat_template_config: Further arguments of the chat template.
        every_message: See `render_prompt`.

    Raises:
        UsageError: Nothing comes before the user's text.
    """
    chat = make_chat(messages, tools, chat_template_config)
    place = _user_places(chat)[-1]
    last_part = len(_texts(chat.messages[place])) - 1
    token_ids = _stable_prefix(tokenizer, chat, place, last_part)
    if not token_ids:
        raise UsageError("the prompt is empty before the user's text, nothing to build")
    probed = _probed(chat, place, last_part, PROBES[0])
    whole = _rendered(tokenizer, probed, every_message=every_message)
    return whole._replace(
        token_ids=token_ids,
        boundaries=tuple(b for b in whole.boundaries if b < len(token_ids)),
        head=min(whole.head, len(token_ids)),
        is_open=True,
        chat=chat,
    )


def make_chat(
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    config: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """Return messages in the form that chat templates expect.

    As mlx-lm's server does, arguments of tool calls become objects, and content that
    is missing becomes empty.

    Raises:
        UsageError: They are no messages, or an argument is not the template's.
    """
    for number, message in enumerate(messages, start=1):
        _check_message(message, number)
    if own := OWN_ARGUMENTS & (config or {}).keys():
        raise UsageError(f"{min(own)} is no argument of chat templates")
    plain = tuple(_with_parsed_calls(message) for message in messages)
    return ChatPrompt(plain, tuple(tools or ()), dict(config or {}))


def _check_message(message: Any, number: int) -> None:
    """Raise UsageError for what is no message, or holds something else than text."""
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
        raise UsageError(f"message {number} is no valid Unicode") from error


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


def _rendered(
    tokenizer: Any, chat: ChatPrompt, *, every_message: bool
) -> RenderedPrompt:
    text = render_text(tokenizer, chat)
    token_ids = _encode(tokenizer, text)
    places = set(_places(tokenizer, chat, text, every_message=every_message))
    found = _token_positions(tokenizer, text, token_ids, places)
    head = _end_of_system(tokenizer, chat, token_ids)
    found.add(head)
    if every_message:
        found.add(_start_of_answer(tokenizer, chat, token_ids))
    boundaries = tuple(sorted(found - {0, len(token_ids)}))
    origin = replace(origin_of(tokenizer, chat), head=head)
    return RenderedPrompt(token_ids, boundaries, head, chat=chat, origin=origin)


# Boundaries


def _user_places(chat: ChatPrompt) -> list[int]:
    return [i for i, m in enumerate(chat.messages) if m["role"] == "user"]


def _probed(chat: ChatPrompt, place: int, part: int, text: str) -> ChatPrompt:
    """Return a chat that ends with another text for a part of one of its messages."""
    content = "".join([*_texts(chat.messages[place])[:part], text])
    message = {**chat.messages[place], "content": content}
    return replace(chat, messages=(*chat.messages[:place], message))


def _stable_prefix(
    tokenizer: Any, chat: ChatPrompt, place: int, part: int
) -> list[int]:
    """Return the token ids before a part of a user's message, whatever that says."""
    probes = [
        _encode(tokenizer, render_text(tokenizer, _probed(chat, place, part, probe)))
        for probe in PROBES
    ]
    return probes[0][: common_length(*map(pack, probes))]


def _end_of_system(tokenizer: Any, chat: ChatPrompt, token_ids: list[int]) -> int:
    """Return where the first user's text begins, or would: after system and tools."""
    if not _user_places(chat):
        chat = replace(chat, messages=(*chat.messages, {"role": "user"}))
    # A template may refuse a part of what it takes as a whole.
    with contextlib.suppress(UsageError):
        stable = _stable_prefix(tokenizer, chat, _user_places(chat)[0], 0)
        return common_length(pack(token_ids), pack(stable))
    return 0


def _start_of_answer(tokenizer: Any, chat: ChatPrompt, token_ids: list[int]) -> int:
    """Return how much of a prompt is still the same once it has been answered.

    A template may render an answer in another way as history, without its thinking.
    """
    packed = pack(token_ids)
    with contextlib.suppress(UsageError):
        return min(
            common_length(packed, pack(_encode(tokenizer, text)))
            for text in (_answered(tokenizer, chat, probe) for probe in PROBES)
        )
    return 0


def _answered(tokenizer: Any, chat: ChatPrompt, probe: str) -> str:
    """Return the text of a chat that goes on after an answer."""
    more = ({"role": role, "content": probe} for role in ("assistant", "user"))
    return render_text(tokenizer, replace(chat, messages=(*chat.messages, *more)))


def _places(
    tokenizer: Any, chat: ChatPrompt, text: str, *, every_message: bool
) -> Iterator[int]:
    """Yield where the texts of messages begin, if they are likely to be other ones."""
    places = _user_places(chat)
    if not places:
        return
    last = places[-1]
    wanted = {(last, part) for part in range(len(_texts(chat.messages[last])))}
    if every_message:
        end = len(chat.messages)
        wanted |= {(place, 0) for place in range(max(end - MOST_MESSAGES, 0), end)}
    # Found by its tokens, which is surer.
    for place, part in wanted - {(places[0], 0)}:
        with contextlib.suppress(UsageError):
            yield min(
                _common_text(text, render_text(tokenizer, probed))
                for probed in (_probed(chat, place, part, p) for p in PROBES)
            )


def _common_text(left: str, right: str) -> int:
    # In UTF-32 a character takes four bytes, like a packed token id.
    encoded = (t.encode("utf-32-le", "surrogatepass") for t in (left, right))
    return common_length(*encoded)


def _token_positions(
    tokenizer: Any, text: str, token_ids: list[int], places: Iterable[int]
) -> set[int]:
    """Return how many whole tokens come before places in the text."""
    ends = _token_ends(tokenizer, text, token_ids)
    if ends is not None:
        return {bisect.bisect_right(ends, place) for place in places}
    packed = pack(token_ids)
    parts = (pack(_encode(tokenizer, text[:place])) for place in places)
    return {common_length(packed, part) for part in parts}


def _token_ends(tokenizer: Any, text: str, token_ids: list[int]) -> list[int] | None:
    """Return where each token ends in the text, or None if the tokenizer can't tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    add_special_tokens = not has_template(tokenizer) and not _has_bos(tokenizer, text)
    encoding = backend.encode(text, add_special_tokens=add_special_tokens)
    return [end for _, end in encoding.offsets] if encoding.ids == token_ids else None


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


# Text


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of text, with the tokenizer's BOS unless it is there."""
    add_special_tokens = not _has_bos(tokenizer, text)
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _has_bos(tokenizer: Any, text: str) -> bool:
    bos = tokenizer.bos_token
    return bos is not None and text.startswith(bos)


def has_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "has_chat_template", tokenizer.chat_template))


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of rendered text, in which a template has put its BOS."""
    if not has_template(tokenizer):
        return encode_text(tokenizer, text)
    return list(tokenizer.encode(text, add_special_tokens=False))


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


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Message] | None = None,
    chat_template_config: Mapping[str, Any] | None = None,
    generation_prompt: bool = True,
) -> list[int]:
    """Return the token ids of chat messages and, if wanted, the start of the answer.

    Raises:
        UsageError: The messages are not such, or the template refuses them.
    """
    chat = make_chat(messages, tools, chat_template_config)
    text = render_text(tokenizer, chat, generation_prompt=generation_prompt)
    return _encode(tokenizer, text)


def render_text(
    tokenizer: Any, chat: ChatPrompt, *, generation_prompt: bool = True
) -> str:
    """Return what a chat template makes of a chat.

    A model without a chat template gets the contents one after the other. Where the
    template has no system role, the system message goes before the first user's.

    Raises:
        UsageError: The template refuses the messages.
    """
    messages = [{**m, "content": "".join(_texts(m))} for m in chat.messages]
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


def _texts(message: Message) -> list[str]:
    """Return the parts of a message's text; most messages have one."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [str(part.get("text", "")) for part in content] or [""]


# Origins


def origin_of(tokenizer: Any, chat: ChatPrompt) -> Origin:
    """Return how a chat is rendered, so that it can be compared with others."""
    system = system_text(chat)
    return Origin(
        template=hash_json(getattr(tokenizer, "chat_template", None) or ""),
        # From Python, templates may be given what JSON does not know.
        config=json.loads(json.dumps(chat.config, sort_keys=True, default=str)),
        system=hash_json(system) if system else "",
        tools=tuple((tool_name(tool), hash_json(tool)) for tool in chat.tools),
    )


def system_text(chat: ChatPrompt) -> str:
    """Return the text of the system prompt, empty without one."""
    return "".join(
        text
        for message in chat.messages
        if message["role"] in SYSTEM_ROLES
        for text in _texts(message)
    )


def message_texts(chat: ChatPrompt) -> list[str]:
    """Return what is said in each message, without blanks around it."""
    texts = ("".join(_texts(message)).strip() for message in chat.messages)
    return [text for text in texts if text]


def tool_name(tool: Message) -> str:
    """Return the name of a tool, in OpenAI's form or a plain one."""
    function = tool.get("function")
    named = function if isinstance(function, Mapping) else tool
    return str(named.get("name", ""))
