"""The answers of Anthropic's Messages API: a message, whole or streamed."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from promptcache.server.api.content import object_in
from promptcache.server.api.errors import ApiError, anthropic_error
from promptcache.server.api.messages import MessageRequest
from promptcache.server.api.sse import sse_message
from promptcache.server.completion import (
    AnswerEnd,
    Event,
    Finished,
    FinishReason,
    Progress,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCall,
    Usage,
)

# Clients send it back, and some take an empty one for damage; nobody checks it here.
SIGNATURE = "unsigned"
_STOP_REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
}


class MessageAnswer:
    """A message that is being given.

    Args:
        request: What is answered.
        model: The name of the model to tell, the request's by default.
        message_id: What identifies the message, a new one by default.
    """

    def __init__(
        self,
        request: MessageRequest,
        *,
        model: str | None = None,
        message_id: str | None = None,
    ) -> None:
        self._told = {
            "id": message_id or f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model or request.model,
        }
        self._content: list[dict[str, Any]] = []
        self._is_open = False
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._usage = Usage(0)

    def encode(self, event: Event) -> list[bytes]:
        """Return the messages that tell of an event."""
        match event:
            case Progress():
                return [_message("ping")]
            case Started(usage):
                self._usage = usage
                return [_message("message_start", message=self._body())]
            case TextDelta(text):
                return self._add("text", text) if text else []
            case ReasoningDelta(text):
                return self._add("thinking", text) if text else []
            case ToolCall():
                return self._add_call(event)
            case AnswerEnd(reason, stop):
                self._stop = _stop_of(reason, stop)
                return self._close()
            case Finished(usage):
                self._usage = usage
                told = {"delta": self._stop, "usage": _usage(usage)}
                return [_message("message_delta", **told), _message("message_stop")]

    def encode_error(self, error: ApiError) -> list[bytes]:
        """Return the messages that end a stream with an error."""
        return [sse_message(anthropic_error(error), "error")]

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the message of all its events."""
        for event in events:
            self.encode(event)
        return self._body()

    def _add(self, kind: str, text: str) -> list[bytes]:
        """Add text to the open block of a kind, after opening one if need be."""
        opened: list[bytes] = []
        if not self._is_open or self._content[-1]["type"] != kind:
            signed = {"signature": ""} if kind == "thinking" else {}
            opened = self._open({"type": kind, kind: "", **signed})
        self._content[-1][kind] += text
        return [*opened, self._delta({"type": f"{kind}_delta", kind: text})]

    def _add_call(self, call: ToolCall) -> list[bytes]:
        # Clients parse what they are streamed, and want an object.
        arguments = object_in(call.arguments, {"arguments": call.arguments})
        text = json.dumps(arguments, ensure_ascii=False)
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        messages = [
            *self._open(block),
            self._delta({"type": "input_json_delta", "partial_json": text}),
        ]
        self._content[-1]["input"] = arguments
        return [*messages, *self._close()]

    def _open(self, block: dict[str, Any]) -> list[bytes]:
        closed = self._close()
        self._content.append(block)
        self._is_open = True
        index = len(self._content) - 1
        return [
            *closed,
            _message("content_block_start", index=index, content_block=block),
        ]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        index = len(self._content) - 1
        return _message("content_block_delta", index=index, delta=delta)

    def _close(self) -> list[bytes]:
        """Return the messages that end the open block, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        signed: list[bytes] = []
        if self._content[-1]["type"] == "thinking":
            self._content[-1]["signature"] = SIGNATURE
            signed = [self._delta({"type": "signature_delta", "signature": SIGNATURE})]
        end = _message("content_block_stop", index=len(self._content) - 1)
        return [*signed, end]

    def _body(self) -> dict[str, Any]:
        content, usage = [*self._content], _usage(self._usage)
        return {**self._told, "content": content, **self._stop, "usage": usage}


def _stop_of(reason: FinishReason, stop: str | None) -> dict[str, Any]:
    kind = "stop_sequence" if stop is not None else _STOP_REASONS[reason]
    return {"stop_reason": kind, "stop_sequence": stop}


def _usage(usage: Usage) -> dict[str, Any]:
    """Return token counts; unlike OpenAI's, the input is without what was cached."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _message(kind: str, **fields: Any) -> bytes:
    return sse_message({"type": kind, **fields}, kind)
