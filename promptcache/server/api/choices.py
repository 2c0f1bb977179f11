"""Choices: what chat and text completions share."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from promptcache.server.api.errors import ApiError, openai_error
from promptcache.server.api.fields import (
    DEFAULT_MODEL,
    Body,
    ContextSize,
    LogitBias,
    MaxTokens,
    Name,
    NumAnswers,
    NumDraftTokens,
    Part,
    Penalty,
    Probability,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    XtcThreshold,
)
from promptcache.server.api.logprobs import completion_usage
from promptcache.server.api.sse import DONE, keepalive, sse_message
from promptcache.server.completion import Event, Finished, Progress, Usage

# The names of sampling's arguments that differ from the requests' fields.
_SAMPLING = {
    "temperature": "temp",
    **{
        name: name
        for name in (
            "top_p",
            "top_k",
            "min_p",
            "xtc_probability",
            "xtc_threshold",
            "seed",
            "repetition_penalty",
            "repetition_context_size",
            "presence_penalty",
            "presence_context_size",
            "frequency_penalty",
            "frequency_context_size",
        )
    },
}


def sampling_of(request: Body) -> dict[str, Any]:
    """Return the arguments of sampling that a request of any API has."""
    values = {
        argument: getattr(request, field, None) for field, argument in _SAMPLING.items()
    }
    return {name: value for name, value in values.items() if value is not None}


class StreamOptions(Part):
    """What a stream has besides the answers."""

    include_usage: bool = False


class ChoicesRequest(Body):
    """What requests of chat and text completions share; also mlx-lm's own fields."""

    model: Name = DEFAULT_MODEL
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: MaxTokens | None = None
    n: NumAnswers = 1
    stop: Stop = Field(default=[])
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    xtc_probability: Probability | None = None
    xtc_threshold: XtcThreshold | None = None
    seed: Seed | None = None
    repetition_penalty: RepetitionPenalty | None = None
    repetition_context_size: ContextSize | None = None
    presence_penalty: Penalty | None = None
    presence_context_size: ContextSize | None = None
    frequency_penalty: Penalty | None = None
    frequency_context_size: ContextSize | None = None
    logit_bias: LogitBias = Field(default={})
    adapters: Name | None = None
    draft_model: Name | None = None
    num_draft_tokens: NumDraftTokens | None = None

    @property
    def named_draft_model(self) -> str | None:
        """The draft model that is asked for, None for the server's."""
        return None if self.draft_model == DEFAULT_MODEL else self.draft_model


class ChoicesAnswer:
    """An answer that is being given: what chat and text completions share.

    Args:
        request: What is answered.
        model: The name of the model to tell, the request's by default.
        answer_id: What identifies the answer, a new one by default.
        created: When it began, in seconds since 1970, now by default.
        system_fingerprint: What the answer was made with.
    """

    id_prefix: str
    object_type: str
    chunk_type: str

    def __init__(
        self,
        request: ChoicesRequest,
        *,
        model: str | None = None,
        answer_id: str | None = None,
        created: int | None = None,
        system_fingerprint: str | None = None,
    ) -> None:
        self.id = answer_id or f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._includes_usage = request.stream_options.include_usage
        self._common: dict[str, Any] = {
            "created": int(time.time()) if created is None else created,
            "model": model or request.model,
        }
        if system_fingerprint is not None:
            self._common["system_fingerprint"] = system_fingerprint
        self._usage = Usage(0)

    def encode(self, event: Event) -> list[bytes]:
        """Return the messages that tell of an event."""
        if isinstance(event, Progress):
            return [keepalive(event.done, event.total)]
        if not isinstance(event, Finished):
            chunks = [self._body(self.chunk_type, [c]) for c in self._chunks(event)]
        else:
            self._usage = event.usage
            chunks = [self._usage_chunk()] if self._includes_usage else []
        messages = [sse_message(chunk) for chunk in chunks]
        return [*messages, DONE] if isinstance(event, Finished) else messages

    def encode_error(self, error: ApiError) -> list[bytes]:
        """Return the messages that end a stream with an error."""
        return [sse_message(openai_error(error))]

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the answer of all its events."""
        for event in events:
            self.encode(event)
        usage = {"usage": completion_usage(self._usage)}
        return {**self._body(self.object_type, self._choices()), **usage}

    def _usage_chunk(self) -> dict[str, Any]:
        usage = {"usage": completion_usage(self._usage)}
        return {**self._body(self.chunk_type, []), **usage}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, **self._common, "choices": choices}

    def _chunks(self, event: Event) -> list[dict[str, Any]]:
        """Take an event of an answer, and return the choices of chunks that tell it."""
        raise NotImplementedError

    def _choices(self) -> list[dict[str, Any]]:
        """Return the whole choices of all events taken."""
        raise NotImplementedError
