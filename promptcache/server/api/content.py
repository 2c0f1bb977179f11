"""Contents of messages: their text, and a conversation made of pieces of it.

What a client sends in place of text (images, audio, files, addresses) is refused by its
name: nothing that it names is ever fetched.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from promptcache.prompts.chat import SEPARATOR, Message
from promptcache.server.api.fields import check_values, refused

# Types of parts that are text, with the field that has it.
TEXT_FIELDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning_text": "text",
    "summary_text": "text",
    "refusal": "refusal",
}


def texts_of(content: Any) -> list[str]:
    """Return the texts of a content, which is text or a list of parts with text."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise refused("must be text or a list of parts")
    return [_text_of(part, number) for number, part in enumerate(content)]


def _text_of(part: Any, number: int) -> str:
    if not isinstance(part, dict):
        raise refused("must be an object", number)
    kind = part.get("type")
    if kind is None:
        raise refused("is missing", number, "type")
    field = TEXT_FIELDS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise refused(f"of type {name_of(kind)} is not supported, only text", number)
    text = part.get(field)
    if not isinstance(text, str):
        raise refused("must be text", number, field)
    return text


def name_of(kind: Any) -> str:
    """Return a type's name as short as a message can bear."""
    return str(kind)[:100]


_CONTENT_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string"},
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "type": {"type": "string"},
                        "text": {"type": "string"},
                    },
                    "required": ["type"],
                },
            },
        ]
    }
)


def _as_parts(texts: list[str]) -> list[dict[str, str]]:
    """Return texts as a content that can be read again."""
    return [{"type": "text", "text": text} for text in texts]


Texts = Annotated[
    list[str], BeforeValidator(texts_of), PlainSerializer(_as_parts), _CONTENT_SCHEMA
]


def parse_arguments(value: Any) -> Any:
    """Return the arguments of a call: an object where they are one, else their text."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise refused("must be JSON text")
    return object_in(value, otherwise=value)


def object_in(text: str, otherwise: Any) -> Any:
    """Return the object that JSON text is; what a model wrote need not be one."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
        check_values(value)
    except (ValueError, RecursionError):
        return otherwise
    return value if isinstance(value, dict) else otherwise


# An object or text; the models keep what `parse_arguments` made of it.
Arguments = Annotated[
    Any,
    BeforeValidator(parse_arguments),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}),
]


def call_of(call_id: str | None, name: str, arguments: Any) -> Message:
    """Return a call of a function in the form that chat templates take."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if call_id is None else {"id": call_id, **call}


def reasoning_of(text: str) -> Message:
    """Return the fields of a message that templates look for reasoning in."""
    return {"reasoning": text, "reasoning_content": text} if text else {}


class Conversation:
    """A chat made of pieces, in the order that chat templates can take.

    Several templates raise where a system message comes later or roles do not
    alternate. So system texts become one message at the front, and neighbours with the
    same role become one message.
    """

    def __init__(self) -> None:
        self._system: list[str] = []
        self._messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    @property
    def has_begun(self) -> bool:
        """Whether anything but system texts has been added."""
        return bool(self._messages)

    def add_system(self, texts: Iterable[str]) -> None:
        """Add texts to the system message."""
        self._system += [text for text in texts if text]

    def add_user(self, texts: Iterable[str]) -> None:
        """Add texts of the user."""
        _join(self._last("user"), "content", SEPARATOR.join(filter(None, texts)))

    def add_answer(self, text: str) -> None:
        """Add text of the assistant."""
        _join(self._last("assistant"), "content", text)

    def add_reasoning(self, text: str) -> None:
        """Add what the assistant thought."""
        if text:
            message = self._last("assistant")
            for field in reasoning_of(text):
                _join(message, field, text)

    def add_call(self, call_id: str, name: str, arguments: Any) -> None:
        """Add a call of a function by the assistant."""
        calls = self._last("assistant").setdefault("tool_calls", [])
        calls.append(call_of(call_id, name, arguments))
        self._names[call_id] = name

    def add_result(self, call_id: str, text: str) -> None:
        """Add what a call returned."""
        name = self._names.get(call_id)
        message = {"role": "tool", "tool_call_id": call_id, "content": text}
        self._messages.append(message if name is None else {**message, "name": name})

    def messages(self) -> list[Message]:
        """Return the messages."""
        system = SEPARATOR.join(self._system)
        front: list[Message] = [{"role": "system", "content": system}] if system else []
        return [*front, *self._messages]

    def _last(self, role: str) -> dict[str, Any]:
        """Return the last message if it has this role, else a new one."""
        if not self._messages or self._messages[-1]["role"] != role:
            self._messages.append({"role": role, "content": ""})
        return self._messages[-1]


def _join(message: dict[str, Any], field: str, text: str) -> None:
    """Add text to a field of a message."""
    before = message.get(field, "")
    message[field] = SEPARATOR.join(filter(None, (before, text)))


def called_names(messages: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the names of the functions that were called, by the calls' ids."""
    return {
        call["id"]: call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls", ())
        if "id" in call
    }
