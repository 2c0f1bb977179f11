"""Chat completions: OpenAI's API of that name, with mlx-lm's own fields."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from promptcache.prompts.chat import Message
from promptcache.server.api import ignored
from promptcache.server.api.choices import (
    ChoicesAnswer,
    ChoicesRequest,
    sampling_of,
)
from promptcache.server.api.content import (
    Arguments,
    Texts,
    call_of,
    called_names,
    reasoning_of,
)
from promptcache.server.api.fields import (
    MAX_MESSAGES,
    MAX_TOOLS,
    MaxTokens,
    Name,
    NumLogprobs,
    Object,
    Part,
    TemplateConfig,
    refused,
)
from promptcache.server.api.logprobs import chat_logprobs
from promptcache.server.api.tools import (
    AUTO,
    CHOICE_SCHEMA,
    Function,
    ToolChoice,
    check_choice,
    format_schema,
    function_of,
    parse_nested_choice,
)
from promptcache.server.completion import (
    AnswerEnd,
    Completion,
    Event,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCall,
)


class CalledFunction(Part):
    """The function that was called, with what."""

    name: Name
    arguments: Arguments = Field(default_factory=dict)


class Call(Part):
    """A call in a message of the assistant."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Part):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Texts = Field(default=[])
    name: Name | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] = Field(default=[])
    tool_call_id: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_audio_and_old_calls(cls, values: Any) -> Any:
        for name in ("audio", "function_call"):
            if isinstance(values, dict) and values.get(name) is not None:
                raise refused("is not supported", name)
        return values


class Tool(Part):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: Function


class JsonSchema(Part):
    """What an answer has to match."""

    name: str | None = None
    schema_: Object | None = Field(default=None, alias="schema")


class ResponseFormat(Part):
    """The format of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise refused("is missing", "json_schema")
        return self


class ChatRequest(ChoicesRequest):
    """A request for a chat completion."""

    ignored = ignored.CHAT

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: NumLogprobs | None = None
    tools: list[Tool] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: Annotated[
        ToolChoice, BeforeValidator(parse_nested_choice), CHOICE_SCHEMA
    ] = AUTO
    response_format: ResponseFormat | None = None
    reasoning_effort: Name | None = None
    chat_template_kwargs: TemplateConfig = Field(default={})
    modalities: list[Literal["text"]] = Field(default=[])

    @model_validator(mode="after")
    def _has_what_is_chosen(self) -> Self:
        check_choice(self.tool_choice, [tool.function.name for tool in self.tools])
        return self


def completion_of(request: ChatRequest) -> Completion:
    """Return what a request asks for."""
    wanted = request.response_format
    schema = wanted.json_schema.schema_ if wanted and wanted.json_schema else None
    return Completion(
        model=request.model,
        messages=_messages_of(request.messages),
        tools=[
            function_of(f.name, f.description, f.parameters)
            for f in (tool.function for tool in request.tools)
        ],
        tool_choice=request.tool_choice.name,
        json_schema=format_schema(wanted.type, schema) if wanted else None,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        stop=request.stop,
        sampling=sampling_of(request),
        logit_bias=request.logit_bias,
        top_logprobs=_top_logprobs_of(request),
        num_answers=request.n,
        chat_template_config=_template_config_of(request),
        adapter=request.adapters,
        draft_model=request.named_draft_model,
        num_draft_tokens=request.num_draft_tokens,
    )


def _top_logprobs_of(request: ChatRequest) -> int | None:
    """As in mlx-lm's server, to ask for the likeliest tokens is enough."""
    wanted = request.top_logprobs or 0
    return wanted if request.logprobs or wanted else None


def _template_config_of(request: ChatRequest) -> Object:
    """Return arguments of the template; gpt-oss's has one for the effort."""
    effort = request.reasoning_effort
    told = {} if effort is None else {"reasoning_effort": effort}
    return {**told, **request.chat_template_kwargs}


def _messages_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return messages in the form that chat templates take."""
    plain = [_message_of(message) for message in messages]
    names = called_names(plain)
    return [
        {**message, "name": names[message["tool_call_id"]]}
        if "name" not in message and message.get("tool_call_id") in names
        else message
        for message in plain
    ]


def _message_of(message: ChatMessage) -> Message:
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": "".join(message.content)}
    if message.name is not None:
        plain["name"] = message.name
    if role == "assistant":
        plain |= reasoning_of(message.reasoning or message.reasoning_content or "")
        if message.tool_calls:
            plain["tool_calls"] = [
                call_of(call.id, call.function.name, call.function.arguments)
                for call in message.tool_calls
            ]
    elif role == "tool" and message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


@dataclass(slots=True)
class _Choice:
    """One of the answers.

    Attributes:
        pending: Log-probabilities that no chunk has told.
    """

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    pending: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    has_begun: bool = False


class ChatAnswer(ChoicesAnswer):
    """The answer to a request for a chat completion, in OpenAI's form.

    As in mlx-lm's server, what the model thinks is `reasoning` beside the content.
    """

    id_prefix = "chatcmpl"
    object_type = "chat.completion"
    chunk_type = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, **options: Any) -> None:
        super().__init__(request, **options)
        self._answers = [_Choice() for _ in range(request.n)]
        self._tells_logprobs = _top_logprobs_of(request) is not None

    def _chunks(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, Started):
            return self._begin()
        if not isinstance(event, TextDelta | ReasoningDelta | ToolCall | AnswerEnd):
            return []
        answer = self._answers[event.index]
        if isinstance(event, TextDelta | ReasoningDelta):
            answer.logprobs += event.logprobs
            answer.pending += event.logprobs
        delta = _delta_of(answer, event)
        if isinstance(event, AnswerEnd):
            answer.finish_reason = event.reason
        elif not delta:
            # Clients break on deltas with nothing in them.
            return []
        if not answer.has_begun:
            answer.has_begun = True
            delta = {"role": "assistant", **delta}
        told, answer.pending = answer.pending, []
        return [self._choice(event.index, "delta", delta, told)]

    def _begin(self) -> list[dict[str, Any]]:
        """Begin several answers in their order, as the client of OpenAI needs it."""
        if len(self._answers) == 1:
            return []
        for answer in self._answers:
            answer.has_begun = True
        delta = {"role": "assistant"}
        return [self._choice(i, "delta", delta, []) for i in range(len(self._answers))]

    def _choices(self) -> list[dict[str, Any]]:
        return [
            self._choice(index, "message", _message(answer), answer.logprobs)
            for index, answer in enumerate(self._answers)
        ]

    def _choice(
        self, index: int, key: str, value: Message, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        told = self._tells_logprobs and (logprobs or key == "message")
        return {
            "index": index,
            key: value,
            "logprobs": {"content": chat_logprobs(logprobs), "refusal": None}
            if told
            else None,
            "finish_reason": self._answers[index].finish_reason,
        }


def _delta_of(answer: _Choice, event: Event) -> dict[str, Any]:
    """Add an event to an answer, and return what it adds to the message."""
    match event:
        case TextDelta(text) if text:
            answer.text.append(text)
            return {"content": text}
        case ReasoningDelta(text) if text:
            answer.reasoning.append(text)
            return {"reasoning": text}
        case ToolCall():
            call = {
                "id": event.id,
                "type": "function",
                "function": {"name": event.name, "arguments": event.arguments},
            }
            answer.calls.append(call)
            return {"tool_calls": [{"index": len(answer.calls) - 1, **call}]}
    return {}


def _message(answer: _Choice) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(answer.text) or None,
    }
    if answer.reasoning:
        message["reasoning"] = "".join(answer.reasoning)
    if answer.calls:
        message["tool_calls"] = answer.calls
    return message
