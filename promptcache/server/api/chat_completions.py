"""OpenAI's chat completions, with the further fields of mlx-lm's server."""

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from promptcache.prompts.chat import Message
from promptcache.server.api.fields import (
    MAX_ANSWERS,
    MAX_MESSAGES,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    BadRequestError,
    Bias,
    ContextSize,
    Name,
    Object,
    Part,
    Penalty,
    Probability,
    Seed,
    Stop,
    Temperature,
    Text,
    TokenCount,
    arguments_of,
    bias_of,
    stops_of,
    template_arguments,
)
from promptcache.server.completion import (
    AnswerEnd,
    Completion,
    Event,
    Finished,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCall,
    Usage,
)

# By the names of the API, those of sampling.
SAMPLING_NAMES = {
    "temperature": "temp",
    **{name: name for name in ("top_p", "top_k", "min_p", "seed")},
    **{name: name for name in ("xtc_probability", "xtc_threshold")},
    **{
        f"{kind}_{what}": f"{kind}_{what}"
        for kind in ("repetition", "presence", "frequency")
        for what in ("penalty", "context_size")
    },
    "num_draft_tokens": "num_draft_tokens",
}


class TextPart(Part):
    """A part of a message's text."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: Text = ""
    refusal: Text = ""
    # Anthropic's, which some clients send to every server.
    cache_control: Object | None = None


class Function(Part):
    """A call of a function, in a message of the assistant's."""

    name: Name
    arguments: Text | Object = ""


class Call(Part):
    """A call of a tool, in a message of the assistant's."""

    id: Text = ""
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


class ChatMessage(Part):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: Text | None = None
    # What servers answered, and clients send back.
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    annotations: list[Object] | None = None

    def message(self) -> Message:
        """Return it in the form that chat templates take."""
        content: Any = self.content if self.content is not None else ""
        if not isinstance(content, str):
            texts = [part.text or part.refusal for part in content]
            content = [{"type": "text", "text": text} for text in texts]
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        thought = self.reasoning or self.reasoning_content
        if thought is not None:
            message["reasoning_content"] = thought
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [_call(call) for call in self.tool_calls]
        return message


def _call(call: Call) -> dict[str, Any]:
    given = call.function.arguments
    arguments = arguments_of(given) if isinstance(given, str) else given
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


class FunctionDefinition(Part):
    """A function that may be called."""

    name: Name
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Part):
    """A tool that may be called."""

    type: Literal["function"]
    function: FunctionDefinition
    cache_control: Object | None = None


class NamedFunction(Part):
    """The name of a function."""

    name: Name


class NamedTool(Part):
    """The tool to call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Part):
    """What the answer has to match."""

    name: Text = ""
    description: Text | None = None
    schema_: Object = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Part):
    """What a stream tells besides."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class SamplingFields(Part):
    """How to choose tokens, in chat and in text completions."""

    model: Text = "default_model"
    max_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: ContextSize | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0, le=100)] | None = None
    repetition_context_size: ContextSize | None = None
    presence_penalty: Penalty | None = None
    presence_context_size: ContextSize | None = None
    frequency_penalty: Penalty | None = None
    frequency_context_size: ContextSize | None = None
    xtc_probability: Probability | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    logit_bias: Bias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    adapters: Text | None = None
    draft_model: Text | None = None
    num_draft_tokens: Annotated[int, Field(ge=0, le=64)] | None = None
    # What known clients send, and can do without.
    user: Text | None = None
    metadata: Object | None = None
    service_tier: Text | None = None
    store: bool | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None

    def common(self) -> dict[str, Any]:
        """Return the fields of a `Completion` that chat and text have in common."""
        sampling = {new: getattr(self, old) for old, new in SAMPLING_NAMES.items()}
        return {
            "model": self.model,
            "stop": stops_of(self.stop),
            "sampling": {name: v for name, v in sampling.items() if v is not None},
            "logit_bias": bias_of(self.logit_bias),
            "num_answers": self.n,
            "adapter": self.adapters,
            "draft_model": self.draft_model,
        }


class ChatRequest(SamplingFields):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=-1, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: Object | None = None
    reasoning_effort: Text | None = None
    verbosity: Text | None = None
    modalities: list[Literal["text"]] | None = None

    def completion(self) -> Completion:
        """Return what is asked for. Raises BadRequestError."""
        choice = self.tool_choice
        name = choice if isinstance(choice, str) else choice.function.name
        tools = [
            tool.model_dump(exclude_none=True, exclude={"cache_control"})
            for tool in self.tools or ()
        ]
        arguments = template_arguments(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            arguments.setdefault("reasoning_effort", self.reasoning_effort)
        top = max(self.top_logprobs or 0, 0)
        return Completion(
            messages=[message.message() for message in self.messages],
            tools=tools,
            tool_choice=name,
            json_schema=_schema(self.response_format),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            top_logprobs=top if self.logprobs or top else None,
            chat_template_config=arguments,
            **self.common(),
        )


def _schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {}
    if form.json_schema is None:
        raise BadRequestError("response_format has no json_schema", "response_format")
    return form.json_schema.schema_


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return how many tokens were used."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


class ChatAnswer:
    """Answers a chat completion."""

    def __init__(self, request: ChatRequest) -> None:
        self._request = request
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4()}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._num_calls: dict[int, int] = defaultdict(int)

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a stream for an event."""
        match event:
            case Started():
                for index in range(self._request.n):
                    yield self._chunk(index, {"role": "assistant", "content": ""})
            case TextDelta(text, index, logprobs):
                yield self._chunk(index, {"content": text}, logprobs)
            case ReasoningDelta(text, index, logprobs):
                yield self._chunk(index, {"reasoning": text}, logprobs)
            case ToolCall():
                number = self._num_calls[event.index]
                self._num_calls[event.index] += 1
                call = {"index": number, **call_json(event)}
                yield self._chunk(event.index, {"tool_calls": [call]})
            case AnswerEnd(reason, _, index):
                yield self._chunk(index, {}, reason=reason)
            case Finished(usage) if self._has_usage:
                told = {"choices": [], "usage": usage_json(usage)}
                yield {**self._common, "object": "chat.completion.chunk", **told}

    @property
    def _has_usage(self) -> bool:
        options = self._request.stream_options
        return options is not None and options.include_usage

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
        reason: str | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "finish_reason": reason,
        }
        if logprobs:
            choice["logprobs"] = {"content": [*map(logprob_json, logprobs)]}
        chunk: dict[str, Any] = {
            **self._common,
            "object": "chat.completion.chunk",
            "choices": [choice],
        }
        return {**chunk, "usage": None} if self._has_usage else chunk

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [_choice(index, events) for index in range(self._request.n)]
        [usage] = [event.usage for event in events if isinstance(event, Finished)]
        told = {"choices": choices, "usage": usage_json(usage)}
        return {**self._common, "object": "chat.completion", **told}


def _choice(index: int, events: Sequence[Event]) -> dict[str, Any]:
    """Return one of the answers."""
    text, thought, reason = "", "", "stop"
    calls: list[dict[str, Any]] = []
    logprobs: list[TokenLogprob] = []
    for event in events:
        if getattr(event, "index", None) != index:
            continue
        match event:
            case TextDelta(more, _, told):
                text += more
                logprobs += told
            case ReasoningDelta(more, _, told):
                thought += more
                logprobs += told
            case ToolCall():
                calls.append(call_json(event))
            case AnswerEnd(why, _, _):
                reason = why
    content = None if calls and not text else text
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thought:
        message["reasoning"] = thought
    if calls:
        message["tool_calls"] = calls
    told_logprobs = {"content": [*map(logprob_json, logprobs)]} if logprobs else None
    return {
        "index": index,
        "message": message,
        "logprobs": told_logprobs,
        "finish_reason": reason,
    }


def call_json(call: ToolCall) -> dict[str, Any]:
    """Return a call of a tool."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def logprob_json(told: TokenLogprob) -> dict[str, Any]:
    """Return a token with its log-probability."""
    top = [_plain_logprob(other) for other in told.top]
    return {**_plain_logprob(told), "top_logprobs": top}


def _plain_logprob(told: TokenLogprob) -> dict[str, Any]:
    return {"token": told.token, "logprob": told.logprob, "bytes": [*told.data]}
