"""Responses: the requests of OpenAI's API of that name, which Codex speaks."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    model_validator,
)

from promptcache.printable import printable
from promptcache.server.api import ignored
from promptcache.server.api.choices import sampling_of
from promptcache.server.api.content import Arguments, Conversation, Texts, name_of
from promptcache.server.api.fields import (
    DEFAULT_MODEL,
    MAX_MESSAGES,
    MAX_TOOLS,
    Body,
    MaxTokens,
    Name,
    NumLogprobs,
    Object,
    Off,
    Part,
    Probability,
    Temperature,
    refused,
)
from promptcache.server.api.tools import (
    AUTO,
    CHOICE_SCHEMA,
    NO_PARAMETERS,
    ToolChoice,
    check_choice,
    format_schema,
    function_of,
    parse_choice,
)
from promptcache.server.completion import Completion

# A message takes up to some items: what was thought, said, called and returned.
MAX_ITEMS = 4 * MAX_MESSAGES
LOGPROBS = "message.output_text.logprobs"


class MessageItem(Part):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Texts = Field(default=[])


class CallItem(Part):
    """A call of a function by the assistant."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Arguments = Field(default_factory=dict)


class ResultItem(Part):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Texts = Field(default=[])


class ReasoningItem(Part):
    """What the assistant thought; encrypted, it is of no use here."""

    type: Literal["reasoning"]
    content: Texts = Field(default=[])


_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def _check_type(item: Any) -> Any:
    """Refuse other types of items by their name."""
    if isinstance(item, dict) and _type_of(item) not in _ITEM_TYPES:
        kind = name_of(_type_of(item))
        raise refused(f"of type {kind} is not supported")
    return item


def _type_of(item: Any) -> Any:
    """Return the type of an item; messages need not tell it."""
    kind = item.get("type") if isinstance(item, dict) else None
    return "message" if kind is None else kind


Item = Annotated[
    Annotated[
        Annotated[MessageItem, Tag("<message>")]
        | Annotated[CallItem, Tag("<function_call>")]
        | Annotated[ResultItem, Tag("<function_call_output>")]
        | Annotated[ReasoningItem, Tag("<reasoning>")],
        Discriminator(lambda item: f"<{_type_of(item)}>"),
    ],
    BeforeValidator(_check_type),
]
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


def _parse_input(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class Tool(Part):
    """A tool; only functions are used."""

    type: str
    name: Name | None = None
    description: str | None = None
    parameters: Object = Field(default=NO_PARAMETERS)

    @model_validator(mode="after")
    def _function_has_a_name(self) -> Self:
        if self.is_function and self.name is None:
            raise refused("is missing", "name")
        return self

    @property
    def is_function(self) -> bool:
        """Whether it is a function that the client runs."""
        return self.type == "function"


class TextFormat(Part):
    """The format of an answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Object | None = Field(default=None, alias="schema")


class TextConfig(Part):
    """How the text of an answer looks."""

    format: TextFormat = TextFormat()


class ResponseRequest(Body):
    """A request for a response.

    `previous_response_id` and `store` are for whoever keeps responses; see `joined`.
    """

    ignored = ignored.RESPONSES

    model: Name = DEFAULT_MODEL
    input: Annotated[list[Item], BeforeValidator(_parse_input)] = Field(
        default=[], max_length=MAX_ITEMS
    )
    instructions: str | None = None
    previous_response_id: Name | None = None
    store: bool = True
    stream: bool = False
    background: Off = False
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: NumLogprobs | None = None
    include: list[str] = Field(default=[], max_length=MAX_TOOLS)
    tools: list[Tool] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: Annotated[ToolChoice, BeforeValidator(parse_choice), CHOICE_SCHEMA] = (
        AUTO
    )
    text: TextConfig = TextConfig()

    @model_validator(mode="after")
    def _has_what_is_chosen(self) -> Self:
        check_choice(self.tool_choice, [tool.name or "" for tool in self.functions])
        return self

    @property
    def functions(self) -> list[Tool]:
        """The tools that are used."""
        return [tool for tool in self.tools if tool.is_function]

    @property
    def left_out_tools(self) -> list[str]:
        """The types and names of the tools that are left out, for the log."""
        return [
            printable(f"{tool.type} {tool.name or ''}".rstrip())
            for tool in self.tools
            if not tool.is_function
        ]

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likely tokens to tell, None to tell no log-probabilities."""
        wanted = self.top_logprobs or 0
        return wanted if wanted or LOGPROBS in self.include else None


def completion_of(request: ResponseRequest) -> Completion:
    """Return what a request asks for, with what went before already joined to it."""
    wanted = request.text.format
    return Completion(
        model=request.model,
        messages=_conversation_of(request).messages(),
        tools=[
            function_of(tool.name or "", tool.description, tool.parameters)
            for tool in request.functions
        ],
        tool_choice=request.tool_choice.name,
        json_schema=format_schema(wanted.type, wanted.schema_),
        max_tokens=request.max_output_tokens,
        sampling=sampling_of(request),
        top_logprobs=request.wanted_logprobs,
    )


def _conversation_of(request: ResponseRequest) -> Conversation:
    conversation = Conversation()
    conversation.add_system([request.instructions or ""])
    for item in request.input:
        _add(conversation, item)
    if not conversation.has_begun:
        # Codex probes with nothing, and templates do not take nothing.
        conversation.add_user([])
    return conversation


def _add(conversation: Conversation, item: Item) -> None:
    match item:
        case MessageItem(role="user"):
            conversation.add_user(item.content)
        case MessageItem(role="assistant"):
            conversation.add_answer("".join(item.content))
        case MessageItem():
            conversation.add_system(item.content)
        case CallItem():
            conversation.add_call(item.call_id, item.name, item.arguments)
        case ResultItem():
            conversation.add_result(item.call_id, "".join(item.output))
        case ReasoningItem():
            conversation.add_reasoning("".join(item.content))


def conversation_items(
    request: ResponseRequest, response: Mapping[str, Any]
) -> list[Object]:
    """Return the items of a conversation so far, to keep as JSON.

    Args:
        request: The request, with what went before joined to it.
        response: The whole response to it.
    """
    asked = [item.model_dump(exclude_none=True) for item in request.input]
    return [*asked, *response["output"]]


def joined(request: ResponseRequest, items: Sequence[Object]) -> ResponseRequest:
    """Return a request whose input begins with the items of an earlier conversation.

    Instructions are not part of it: they are the request's own.
    """
    earlier = _ITEMS.validate_python([*items])
    return request.model_copy(update={"input": [*earlier, *request.input]})
