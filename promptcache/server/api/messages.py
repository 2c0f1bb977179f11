"""Messages: the requests of Anthropic's API of that name, which Claude Code speaks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from promptcache.printable import printable
from promptcache.server.api import ignored
from promptcache.server.api.choices import sampling_of
from promptcache.server.api.content import (
    Conversation,
    Texts,
    name_of,
)
from promptcache.server.api.fields import (
    DEFAULT_MODEL,
    MAX_MESSAGES,
    MAX_TOOLS,
    Body,
    MaxTokens,
    Name,
    NoItems,
    Object,
    Part,
    Probability,
    Stop,
    Temperature,
    TopK,
    refused,
)
from promptcache.server.api.tools import (
    CHOICES,
    NO_PARAMETERS,
    ToolChoice,
    check_choice,
    format_schema,
    function_of,
)
from promptcache.server.completion import Completion

# Claude Code puts a text at the front that is another one with every request, so that
# no prompt would ever begin as an earlier one.
BILLING_HEADER = "x-anthropic-billing-header:"


class TextBlock(Part):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Part):
    """What the assistant thought; redacted, it is of no use here."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""


class ToolUseBlock(Part):
    """A call of a tool by the assistant."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: Object = Field(default_factory=dict)


class ToolResultBlock(Part):
    """What a call returned."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: Texts = Field(default=[])


_BLOCK_TAGS = {
    "text": "<text>",
    "thinking": "<thinking>",
    "redacted_thinking": "<thinking>",
    "tool_use": "<tool_use>",
    "tool_result": "<tool_result>",
}


def _check_type(block: Any) -> Any:
    """Refuse other types of blocks by their name."""
    if not isinstance(block, dict):
        raise refused("must be an object")
    if _tag_of(block) is None:
        raise refused(f"of type {name_of(block.get('type'))} is not supported")
    return block


def _tag_of(block: Any) -> str | None:
    """Return the tag of the model for a block, None if there is none."""
    kind = block.get("type")
    return _BLOCK_TAGS.get(kind) if isinstance(kind, str) else None


Block = Annotated[
    Annotated[
        Annotated[TextBlock, Tag("<text>")]
        | Annotated[ThinkingBlock, Tag("<thinking>")]
        | Annotated[ToolUseBlock, Tag("<tool_use>")]
        | Annotated[ToolResultBlock, Tag("<tool_result>")],
        Discriminator(_tag_of),
    ],
    BeforeValidator(_check_type),
]


def _parse_content(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class InputMessage(Part):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_parse_content)]


class Tool(Part):
    """A tool; only what the client describes itself is used."""

    type: str = "custom"
    name: Name | None = None
    description: str | None = None
    input_schema: Object = Field(default=NO_PARAMETERS)

    @model_validator(mode="after")
    def _custom_one_has_a_name(self) -> Self:
        if self.is_custom and self.name is None:
            raise refused("is missing", "name")
        return self

    @property
    def is_custom(self) -> bool:
        """Whether the client describes and runs it."""
        return self.type == "custom"


def _parse_choice(value: Any) -> ToolChoice:
    """Return the choice in the words of a `Completion`."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "any":
        return ToolChoice("required")
    if kind in ("auto", "none"):
        return ToolChoice(kind)
    if kind != "tool":
        raise refused("must be an object of type auto, any, tool or none")
    name = value.get("name")
    if not isinstance(name, str):
        raise refused("must be the name of a tool", "name")
    if name in CHOICES:
        raise refused(f"cannot name a tool {name}")
    return ToolChoice(name, is_named=True)


class OutputFormat(Part):
    """What an answer has to match."""

    type: Literal["json_schema"]
    schema_: Object = Field(alias="schema")


class OutputConfig(Part):
    """How to answer; an effort is not used."""

    format: OutputFormat | None = None


class TokenCountRequest(Body):
    """A request for the number of tokens of a prompt."""

    ignored = ignored.MESSAGES

    model: Name = DEFAULT_MODEL
    messages: list[InputMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Texts = Field(default=[])
    tools: list[Tool] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: Annotated[
        ToolChoice,
        BeforeValidator(_parse_choice),
        WithJsonSchema({"type": "object"}),
    ] = ToolChoice("auto")
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None
    mcp_servers: NoItems = Field(default=[])

    @model_validator(mode="after")
    def _has_what_is_chosen(self) -> Self:
        check_choice(self.tool_choice, [tool.name or "" for tool in self.used_tools])
        return self

    @property
    def used_tools(self) -> list[Tool]:
        """The tools that are used."""
        return [tool for tool in self.tools if tool.is_custom]

    @property
    def left_out_tools(self) -> list[str]:
        """The types and names of the tools that are left out, for the log."""
        return [
            printable(f"{tool.type} {tool.name or ''}".rstrip())
            for tool in self.tools
            if not tool.is_custom
        ]


class MessageRequest(TokenCountRequest):
    """A request for a message."""

    max_tokens: MaxTokens
    stream: bool = False
    stop_sequences: Stop = Field(default=[])
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None


def completion_of(
    request: TokenCountRequest, *, drop_billing_header: bool = True
) -> Completion:
    """Return what a request asks for.

    Args:
        request: The request.
        drop_billing_header: Leave out system blocks that begin with the header that
            Claude Code changes with every request.
    """
    wanted = request.output_config.format or request.output_format
    completion = Completion(
        model=request.model,
        messages=_conversation_of(request, drop_billing_header).messages(),
        tools=[
            function_of(tool.name or "", tool.description, tool.input_schema)
            for tool in request.used_tools
        ],
        tool_choice=request.tool_choice.name,
        json_schema=format_schema(wanted.type, wanted.schema_) if wanted else None,
    )
    if not isinstance(request, MessageRequest):
        return completion
    return replace(
        completion,
        max_tokens=request.max_tokens,
        stop=request.stop_sequences,
        sampling=sampling_of(request),
    )


def _conversation_of(
    request: TokenCountRequest, drop_billing_header: bool
) -> Conversation:
    conversation = Conversation()
    conversation.add_system(
        text
        for text in request.system
        if not (drop_billing_header and text.startswith(BILLING_HEADER))
    )
    for message in request.messages:
        _add(conversation, message)
    return conversation


def _add(conversation: Conversation, message: InputMessage) -> None:
    if message.role == "system" and not conversation.has_begun:
        conversation.add_system(_texts_in(message.content))
    elif message.role == "assistant":
        _add_answer(conversation, message.content)
    else:
        _add_user(conversation, message.content)


def _texts_in(blocks: Sequence[Block]) -> list[str]:
    return [block.text for block in blocks if isinstance(block, TextBlock)]


def _add_answer(conversation: Conversation, blocks: Sequence[Block]) -> None:
    for block in blocks:
        if isinstance(block, ThinkingBlock):
            conversation.add_reasoning(block.thinking)
        elif isinstance(block, ToolUseBlock):
            conversation.add_call(block.id, block.name, block.input)
    conversation.add_answer("".join(_texts_in(blocks)))


def _add_user(conversation: Conversation, blocks: Sequence[Block]) -> None:
    """Add what the user says; also system text in the middle of a conversation."""
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            conversation.add_result(block.tool_use_id, "\n".join(block.content))
        elif isinstance(block, TextBlock):
            conversation.add_user([block.text])
    if not blocks:
        conversation.add_user([])


def token_count(num_tokens: int) -> dict[str, Any]:
    """Return the answer to a request for the number of tokens."""
    return {"input_tokens": num_tokens}
