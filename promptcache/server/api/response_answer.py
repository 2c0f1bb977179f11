"""The answers of OpenAI's Responses API: a response, whole or streamed."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from promptcache.server.api.errors import ApiError, response_error
from promptcache.server.api.logprobs import chat_logprobs
from promptcache.server.api.responses import ResponseRequest, TextFormat, Tool
from promptcache.server.api.sse import keepalive, sse_message
from promptcache.server.completion import (
    AnswerEnd,
    Event,
    Finished,
    Progress,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCall,
    Usage,
)


class _Kind(NamedTuple):
    """A kind of items that have text.

    Attributes:
        type: Its type.
        id_prefix: What its ids begin with.
        part: The type of its only part, and in the names of events about it.
    """

    type: str
    id_prefix: str
    part: str


_MESSAGE = _Kind("message", "msg", "output_text")
_REASONING = _Kind("reasoning", "rs", "reasoning_text")


class ResponseAnswer:
    """A response that is being given.

    Args:
        request: What is answered.
        model: The name of the model to tell, the request's by default.
        response_id: What identifies the response, a new one by default.
        created: When it began, in seconds since 1970, now by default.
    """

    def __init__(
        self,
        request: ResponseRequest,
        *,
        model: str | None = None,
        response_id: str | None = None,
        created: int | None = None,
    ) -> None:
        self.id = response_id or f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time()) if created is None else created
        self._told = _told_of(request, model or request.model)
        self._tells_logprobs = request.wanted_logprobs is not None
        self._output: list[dict[str, Any]] = []
        self._open: _OpenItem | None = None
        self._pending: list[TokenLogprob] = []
        self._num_messages = 0
        self._is_cut = False
        self._usage: Usage | None = None

    def begin(self) -> list[bytes]:
        """Return the messages before all others; the first event brings them, too."""
        if self._num_messages:
            return []
        return [
            self._message("response.created", response=self._body("in_progress")),
            self._message("response.in_progress", response=self._body("in_progress")),
        ]

    def encode(self, event: Event) -> list[bytes]:
        """Return the messages that tell of an event."""
        return [*self.begin(), *self._encode(event)]

    def encode_error(self, error: ApiError) -> list[bytes]:
        """Return the messages that end a stream with an error."""
        body = {**self._body("failed"), "error": response_error(error)}
        return [*self.begin(), self._message("response.failed", response=body)]

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the response of all its events."""
        for event in events:
            self.encode(event)
        return self._body(self._last_status)

    @property
    def _last_status(self) -> str:
        return "incomplete" if self._is_cut else "completed"

    def _encode(self, event: Event) -> list[bytes]:
        match event:
            case Progress(done, total):
                # Codex counts the seconds between events, and comments are none.
                body = self._body("in_progress")
                again = self._message("response.in_progress", response=body)
                return [keepalive(done, total), again]
            case TextDelta():
                return self._add_text(event)
            case ReasoningDelta(text):
                return self._add(_REASONING, text, []) if text else []
            case ToolCall():
                return [*self._close(), *self._add_call(event)]
            case AnswerEnd(reason):
                self._is_cut = reason == "length"
                return self._close(self._last_status)
            case Finished(usage):
                self._usage = usage
                status = self._last_status
                body = self._body(status)
                return [self._message(f"response.{status}", response=body)]
            case Started():
                return []

    def _add_text(self, event: TextDelta) -> list[bytes]:
        if self._tells_logprobs:
            self._pending += event.logprobs
        if not event.text:
            return []
        told, self._pending = self._pending, []
        return self._add(_MESSAGE, event.text, told)

    def _add(
        self, kind: _Kind, text: str, logprobs: Sequence[TokenLogprob]
    ) -> list[bytes]:
        """Add text to the open item of a kind, after opening one if need be."""
        opened: list[bytes] = []
        if self._open is None or self._open.kind != kind:
            opened = [*self._close(), *self._begin_item(kind)]
        assert self._open is not None
        self._open.text.append(text)
        self._open.logprobs += logprobs
        more: dict[str, Any] = {"delta": text}
        if kind == _MESSAGE:
            more["logprobs"] = _without_bytes(chat_logprobs(logprobs))
        return [*opened, self._part_message(f"response.{kind.part}.delta", **more)]

    def _begin_item(self, kind: _Kind) -> list[bytes]:
        self._open = _OpenItem(kind, self._item_id(kind.id_prefix))
        item = self._open.item("in_progress")
        return [
            self._item_message("response.output_item.added", item),
            self._part_message("response.content_part.added", part=self._open.part()),
        ]

    def _close(self, status: str = "completed") -> list[bytes]:
        """Return the messages that end the open item, if there is one."""
        if self._open is None:
            self._pending.clear()
            return []
        # Tokens without text of their own belong to the text before them.
        self._open.logprobs += self._pending
        self._pending.clear()
        self._open.parts = [self._open.part(is_done=True)]
        (part,) = self._open.parts
        more: dict[str, Any] = {"text": part["text"]}
        if self._open.kind == _MESSAGE:
            more["logprobs"] = _without_bytes(part["logprobs"])
        item = self._open.item(status)
        messages = [
            self._part_message(f"response.{self._open.kind.part}.done", **more),
            self._part_message("response.content_part.done", part=part),
            self._item_message("response.output_item.done", item),
        ]
        self._open = None
        self._output.append(item)
        return messages

    def _add_call(self, call: ToolCall) -> list[bytes]:
        item = {
            "id": self._item_id("fc"),
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }
        place = {"item_id": item["id"], "output_index": len(self._output)}
        begun = {**item, "status": "in_progress", "arguments": ""}
        name = "response.function_call_arguments"
        messages = [self._item_message("response.output_item.added", begun)]
        if call.arguments:
            delta = self._message(f"{name}.delta", **place, delta=call.arguments)
            messages.append(delta)
        messages += [
            self._message(f"{name}.done", **place, arguments=call.arguments),
            self._item_message("response.output_item.done", item),
        ]
        self._output.append(item)
        return messages

    def _item_id(self, prefix: str) -> str:
        own = self.id.removeprefix("resp_")
        return f"{prefix}_{own}{len(self._output):04}"

    def _item_message(self, kind: str, item: dict[str, Any]) -> bytes:
        return self._message(kind, output_index=len(self._output), item=item)

    def _part_message(self, kind: str, **fields: Any) -> bytes:
        assert self._open is not None
        place = {"item_id": self._open.id, "output_index": len(self._output)}
        return self._message(kind, **place, content_index=0, **fields)

    def _message(self, kind: str, **fields: Any) -> bytes:
        number, self._num_messages = self._num_messages, self._num_messages + 1
        return sse_message({"type": kind, "sequence_number": number, **fields}, kind)

    def _body(self, status: str) -> dict[str, Any]:
        is_cut = status == "incomplete"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [*self._output],
            "usage": None if self._usage is None else _usage(self._usage),
            **self._told,
        }


class _OpenItem:
    """An item that more text is added to."""

    def __init__(self, kind: _Kind, item_id: str) -> None:
        self.kind = kind
        self.id = item_id
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.parts: list[dict[str, Any]] = []

    def part(self, *, is_done: bool = False) -> dict[str, Any]:
        """Return the item's only part, empty until it is done."""
        text = "".join(self.text) if is_done else ""
        part: dict[str, Any] = {"type": self.kind.part, "text": text}
        if self.kind == _MESSAGE:
            part["annotations"] = []
            part["logprobs"] = chat_logprobs(self.logprobs) if is_done else []
        return part

    def item(self, status: str) -> dict[str, Any]:
        """Return the item."""
        item = {"id": self.id, "type": self.kind.type, "status": status}
        if self.kind == _MESSAGE:
            return {**item, "role": "assistant", "content": [*self.parts]}
        return {**item, "summary": [], "content": [*self.parts]}


def _without_bytes(logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return log-probabilities as events have them, unlike items."""
    return [
        {
            "token": entry["token"],
            "logprob": entry["logprob"],
            **(
                {"top_logprobs": _without_bytes(entry["top_logprobs"])}
                if "top_logprobs" in entry
                else {}
            ),
        }
        for entry in logprobs
    ]


def _told_of(request: ResponseRequest, model: str) -> dict[str, Any]:
    """Return what a response tells of its request."""
    choice: Any = request.tool_choice.name
    if request.tool_choice.is_named:
        choice = {"type": "function", "name": choice}
    return {
        "model": model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": request.previous_response_id,
        "temperature": request.temperature,
        "text": {"format": _format(request.text.format)},
        "tool_choice": choice,
        "tools": [_tool(tool) for tool in request.functions],
        "top_p": request.top_p,
        "truncation": "disabled",
    }


def _format(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    name, schema = wanted.name or "answer", wanted.schema_ or {}
    return {"type": wanted.type, "name": name, "schema": schema}


def _tool(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": False,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
