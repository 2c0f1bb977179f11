"""Tools: functions that a model may call, and which of them it has to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, WithJsonSchema

from promptcache.prompts.chat import Message
from promptcache.server.api.content import name_of
from promptcache.server.api.fields import Name, Object, Part, refused

NO_PARAMETERS = {"type": "object", "properties": {}}
# What a `Completion` says in place of a function's name.
CHOICES = ("auto", "none", "required")


class Function(Part):
    """A function that a model may call."""

    name: Name
    description: str | None = None
    parameters: Object = Field(default=NO_PARAMETERS)


def function_of(name: str, description: str | None, parameters: Object) -> Message:
    """Return a function in the form that chat templates take."""
    told = {} if description is None else {"description": description}
    function = {"name": name, **told, "parameters": parameters}
    return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which function a model has to call.

    Attributes:
        name: "auto", "none", "required", or the name of a function.
        is_named: Whether it is a function's.
    """

    name: str
    is_named: bool = False


AUTO = ToolChoice("auto")


def parse_choice(value: Any) -> ToolChoice:
    """Return the choice in the form of the Responses API: a word, or a flat object."""
    if isinstance(value, dict):
        _check_kind(value)
        return _named(value)
    return _word(value)


def parse_nested_choice(value: Any) -> ToolChoice:
    """Return the choice in the form of chat completions: a word, or a nested object."""
    if isinstance(value, dict):
        _check_kind(value)
        function = value.get("function")
        return _named(function if isinstance(function, dict) else {}, "function")
    return _word(value)


def _check_kind(value: Object) -> None:
    if value.get("type") != "function":
        kind = name_of(value.get("type"))
        raise refused(f"of type {kind} is not supported, only function")


def _named(value: Object, *where: str) -> ToolChoice:
    name = value.get("name")
    if not isinstance(name, str):
        raise refused("must be the name of a function", *where, "name")
    if name in CHOICES:
        raise refused(f"cannot name a function {name}")
    return ToolChoice(name, is_named=True)


def _word(value: Any) -> ToolChoice:
    if value not in CHOICES:
        raise refused("must be auto, none, required or an object")
    return ToolChoice(value)


def check_choice(choice: ToolChoice, names: Sequence[str]) -> None:
    """Raise if the tools do not have what has to be called."""
    if choice.is_named and choice.name not in names:
        name = name_of(choice.name)
        raise refused(f"names {name}, which is not among the tools", "tool_choice")
    if choice.name == "required" and not names:
        raise refused("asks for a call, but there are no tools", "tool_choice")


def format_schema(kind: str, schema: Object | None) -> Any:
    """Return what an answer has to match: None for text, {} for any JSON object."""
    return None if kind == "text" else schema or {}


CHOICE_SCHEMA = WithJsonSchema({"anyOf": [{"enum": [*CHOICES]}, {"type": "object"}]})
